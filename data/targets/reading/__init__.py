"""Read what a cache has of its teachers by sequence, and what follows from it for training."""
