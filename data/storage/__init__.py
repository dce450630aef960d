"""Put bytes where they last: stores, commits, Arrow shards and their checksums."""
