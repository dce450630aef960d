"""Train many students, one for each point of a grid, side by side."""
