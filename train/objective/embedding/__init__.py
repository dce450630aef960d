"""Losses between a student's vectors and a teacher's: each is a file of ``losses/``."""
