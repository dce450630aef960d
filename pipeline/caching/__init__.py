"""Stage 1: run each teacher once over the corpus and commit its outputs, unit by unit."""
