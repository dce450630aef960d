"""Sentence encoders: a model, pooling of its states, and what follows, as sentence-transformers."""
