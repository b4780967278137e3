"""Training from a cache."""
