"""From a cache to batches."""
