"""A model in memory, whole in one process or sharded among several (FSDP2), each of which only reads its part."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from minitron.core import parallel
from minitron.model.checkpoint import Checkpoint
from minitron.model.stream import skeleton


def load_for_training(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Make the checkpoint's model in evaluation mode, without weights, which `shard_into` reads.

    Raises: CheckpointError where transformers refuses its config.
    """
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
    """Shard a module among the processes, read the weights of this process's shards, and move them to the device.

    Args:
        root: the module to shard: the model, a part of it, or a module that contains it.
        model: a model of `load_for_training`, or a model with weights, which it keeps.
        layers: the model's layers, see `parallel.shard`.
        dtype: the dtype in which the layers are gathered.

    Raises: CheckpointError if a weight cannot be read, or is NaN or infinite.
    """
    without_weights = any(parameter.is_meta for parameter in model.parameters())
    parallel.shard(root, layers, dtype, device)
    if without_weights:
        architecture = checkpoint.architecture
        tied = {architecture.head: architecture.embedding} if architecture.tied(checkpoint.config) else {}
        # Sharding a part of the model unties it from modules outside.
        parallel.fill(model, lambda name, *rows: checkpoint.read_rows(tied.get(name, name), *rows), device)
    for module in (root, model):
        if any(tensor.device != device for tensor in (*module.parameters(), *module.buffers())):
            module.to(device)
