"""Share a cache: its card, and a copy that reveals nothing of this machine."""
