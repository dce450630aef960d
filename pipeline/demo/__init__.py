"""The whole product on text that every Python carries, in a minute or a few."""
