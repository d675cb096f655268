"""A model in numbers: its shape, its exact parameters and bytes, and the cost of a forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from minitron.model.architecture import PRUNABLE, Architecture, Parameters, Shape, kv_cache_bytes
from minitron.model.checkpoint import Checkpoint, ModelConfig

K_BLOCK = 256  # weights


@dataclass(frozen=True)
class Description:
    """A model in numbers.

    dtype: the name of the weights' format.
    prunable: the dims that can be cut.
    dtype_assumed: of a config without weights, whether it does not name the dtype; None for a checkpoint.
    """

    family: str
    shape: Shape
    parameters: Parameters
    dtype: str
    weight_bytes: int
    kv_cache_bytes_per_token: int
    tied_embeddings: bool
    prunable: Sequence[str]
    dtype_assumed: bool | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the description as records and `--json` hold it."""
        counts = asdict(self.parameters) | {"non_embedding": self.parameters.non_embedding}
        facts = vars(self) | {"shape": asdict(self.shape), "parameters": counts}
        return {name: value for name, value in facts.items() if value is not None}


def describe(model: Checkpoint | ModelConfig) -> Description:
    """Describe a checkpoint, or a model of which only the config is there."""
    assumed = model.dtype_assumed if isinstance(model, ModelConfig) else None
    return describe_shape(model.architecture, model.config, model.shape, model.written_dtype, assumed)


def describe_shape(
    architecture: Architecture,
    config: Mapping[str, Any],
    shape: Shape,
    dtype: torch.dtype,
    dtype_assumed: bool | None = None,
) -> Description:
    """Describe a model of a shape from the config alone."""
    parameters = architecture.count(shape, config)
    return Description(
        family=architecture.name,
        shape=shape,
        parameters=parameters,
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=parameters.total * dtype.itemsize,
        kv_cache_bytes_per_token=kv_cache_bytes(shape, dtype.itemsize),
        tied_embeddings=architecture.tied(config),
        prunable=[dim for dim in PRUNABLE if getattr(shape, dim) > 1],
        dtype_assumed=dtype_assumed,
    )


def sizes_beyond_blocks(teacher: Shape, student: Shape) -> dict[str, int]:
    """Return the sizes of the student's rows, by dim, that make no whole blocks of llama.cpp's K types, of 256 weights.

    Sizes that the teacher has too are left out. Matrices of such rows fall back to larger types in a GGUF file.
    """
    rows = [{"hidden": one.hidden, "ffn": one.ffn, "heads": one.heads * one.head_dim} for one in (teacher, student)]
    return {dim: size for dim, size in rows[1].items() if size % K_BLOCK and size != rows[0][dim]}


def forward_flops(shape: Shape, parameters: Parameters, context: int) -> int:
    """Return the operations of one token's forward pass: matrices, output projection, causal attention."""
    attention = 2 * context * shape.heads * shape.head_dim * shape.layers
    return 2 * (parameters.non_embedding + shape.vocab * shape.hidden) + attention
