"""What teacher.json says of a teacher, by its files: of experts' heads, of sentence encoders."""
