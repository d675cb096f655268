"""A model as its config.json describes it. Shapes, counts and costs need no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron.core.errors import CheckpointError
from minitron.model.architecture import Architecture, Parameters, Shape
from minitron.model.config_json import DTYPE_KEYS, read_config, require_entry_per_layer
from minitron.model.families import family_of

_CONFIG_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ASSUMED_DTYPE = "float32"  # what transformers takes where a config says none


@dataclass(frozen=True)
class ModelConfig:
    """What a Checkpoint knows without its tensors."""

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    shape: Shape
    dtype: torch.dtype
    dtype_assumed: bool  # config.json says none

    @property
    def parameters(self) -> Parameters:
        return self.architecture.count(self.shape, self.config)


def open_config(path: Path) -> ModelConfig:
    """Read a model directory's config.json; nothing else need be there.

    Raises: CheckpointError, UnsupportedArchitecture.
    """
    config = read_config(path)
    architecture = family_of(config)
    said = next((config[key] for key in DTYPE_KEYS if key in config), None)
    name = ASSUMED_DTYPE if said is None else said
    if name not in _CONFIG_DTYPES:
        known = ", ".join(sorted(_CONFIG_DTYPES))
        raise CheckpointError(f"{path / 'config.json'}: dtype is {name!r}; supported are {known}")
    shape = architecture.shape(config)
    require_entry_per_layer(path, config, architecture, shape.layers)
    return ModelConfig(path, config, architecture, shape, _CONFIG_DTYPES[name], said is None)
