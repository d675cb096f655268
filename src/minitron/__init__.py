"""Structured pruning and knowledge distillation of language models: the Minitron method.

P1 in the docstrings is arXiv:2407.14679, P2 is arXiv:2408.11796. Start reading at `minitron.run`.
"""
