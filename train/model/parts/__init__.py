"""Parts of a student beside its language model: domain prompts, and what makes vectors."""
