"""Targets that were made elsewhere, into a cache; and those of a cache, out of it."""
