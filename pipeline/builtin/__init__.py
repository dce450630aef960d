"""Tiny models and labelled text made from Python's documentation, named python-docs/…."""
