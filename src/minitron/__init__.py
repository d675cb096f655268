"""Structured pruning and knowledge distillation of language models (the Minitron method)."""
