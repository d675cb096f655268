"""Foundations that know no model: errors, sections of recipes, files, devices, processes."""
