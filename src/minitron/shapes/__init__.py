"""Which shape: every one that a family accepts, what it costs, and which is best."""
