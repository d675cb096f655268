"""What to remove, and removing it: statistics -> scores -> plan -> pruned checkpoint."""
