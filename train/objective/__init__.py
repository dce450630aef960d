"""The training objective: its terms, the rows that each uses, and their losses."""
