"""The importance of every unit: pure functions from statistics to scores. Units with higher scores stay."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minitron.calibration.statistics import SEQUENCE_AGGREGATES, Statistics
from minitron.core.config import choice
from minitron.core.errors import PlanError
from minitron.core.typed_files import read_typed
from minitron.model.architecture import LAYER_DIMS, Shape
from minitron.pruning import layouts

Aggregate = Literal["mean", "l2", "variance"]


@dataclass(frozen=True)
class Scores:
    """Importance per unit, float64.

    layers [layers], hidden [hidden], ffn [layers, ffn], heads [layers, heads], kv_heads [layers, kv_heads].
    """

    layers: Tensor
    hidden: Tensor
    ffn: Tensor
    heads: Tensor
    kv_heads: Tensor

    def save(self, path: Path) -> None:
        rows = {field.name: getattr(self, field.name).tolist() for field in fields(self)}
        (path / "scores.json").write_text(json.dumps(rows))

    @staticmethod
    def load(path: Path, shape: Shape) -> "Scores":
        """Load the scores of a teacher of this shape.

        Raises: PlanError if the file holds no scores, or scores of another model.
        """
        file, again = path / "scores.json", f"remove {path} and run the same command to score again"
        rows = read_typed(file, layouts.SCORES, PlanError, way_out=again)
        for dim in ("layers", "hidden", *LAYER_DIMS):
            of_dim = getattr(rows, dim)
            sizes = {len(row) for row in of_dim} if dim in LAYER_DIMS else {len(of_dim)}
            if sizes != {getattr(shape, dim)} or (dim in LAYER_DIMS and len(of_dim) != shape.layers):
                raise PlanError(f"{file}: {dim} has not a score for each of the model's units; {again}")
        return Scores(**{dim: torch.tensor(of_dim, dtype=torch.float64) for dim, of_dim in vars(rows).items()})


def activation_scores(
    statistics: Statistics, shape: Shape, sequence_aggregate: Aggregate = "mean", batch_aggregate: Aggregate = "l2"
) -> Scores:
    """Scores by the size of activations.

    The size of a channel is |a| reduced over the sequence, then over samples. An ffn neuron is a channel of the down
    projection's input. The score of a head is the L2 norm over its head_dim channels of the output projection's input;
    of a kv head, the sum over its query heads; of a hidden channel, the sum over the norms before attention and MLP.

    Paper: P1, "Importance Analysis"; sequence mean with batch l2 is the best of its ablation.
    """

    def channels(site: str) -> Tensor:
        return aggregate(statistics.sums[site], statistics.samples, sequence_aggregate, batch_aggregate)

    per_head = channels("attention_out").unflatten(-1, (shape.heads, shape.head_dim)).square().sum(-1).sqrt()
    return Scores(
        layers=block_influence(statistics),
        hidden=(channels("attention_in") + channels("mlp_in")).sum(0),
        ffn=channels("mlp_out"),
        heads=per_head,
        kv_heads=per_head.unflatten(-1, (shape.kv_heads, shape.group)).sum(-1),
    )


def magnitude_scores(statistics: Statistics, shape: Shape) -> Scores:
    """Scores by the L2 norm of the weights of a unit: a baseline that sees no text.

    The weights of an ffn neuron are its rows of gate and up and its column of down; of a head, its rows of the query
    projection and its columns of the output projection; of a kv head, its rows of key and value and its query heads; of
    a hidden channel, its columns and rows in the matrices of all layers.

    Raises: PlanError if the statistics are of an older version, which did not collect weights.
    """
    missing = {"hidden", *LAYER_DIMS} - statistics.weight_squares.keys()
    if missing:
        raise PlanError(
            f"prune.criterion 'magnitude' needs the norms of weights, and the statistics lack those of "
            f"{', '.join(sorted(missing))}: they were collected by an older version; collect them again with "
            "`minitron calibrate`"
        )
    squares = statistics.weight_squares
    return Scores(
        layers=block_influence(statistics),
        hidden=squares["hidden"].sqrt(),
        ffn=squares["ffn"].sqrt(),
        heads=squares["heads"].sqrt(),
        kv_heads=(squares["kv_heads"] + squares["heads"].unflatten(-1, (shape.kv_heads, shape.group)).sum(-1)).sqrt(),
    )


def random_scores(statistics: Statistics, shape: Shape, seed: int = 0) -> Scores:
    """Random scores: the baseline that every other criterion must beat."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator, dtype=torch.float64)

    per_layer = {dim: draw(shape.layers, getattr(shape, dim)) for dim in LAYER_DIMS}
    return Scores(layers=block_influence(statistics), hidden=draw(shape.hidden), **per_layer)


def block_influence(statistics: Statistics) -> Float[Tensor, " layers"]:
    """1 - the mean cosine between a layer's input and its output; depth.py has other criteria for layers.

    Paper: P1, "Importance Analysis".
    """
    return 1 - statistics.cosine


def even_scores(shape: Shape) -> Scores:
    """Zeros, for a cut that leaves nothing to choose."""
    per_layer = {dim: torch.zeros(shape.layers, getattr(shape, dim), dtype=torch.float64) for dim in LAYER_DIMS}
    flat = {dim: torch.zeros(getattr(shape, dim), dtype=torch.float64) for dim in ("layers", "hidden")}
    return Scores(**flat, **per_layer)


@dataclass(frozen=True)
class Criterion:
    """A row of CRITERIA.

    score: a function from statistics, the teacher's shape and `options` to scores.
    title: the criterion in the words of the report, behind "by".
    options: the keys of the section `prune` that `score` takes as keyword arguments.
    """

    score: Callable[..., Scores]
    title: str
    doc: str
    options: tuple[str, ...] = ()


CRITERIA: dict[str, Criterion] = {
    "activation": Criterion(
        activation_scores,
        "the size of their activations",
        "by the size of their activations on the calibration set",
        options=("sequence_aggregate", "batch_aggregate"),
    ),
    "magnitude": Criterion(magnitude_scores, "the norm of their weights", "by the norm of their weights, a baseline"),
    "random": Criterion(random_scores, "a random draw", "by a draw, a baseline", options=("seed",)),
}
CriterionName = Annotated[str, choice(CRITERIA)]


def criteria_that_take(option: str) -> list[str]:
    """The names of the criteria that take a key of the section `prune`."""
    return [name for name, criterion in CRITERIA.items() if option in criterion.options]


def aggregate(
    sums: Float[Tensor, "layers 3 2 channels"], samples: int, sequence: Aggregate, batch: Aggregate
) -> Float[Tensor, "layers channels"]:
    """One number per channel: the values of the sequence reduction, reduced over samples."""
    total, squares = sums[:, SEQUENCE_AGGREGATES.index(sequence)].unbind(1)
    match batch:
        case "mean":
            return total / samples
        case "l2":
            return squares.sqrt()
        case "variance":
            return squares / samples - (total / samples).square()
