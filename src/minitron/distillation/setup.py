"""A model in memory as a training needs it: its weights' format, its layers compiled, its matrix products' format."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minitron.core.errors import RecipeError
from minitron.core.machine import compiler_command, has_compiler
from minitron.distillation.config import DistillConfig
from minitron.distillation.optim import hold_weights
from minitron.model.checkpoint import Checkpoint
from minitron.model.hidden_states import decoder_layers
from minitron.model.hub import new_model
from minitron.model.sharded import load_for_training

# Compiled codes of a layer: by model, size of the batch, and whether it trains.
MOST_CODES = 64


def trainable_model(
    checkpoint: Checkpoint,
    config: DistillConfig,
    initialize: Literal["weights", "random"] = "weights",
    seed: int = 0,
) -> Any:
    """Load the checkpoint's model, or make one of its shape with random weights, and set it up to be trained."""
    if initialize == "weights":
        model = load_for_training(checkpoint, torch.float32)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = new_model(checkpoint.config, torch.float32)
    hold_weights(model, config.weights)
    if checkpoint.architecture.centred_norms:
        _norms_in_float32(model, checkpoint.architecture.norm_gain_offset)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        compile_layers(decoder_layers(model, checkpoint))
    return model


def _norms_in_float32(model: nn.Module, gain_offset: float) -> None:
    """Let norms that subtract the mean compute in float32, as the other families' do by themselves.

    Nemotron's class rounds its inputs to the products' format, and takes no weights of another format than theirs.
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(_norm_in_float32, module, gain_offset)  # type: ignore[method-assign]


def _norm_in_float32(norm: nn.LayerNorm, gain_offset: float, states: Tensor) -> Tensor:
    gain, bias = norm.weight.float() + gain_offset, None if norm.bias is None else norm.bias.float()
    return nn.functional.layer_norm(states.float(), norm.normalized_shape, gain, bias, norm.eps)


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Let torch.compile run the layers, which then compute the same but for rounding.

    Layers are alike, so one is compiled for all. Each size of a batch has code of its own: code for all sizes would be
    made when a second size is seen, and a training that was interrupted would go on with other code than before.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_CODES)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)


def require_compiler(device: torch.device) -> None:
    """Refuse a machine without a compiler for the code that torch.compile writes for a CPU.

    Raises: RecipeError.
    """
    if device.type == "cpu" and not has_compiler():
        raise RecipeError(
            f"distill.compile=true needs a C++ compiler on a CPU, and there is no {compiler_command()!r} here: install "
            "one (g++ or clang++), name yours in the environment variable CXX, or leave out distill.compile"
        )


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Make matrix products of float32 weights in `dtype` while the block runs: in bfloat16, or as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
