"""Pruning: which units and layers to remove, and the cut that removes them."""
