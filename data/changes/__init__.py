"""Remove, rename or transcode a cache's teachers, and list them."""
