"""Look at a finished cache: verify its bytes, audit its targets, show what is in it."""
