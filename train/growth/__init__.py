"""Make a model wider and deeper without changing what it computes (ELLE)."""
