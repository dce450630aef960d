"""Sentence encoders as in sentence-transformers: a model, pooling of its states, later steps."""
