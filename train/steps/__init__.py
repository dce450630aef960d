"""A training step: what it does, whether it counts, and what it measured."""
