"""The contents of teacher.json from a teacher's files: experts' heads and sentence encoders."""
