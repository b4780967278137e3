"""From a trained draft to one that engines serve: layouts, export, checks, decoding."""
