"""This package is the command line: one command, one file."""
