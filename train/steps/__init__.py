"""A step of training: what it does, whether it counts, and what it measured."""
