"""Measuring: quality on held-out text, generations, speed."""
