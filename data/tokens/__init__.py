"""What tokens stand for, whatever text they are of."""
