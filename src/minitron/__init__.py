"""Structured pruning and knowledge distillation of language models: the Minitron method.

P1 in the docstrings is arXiv:2407.14679, P2 is arXiv:2408.11796. Start reading at `minitron.pipeline.run`.
"""

from importlib import import_module
from typing import Any

# Name -> module. Imported when used, so that `minitron --help` does not wait for torch.
_PUBLIC = {
    "Architecture": "minitron.model.architecture",
    "Checkpoint": "minitron.model.checkpoint",
    "Evaluation": "minitron.evaluation.quality",
    "FAMILIES": "minitron.model.families",
    "MinitronError": "minitron.core.errors",
    "Plan": "minitron.pruning.plan",
    "Recipe": "minitron.recipe",
    "Scores": "minitron.pruning.importance",
    "Shape": "minitron.model.architecture",
    "Statistics": "minitron.calibration.collect",
    "load_recipe": "minitron.recipe",
    "open_checkpoint": "minitron.model.checkpoint",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
