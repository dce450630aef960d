"""A student that is built without memory, and filled shard by shard."""
