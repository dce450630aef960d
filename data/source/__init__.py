"""Read texts from their sources: where they are, how they are read, which are left out."""
