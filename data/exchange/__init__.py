"""Import targets that were made elsewhere into a cache, and export those of a cache."""
