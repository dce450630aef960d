"""Send a cache, a student or an expert to a hub: what is sent, and how."""
