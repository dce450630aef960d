"""Compare finished runs: which runs one table may hold, the table, and the page."""
