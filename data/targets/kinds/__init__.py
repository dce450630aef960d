"""A class for each kind of target: its columns, and what other code may ask of it."""
