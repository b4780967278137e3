"""The cache: what it is, how its shards are written, committed, read and verified."""
