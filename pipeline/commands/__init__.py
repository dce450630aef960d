"""The commands: what each takes, which function it calls, and what it prints."""
