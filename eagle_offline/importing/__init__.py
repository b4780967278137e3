"""States that another tool has dumped, checked against the tokenised corpus and written as a cache."""
