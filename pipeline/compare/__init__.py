"""Compare finished runs: which may stand in one table, the table, and the page."""
