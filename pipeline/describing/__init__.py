"""The contents of teacher.json, from a teacher's files: for experts' heads and sentence
encoders.
"""
