"""Methods that are not built-in terms: one file each, found by its name."""
