"""Repair of what a cut breaks: what is left is changed, so that it makes up for what is gone."""
