"""A model in numbers: family, shape, parameters, bytes and floating-point operations."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from minitron.model.architecture import PRUNABLE, Architecture, Parameters, Shape, kv_cache_bytes
from minitron.model.checkpoint import Checkpoint, ModelConfig


def describe(model: Checkpoint | ModelConfig) -> dict[str, Any]:
    """The family, shape, exact parameters and bytes of a model; without weights also whether its dtype is assumed."""
    facts = describe_shape(model.architecture, model.config, model.shape, model.dtype)
    return facts | ({"dtype_assumed": model.dtype_assumed} if isinstance(model, ModelConfig) else {})


def describe_shape(
    architecture: Architecture, config: Mapping[str, Any], shape: Shape, dtype: torch.dtype
) -> dict[str, Any]:
    """The result of `describe`, from a config alone."""
    parameters = architecture.count(shape, config)
    tied = architecture.tied(config)
    return {
        "family": architecture.name,
        "shape": asdict(shape),
        "parameters": asdict(parameters) | {"non_embedding": parameters.non_embedding},
        "dtype": str(dtype).removeprefix("torch."),
        "weight_bytes": parameters.total * dtype.itemsize,
        "kv_cache_bytes_per_token": kv_cache_bytes(shape, dtype.itemsize),
        "tied_embeddings": tied,
        "prunable": [dim for dim in PRUNABLE if getattr(shape, dim) > 1],
    }


def forward_flops(shape: Shape, parameters: Parameters, context: int) -> int:
    """The floating-point operations of a token's forward pass: matrices, output projection and causal attention."""
    attention = 2 * context * shape.heads * shape.head_dim * shape.layers
    return 2 * (parameters.non_embedding + shape.vocab * shape.hidden) + attention
