"""What of a cache others may see: its card, and a copy that says nothing of this machine."""
