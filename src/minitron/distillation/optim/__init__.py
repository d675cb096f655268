"""The optimizers, the formats of the weights that they move, and the memory that they take.

A new optimizer takes a row of OPTIMIZERS and a row of the tests.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from minitron.core.config import choice
from minitron.distillation.optim.low_precision import BFloat16AdamW, Group, KahanAdamW, StochasticAdamW
from minitron.distillation.optim.soap import FULL, LIGHT, Soap, Turning
from minitron.model.architecture import Architecture, Shape

Weights = Literal["float32", "bfloat16_kahan", "bfloat16_stochastic"]
# Bytes of each parameter in training: the weight, its gradient, two moments, and the rounding that Kahan summation
# keeps.
TRAINING_BYTES: dict[Weights, int] = {
    "float32": 4 + 4 + 8,
    "bfloat16_kahan": 2 + 2 + 4 + 2,
    "bfloat16_stochastic": 2 + 2 + 4,
}
LOW_PRECISION: dict[Weights, type[BFloat16AdamW]] = {
    "bfloat16_kahan": KahanAdamW,
    "bfloat16_stochastic": StochasticAdamW,
}


def _adamw(groups: list[Group], betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def _is_never_turned(shape: tuple[int, ...]) -> bool:
    return False


def _nothing(shape: tuple[int, ...]) -> int:
    return 0


def _none_held(optimizer: torch.optim.Optimizer) -> Mapping[Tensor, int]:
    return {}


def _held_by_soap(optimizer: torch.optim.Optimizer) -> Mapping[Tensor, int]:
    assert isinstance(optimizer, Soap)
    return optimizer.holders


@dataclass(frozen=True)
class OptimizerRow:
    """A row of OPTIMIZERS.

    make: makes the optimizer of groups of float32 weights, from Adam's betas and the fields that `options` names.
    options: fields of OptimizerOptions that `make` also takes, by their names.
    in_bfloat16: format -> the optimizer of bfloat16 weights in that format.
    is_turned: whether a matrix of a shape is moved along other axes than its own; its group then says so.
    further_bytes: the memory for a layer's matrix of a shape beyond AdamW's moments.
    flops: the operations of matrix products in an update of a layer's matrix of a shape, in the mean.
    holders: parameter -> the process that holds its whole state; a parameter that is missing is sharded.
    """

    make: Callable[..., torch.optim.Optimizer]
    doc: str
    options: tuple[str, ...] = ()
    in_bfloat16: Mapping[Weights, Callable[..., torch.optim.Optimizer]] = field(default_factory=dict)
    is_turned: Callable[[tuple[int, ...]], bool] = _is_never_turned
    further_bytes: Callable[[tuple[int, ...]], int] = _nothing
    flops: Callable[[tuple[int, ...]], float] = _nothing
    holders: Callable[[torch.optim.Optimizer], Mapping[Tensor, int]] = _none_held


def soap_row(turning: Turning, doc: str) -> OptimizerRow:
    """Make the row of a SOAP that does so much for the axes."""
    return OptimizerRow(
        partial(Soap, turning=turning),
        doc,
        options=("dtype",),
        is_turned=lambda shape: bool(turning.sides(shape)),
        further_bytes=turning.axes_bytes,
        flops=turning.flops,
        holders=_held_by_soap,
    )


OPTIMIZERS: dict[str, OptimizerRow] = {
    "soap": soap_row(
        FULL,
        "Adam along the principal axes of each matrix's gradients, which takes fewer tokens and more memory (see "
        "--dry-run)",
    ),
    "soap_light": soap_row(
        LIGHT,
        "SOAP along the shorter sides alone, with axes that change less often and products in bfloat16, which takes a "
        "third of its time or less",
    ),
    "adamw": OptimizerRow(_adamw, "Adam along the axes that there are", in_bfloat16=LOW_PRECISION),
}
Optimizer = Annotated[str, choice(OPTIMIZERS)]


def hold_weights(model: nn.Module, weights: Weights) -> None:
    """Bring a model's parameters into the format in which they are trained."""
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def vocabulary_of(model: Any) -> list[Tensor]:
    """Return a model's matrices with a row for each token."""
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


@dataclass(frozen=True)
class OptimizerOptions:
    """The settings that all optimizers share.

    weights: the format in which `hold_weights` holds them.
    betas: decays of Adam's moments.
    weight_decay: decoupled weight decay of matrices; vectors have none.
    dtype: of the model's matrix products; SOAP's may round their inputs to it.
    seed: of the noise in stochastic rounding.
    """

    weights: Weights
    betas: tuple[float, float]
    weight_decay: float
    dtype: torch.dtype
    seed: int


def make_optimizer(
    trained: Mapping[str, Iterable[Tensor]],
    optimizer: Optimizer,
    options: OptimizerOptions,
    *,
    vocabulary: Collection[Tensor],
) -> torch.optim.Optimizer:
    """Make an optimizer of parameters in the format that `hold_weights` leaves them in.

    Args:
        trained: a model's name -> its parameters. Each group of the optimizer says in `of` whose it is.
        vocabulary: matrices among them with a row for each token, which SOAP moves as AdamW does.
    """
    row, of_tokens = OPTIMIZERS[optimizer], {id(matrix) for matrix in vocabulary}
    groups = []
    for name, parameters in trained.items():
        kinds: dict[tuple[bool, bool], list[Tensor]] = {(True, True): [], (True, False): [], (False, False): []}
        for parameter in parameters:
            in_a_layer = parameter.ndim == 2 and id(parameter) not in of_tokens
            turned = in_a_layer and row.is_turned(tuple(parameter.shape))
            kinds[parameter.ndim >= 2, turned].append(parameter)
        for (matrices, turned), members in kinds.items():
            decay = options.weight_decay if matrices else 0.0
            if members:
                groups.append({"params": members, "weight_decay": decay, "of": name, "turned": turned})
    if options.weights != "float32":
        return row.in_bfloat16[options.weights](groups, betas=options.betas, seed=options.seed)
    asked = {option: getattr(options, option) for option in row.options}
    return row.make(groups, betas=options.betas, **asked)


def training_bytes(
    architecture: Architecture, config: Mapping[str, Any], shape: Shape, optimizer: Optimizer, weights: Weights
) -> int:
    """Return the memory that training a model of a shape takes, in all processes together, without activations.

    It holds weights, gradients, moments and SOAP's axes.
    """
    bytes_ = TRAINING_BYTES[weights] * architecture.count(shape, config).total
    layer = [spec.shape(shape) for spec in architecture.specs(config, layers=1) if spec.layer is not None]
    return bytes_ + shape.layers * sum(OPTIMIZERS[optimizer].further_bytes(size) for size in layer if len(size) == 2)
