"""Teachers run by a server (vLLM or a compatible one): ask, check, and identify them."""
