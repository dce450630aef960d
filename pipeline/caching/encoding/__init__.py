"""What a teacher's device makes of scores before they come to the host."""
