"""What tokens stand for, in any text."""
