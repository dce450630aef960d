"""Models in other formats, and control of transformers' own messages."""
