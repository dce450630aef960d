"""Estimate what a run will cost (sequences, bytes, time) before anything runs."""
