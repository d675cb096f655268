"""A model in memory, that of one process or divided among several (FSDP2), none of which ever holds it whole."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from minitron.core import parallel
from minitron.model.checkpoint import Checkpoint, load_model
from minitron.model.stream import skeleton


def load_for_training(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The checkpoint's model, in evaluation mode; among several processes without its weights, see `shard_into`.

    Raises: CheckpointError if a weight cannot be read, or is NaN or infinite. So does `shard_into`.
    """
    if parallel.joined().size == 1:
        return load_model(checkpoint.path, dtype)
    model = skeleton(checkpoint, dtype).requires_grad_(True)
    model.tie_weights()
    return model


def shard_into(
    root: nn.Module,
    model: Any,
    layers: Sequence[nn.Module],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Divide a module among the processes, read each one's part of the weights, and bring it to the device.

    Args:
        root: what is divided: the model, a part of it, or what holds it.
        model: of `load_for_training`, or with weights of its own.
        layers: of the model, see `parallel.shard`.
        dtype: that the layers are gathered in.
    """
    without_weights = any(parameter.is_meta for parameter in model.parameters())
    parallel.shard(root, layers, dtype, device)
    if without_weights:
        architecture = checkpoint.architecture
        tied = {architecture.head: architecture.embedding} if architecture.tied(checkpoint.config) else {}
        # Dividing a part of the model unties it from what is outside.
        parallel.fill(model, lambda name, *rows: checkpoint.read_rows(tied.get(name, name), *rows), device)
    for module in (root, model):
        module.to(device)
