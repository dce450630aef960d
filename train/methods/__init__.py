"""Methods that are none of the built-in terms: one file each, found by its name."""
