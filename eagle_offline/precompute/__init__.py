"""Fills a cache: `plan` settles what it is, `fill` writes it."""
