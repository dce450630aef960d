"""The outputs of teachers: their description, their encoding, the kinds, and reading them."""
