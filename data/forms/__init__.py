"""What is made of records that are no plain texts: dialogues by their template, and tokens."""
