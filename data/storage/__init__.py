"""Durable bytes: stores, commits, Arrow shards and their checksums."""
