"""Export a student's head as a model of its family, which transformers alone loads."""
