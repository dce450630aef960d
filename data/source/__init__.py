"""Texts as they come: where they are, how they are read, which are left out."""
