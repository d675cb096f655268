"""The teacher's activations on a small sample of text, as sums."""
