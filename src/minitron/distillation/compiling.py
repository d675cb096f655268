"""torch.compile for trainings that are long enough to pay for it.

Layers are alike, so one is compiled for all. What is compiled computes the same but for rounding.
"""

import os
import shutil
import sys
from collections.abc import Iterable

import torch
from torch import nn

from minitron.core.errors import RecipeError


def compile_layers(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        layer.forward = torch.compile(layer.forward)


def require_compiler(device: torch.device) -> None:
    """Raises: RecipeError if this machine has no compiler for what torch.compile writes for a CPU."""
    command = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(command) is None:
        raise RecipeError(
            f"distill.compile=true needs a C++ compiler on a CPU, and there is no {command!r} here: install one "
            "(g++ or clang++), name yours in the environment variable CXX, or leave out distill.compile"
        )
