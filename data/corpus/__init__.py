"""Turn documents into packed sequences of tokens, aligned with their text."""
