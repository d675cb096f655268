"""Units that the user names, which stay whatever their score."""

import re
from dataclasses import dataclass

from minitron.core.errors import PlanError
from minitron.model.architecture import LAYER_DIMS, Shape
from minitron.pruning.config import PruneConfig

Units = tuple[int, ...]


@dataclass(frozen=True)
class Given:
    """Units that stay whatever their score, as sorted indices into the teacher; None where the scores decide.

    `ffn`, `heads` and `kv_heads` have one tuple per kept layer where `layers` is given, else one per layer of the
    teacher.
    """

    layers: Units | None = None
    hidden: Units | None = None
    ffn: tuple[Units, ...] | None = None
    heads: tuple[Units, ...] | None = None
    kv_heads: tuple[Units, ...] | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that the student then has."""
        flat = {dim: units for dim in ("layers", "hidden") if (units := getattr(self, dim)) is not None}
        flat |= {dim: lists[0] for dim in LAYER_DIMS if (lists := getattr(self, dim)) is not None}
        return {dim: len(units) for dim, units in flat.items()}

    def of_layers(self, dim: str, layers: Units) -> tuple[Units, ...] | None:
        """The lists of `ffn`, `heads` or `kv_heads` for the layers that stay."""
        lists = getattr(self, dim)
        return lists if lists is None or self.layers is not None else tuple(lists[layer] for layer in layers)


NOTHING_GIVEN = Given()


def given_layers(prune: PruneConfig, teacher: Shape) -> Given:
    """The layers that stay by `drop_layers` or `keep_layers`, where one of them is set.

    Raises: PlanError if it is no list of the teacher's layers, or if none or all would stay.
    """
    if prune.drop_layers is not None and prune.keep_layers is not None:
        raise PlanError("give either prune.drop_layers or prune.keep_layers, and not both")
    every = range(teacher.layers)
    if prune.keep_layers is not None:
        return Given(layers=tuple(sorted(_listed("keep_layers", prune.keep_layers, teacher))))
    if prune.drop_layers is None:
        return Given()
    return Given(layers=tuple(sorted(set(every) - _listed("drop_layers", prune.drop_layers, teacher))))


def _listed(key: str, text: str, teacher: Shape) -> set[int]:
    """Parse a text such as `15-30` or `3,7,9-11`, which must name some, but not all, of the teacher's layers."""
    listed: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:\s*-\s*([0-9]+))?\s*", part)
        if not match:
            raise PlanError(f"prune.{key} {text!r} is no list of layers such as 15-30 or 3,7,9-11")
        listed |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not listed or not listed < set(range(teacher.layers)):
        raise PlanError(
            f"prune.{key} {text!r} must name some, not all, of the teacher's layers 0 to {teacher.layers - 1}"
        )
    return listed
