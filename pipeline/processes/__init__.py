"""Child processes: where each works, how it gets its work, how it fails and ends."""
