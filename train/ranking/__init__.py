"""Documents in groups, such as those of a query: losses and measures of their order."""
