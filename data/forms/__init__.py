"""Read records that are not plain texts: dialogues by their template, and tokens."""
