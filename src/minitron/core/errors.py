"""Errors that a user can act on. The command line prints their message without a traceback and exits with 1.

MinitronError
├── CheckpointError              a model directory that cannot be read, or contradicts itself
│   └── UnsupportedArchitecture  a model type that no family table describes
├── DataError                    text that cannot be read, split or tokenized
├── PlanError                    a shape or target that cannot be cut from the model
├── GgufError                    a GGUF file that cannot be made, read or run
├── TaskError                    a benchmark that is missing, or cannot run with this model or on this machine
├── RecipeError                  a recipe that does not validate
├── NoEffect                     an option or a recipe key that could not change anything
└── RunError                     a run directory that is locked, stale, or cannot be written
    └── Interrupted              a signal arrived; the state is saved (exit code 130)
"""

import difflib
from collections.abc import Iterable


class MinitronError(Exception):
    """The base of every error that a user can act on."""


class CheckpointError(MinitronError): ...


class UnsupportedArchitecture(CheckpointError):
    def __init__(self, model_type: str, known: Iterable[str]):
        super().__init__(f"model_type {model_type!r} is not supported{did_you_mean(model_type, known)}")


class DataError(MinitronError): ...


class PlanError(MinitronError): ...


class RecipeError(MinitronError): ...


class GgufError(MinitronError): ...


class TaskError(MinitronError): ...


class NoEffect(MinitronError): ...


class RunError(MinitronError): ...


class Interrupted(RunError): ...


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, if one is near, and all known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{guess} Available: {', '.join(known)}"
