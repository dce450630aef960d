"""The published cycle and its controls as one command: experts, guided students, experts again."""
