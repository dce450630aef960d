"""Read the targets in a cache by sequence, and derive what training needs from them."""
