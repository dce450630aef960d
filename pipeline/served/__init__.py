"""Teachers that a server runs (vLLM, or what speaks its protocol): asked, checked, told apart."""
