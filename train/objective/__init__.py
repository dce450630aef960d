"""What a student is trained on: the objective's terms, the rows each uses, and their losses."""
