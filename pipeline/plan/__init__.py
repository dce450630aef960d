"""Tell what a run will cost, in sequences, bytes and time, before anything is done."""
