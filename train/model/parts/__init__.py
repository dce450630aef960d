"""Parts of a student beside its language model: the prompts of domains, and what makes vectors."""
