"""Rows of several documents as models read them: positions restart, attention stays within each."""
