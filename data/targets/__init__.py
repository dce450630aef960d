"""What teachers said: how it is described and encoded; each kind of it; reading it from a cache."""
