"""What tokens stand for, independent of any text."""
