"""Build a student without memory, then fill it shard by shard."""
