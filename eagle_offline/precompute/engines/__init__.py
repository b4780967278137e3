"""Who hands out the shards of a cache: launchers of processes, or Ray."""
