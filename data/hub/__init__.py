"""What lies on a model hub, by its address: read alone."""
