"""The student's shape: all shapes that a family accepts, their costs, and the best of them."""
