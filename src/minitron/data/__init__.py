"""Text to blocks of tokens."""
