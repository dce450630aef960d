"""How a student's vectors are held against a teacher's: each loss is a file of ``losses/``."""
