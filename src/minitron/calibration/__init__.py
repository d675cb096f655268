"""What the teacher does on a little text."""
