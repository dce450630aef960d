"""Losses of vectors, one file each; a new file here is a new loss, found by its name."""
