"""What teachers said: the columns of each kind of target, their codecs, and how they are read."""
