"""Models: the architecture tables, checkpoints on disk, and the stream that runs one layer at a time."""
