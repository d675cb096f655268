"""A run: stages in their order, each done once."""
