"""Texts as they come: where they stand, how they are read, which are left out."""
