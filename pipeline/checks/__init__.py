"""Check a finished cache: verify its bytes, audit its targets, show its content."""
