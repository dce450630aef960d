"""Run files with several stages, one after another, each with some values changed."""
