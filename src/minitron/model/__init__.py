"""What a model is: the architecture table, checkpoints on disk, and running one layer at a time."""
