"""What moves the weights: which optimizer, for weights held how, and what it holds of each."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minitron.distillation.optim.low_precision import BFloat16AdamW, KahanAdamW, StochasticAdamW
from minitron.distillation.optim.soap import Soap, axes_bytes, turned_sides
from minitron.model.architecture import Architecture, Shape

Optimizer = Literal["soap", "adamw"]
Weights = Literal["float32", "bfloat16_kahan", "bfloat16_stochastic"]
# That training holds of each parameter: the weight, its gradient, two moments and what is left over.
TRAINING_BYTES: dict[Weights, int] = {
    "float32": 4 + 4 + 8,
    "bfloat16_kahan": 2 + 2 + 4 + 2,
    "bfloat16_stochastic": 2 + 2 + 4,
}
LOW_PRECISION: dict[Weights, type[BFloat16AdamW]] = {
    "bfloat16_kahan": KahanAdamW,
    "bfloat16_stochastic": StochasticAdamW,
}


def hold_weights(model: nn.Module, weights: Weights) -> None:
    """Bring a model's parameters into the format in which they are trained."""
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def vocabulary_of(model: Any) -> list[Tensor]:
    """A model's matrices with a row for each token."""
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def make_optimizer(
    trained: Mapping[str, Iterable[Tensor]],
    optimizer: Optimizer,
    weights: Weights,
    *,
    vocabulary: Collection[Tensor],
    betas: tuple[float, float],
    weight_decay: float,
    dtype: torch.dtype,
    seed: int,
) -> torch.optim.Optimizer:
    """An optimizer of parameters held as `hold_weights` leaves them; matrices decay, vectors do not.

    Args:
        trained: a model's name -> its parameters. Each group of the optimizer says in `of` whose it is.
        vocabulary: matrices among them with a row for each token, which SOAP moves as AdamW does.
        dtype: of the model's matrix products; SOAP's may round their inputs to it.
        seed: of the noise in stochastic rounding.
    """
    of_tokens = {id(matrix) for matrix in vocabulary}
    groups = []
    for name, parameters in trained.items():
        kinds: dict[tuple[bool, bool], list[Tensor]] = {(True, True): [], (True, False): [], (False, False): []}
        for parameter in parameters:
            may_turn = optimizer == "soap" and parameter.ndim == 2 and id(parameter) not in of_tokens
            turned = may_turn and bool(turned_sides(tuple(parameter.shape)))
            kinds[parameter.ndim >= 2, turned].append(parameter)
        for (matrices, turned), members in kinds.items():
            decay = weight_decay if matrices else 0.0
            if members:
                groups.append({"params": members, "weight_decay": decay, "of": name, "turned": turned})
    if weights != "float32":
        assert optimizer == "adamw", "settings.resolve allows no other"
        return LOW_PRECISION[weights](groups, betas=betas, seed=seed)
    if optimizer == "soap":
        return Soap(groups, betas=betas, dtype=dtype)
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def training_bytes(
    architecture: Architecture, config: Mapping[str, Any], shape: Shape, optimizer: Optimizer, weights: Weights
) -> int:
    """What training a model of a shape holds, in all processes together: weights, gradients, moments, SOAP's axes."""
    bytes_ = TRAINING_BYTES[weights] * architecture.count(shape, config).total
    if optimizer == "adamw":
        return bytes_
    layer = [spec.shape(shape) for spec in architecture.specs(config, layers=1) if spec.layer is not None]
    return bytes_ + shape.layers * sum(axes_bytes(size) for size in layer if len(size) == 2)
