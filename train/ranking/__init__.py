"""Documents in groups, as a query has them: what trains their order, and what measures it."""
