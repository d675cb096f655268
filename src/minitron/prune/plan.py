"""A Plan says which units stay, per dim and per layer. Pure functions from scores and a target to a Plan."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from minitron.config import Section
from minitron.errors import PlanError, did_you_mean
from minitron.model.architecture import PRUNABLE, Architecture, Shape, count_terms, with_sizes
from minitron.prune.importance import Aggregate, Scores

Units = tuple[int, ...]


class PruneConfig(Section):
    target: str | None = None
    """Size of the student: `50%` of the teacher's non-embedding parameters, or a total such as `4.5B` or `300M`."""
    shape: dict[str, int] | None = None
    """The student's sizes instead of a target, such as {hidden: 3072, ffn: 9216}; dims not named stay."""
    drop_layers: str | None = None
    """Layers to drop whatever their score, such as `15-30` or `3,7,9-11`, numbered from 0 as in the tensors' names."""
    criterion: Literal["activation"] = "activation"
    """How units are scored."""
    sequence_aggregate: Aggregate = "mean"
    """Reduction of absolute activations over the tokens of a sample; mean is best in P1's ablation."""
    batch_aggregate: Aggregate = "l2"
    """Reduction over samples; l2 is best in P1's ablation."""
    hidden_multiple: int | None = Field(default=None, ge=1)
    """The student's hidden size is a multiple of this. Default by the teacher's size, see `default_multiple`."""
    ffn_multiple: int | None = Field(default=None, ge=1)
    """The student's ffn size is a multiple of this. Default by the teacher's size, see `default_multiple`."""


@dataclass(frozen=True)
class Plan:
    """Which of the teacher's units the student keeps, as sorted indices into the teacher.

    `ffn`, `heads` and `kv_heads` have one tuple per kept layer, in the order of `layers`.
    """

    teacher: Shape
    student: Shape
    layers: Units
    hidden: Units
    ffn: tuple[Units, ...]
    heads: tuple[Units, ...]
    kv_heads: tuple[Units, ...]

    def __str__(self) -> str:
        changes = [
            f"{dim} {getattr(self.teacher, dim)} -> {getattr(self.student, dim)}"
            for dim in PRUNABLE
            if getattr(self.teacher, dim) != getattr(self.student, dim)
        ]
        return ", ".join(changes) or "identity"

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> "Plan":
        """Raises: PlanError if the file is no valid plan."""
        try:
            raw = json.loads(path.read_text())
            plan = Plan(
                teacher=Shape(**raw["teacher"]),
                student=Shape(**raw["student"]),
                layers=tuple(raw["layers"]),
                hidden=tuple(raw["hidden"]),
                **{dim: tuple(tuple(units) for units in raw[dim]) for dim in ("ffn", "heads", "kv_heads")},
            )
            require_consistent(plan)
        except FileNotFoundError:
            raise PlanError(f"plan {path} does not exist") from None
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"{path} is not a plan file: {error}") from None
        return plan


def identity_plan(shape: Shape) -> Plan:
    """The plan that keeps everything."""

    def every(count: int) -> tuple[Units, ...]:
        return (tuple(range(count)),) * shape.layers

    return Plan(
        teacher=shape,
        student=shape,
        layers=tuple(range(shape.layers)),
        hidden=tuple(range(shape.hidden)),
        ffn=every(shape.ffn),
        heads=every(shape.heads),
        kv_heads=every(shape.kv_heads),
    )


def choose(scores: Scores, teacher: Shape, student: Shape, layers: Units | None = None) -> Plan:
    """Keep the highest-scored units of each dim: layers and hidden in one order, the rest layer by layer.

    Query heads are ranked inside their kv group and each group keeps the same number (P1, "Importance Analysis").

    Args:
        layers: the layers to keep, where they are given; None keeps those of the highest score.

    Raises: PlanError if the student's shape cannot be cut from the teacher's.
    """
    require_cuttable(teacher, student)
    layers = _top(scores.layers, student.layers) if layers is None else layers
    kv_heads = tuple(_top(scores.kv_heads[layer], student.kv_heads) for layer in layers)
    return Plan(
        teacher=teacher,
        student=student,
        layers=layers,
        hidden=_top(scores.hidden, student.hidden),
        ffn=tuple(_top(scores.ffn[layer], student.ffn) for layer in layers),
        heads=tuple(
            _top_in_groups(scores.heads[layer], kept, teacher.group, student.group)
            for layer, kept in zip(layers, kv_heads, strict=True)
        ),
        kv_heads=kv_heads,
    )


def require_cuttable(teacher: Shape, student: Shape) -> None:
    """Raises: PlanError naming the first size that pruning cannot reach."""
    for dim in PRUNABLE:
        wanted, have = getattr(student, dim), getattr(teacher, dim)
        if wanted > have:
            raise PlanError(
                f"target {dim}={wanted} is larger than the teacher's {dim}={have}; "
                f"pruning only removes units: lower {dim} in prune.shape"
            )
        if wanted <= 0:
            raise PlanError(f"target {dim}={wanted} leaves nothing: every size must be positive")
    for dim in ("head_dim", "vocab"):
        if getattr(student, dim) != getattr(teacher, dim):
            raise PlanError(f"{dim} cannot change: the teacher has {getattr(teacher, dim)}, keep it")
    if student.heads % student.kv_heads or student.group > teacher.group:
        raise PlanError(
            f"heads={student.heads} with kv_heads={student.kv_heads} cannot be cut from heads={teacher.heads} with "
            f"kv_heads={teacher.kv_heads}: each kept group keeps the same number of its {teacher.group} query heads"
        )


def require_consistent(plan: Plan) -> None:
    """Raises: PlanError if a plan's unit lists do not fit its shapes."""
    require_cuttable(plan.teacher, plan.student)
    _require_units("layers", plan.layers, plan.student.layers, plan.teacher.layers)
    _require_units("hidden", plan.hidden, plan.student.hidden, plan.teacher.hidden)
    for dim in ("ffn", "heads", "kv_heads"):
        per_layer = getattr(plan, dim)
        if len(per_layer) != plan.student.layers:
            raise PlanError(f"plan: {dim} has {len(per_layer)} lists for {plan.student.layers} layers")
        for units in per_layer:
            _require_units(dim, units, getattr(plan.student, dim), getattr(plan.teacher, dim))
    for heads, kv_heads in zip(plan.heads, plan.kv_heads, strict=True):
        groups = [head // plan.teacher.group for head in heads]
        if any(groups.count(group) != plan.student.group for group in kv_heads):
            raise PlanError("plan: each kept kv head must keep the same number of its own query heads")


def parse_target(text: str) -> tuple[Literal["total", "non_embedding"], float]:
    """`50%` -> a share of the non-embedding parameters; `4.5B`, `300M`, `12_000` -> a total count.

    Raises: PlanError if the text is neither.
    """
    match = re.fullmatch(r"([0-9][0-9_]*\.?[0-9]*)\s*([%KMBkmb]?)", text.strip())
    if not match:
        raise PlanError(f"target {text!r} is neither a percentage such as 50% nor a count such as 4.5B or 300M")
    value, unit = float(match[1]), match[2].upper()
    if unit == "%":
        if not 0 < value <= 100:
            raise PlanError(f"target {text!r} must be more than 0% and at most 100%")
        return "non_embedding", value / 100
    return "total", value * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[unit]


def given_layers(prune: PruneConfig, teacher: Shape) -> Units | None:
    """The layers that `drop_layers` keeps; None where the scores decide.

    Raises: PlanError if it is no list of the teacher's layers, or leaves none.
    """
    if prune.drop_layers is None:
        return None
    dropped: set[int] = set()
    for part in prune.drop_layers.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:\s*-\s*([0-9]+))?\s*", part)
        if not match:
            raise PlanError(f"prune.drop_layers {prune.drop_layers!r} is no list of layers such as 15-30 or 3,7,9-11")
        dropped |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not dropped or not dropped < set(range(teacher.layers)):
        raise PlanError(
            f"prune.drop_layers {prune.drop_layers!r} must name some, not all, of the teacher's layers "
            f"0 to {teacher.layers - 1}"
        )
    return tuple(sorted(set(range(teacher.layers)) - dropped))


def target_shape(architecture: Architecture, config: Mapping[str, Any], teacher: Shape, prune: PruneConfig) -> Shape:
    """The student's shape: the explicit one, or the default rule for a parameter target.

    The rule: width first, head_dim fixed. Among hidden sizes of at least half the teacher's and ffn sizes of at
    least a quarter, in their multiples and not above the target, take the pair that shrinks both by the most nearly
    equal ratio while missing the target by little. Only if none fits: halve the query heads of each group, then the
    kv heads, then take layers away, a quarter at a time.

    Raises: PlanError if the target is larger than the teacher or smaller than the rule can reach.
    """
    if (prune.target is None) == (prune.shape is None and prune.drop_layers is None):
        raise PlanError("give either prune.target (such as 50%), or prune.shape and prune.drop_layers, and not both")
    if prune.target is None:
        return _given_shape(architecture, teacher, prune)
    kind, value = parse_target(prune.target)
    have = getattr(architecture.count(teacher, config), kind)
    limit = value * have if kind == "non_embedding" else value
    if limit > have:
        raise PlanError(f"target {prune.target} is larger than the model, which has {have:,} {kind} parameters")
    smallest, terms = have, architecture.parameter_terms(config)
    for candidates in _stages(architecture, teacher, prune):
        counted = [(shape, count_terms(terms, vars(shape), kind=kind)) for shape in candidates]
        smallest = min([smallest, *(count for _, count in counted)])
        fitting = [(_unevenness(teacher, s) + 2 * math.log(limit / c), s) for s, c in counted if c <= limit]
        if fitting:
            return min(fitting, key=lambda pair: pair[0])[1]
    raise PlanError(
        f"target {prune.target} is impossible: the smallest student of the default rule has {smallest:,} of the "
        f"model's {have:,} {kind.replace('_', '-')} parameters; give a larger target, or sizes as prune.shape"
    )


def _given_shape(architecture: Architecture, teacher: Shape, prune: PruneConfig) -> Shape:
    sizes = dict(prune.shape or {})
    unknown = [dim for dim in sizes if dim not in PRUNABLE]
    if unknown:
        raise PlanError(f"prune.shape has unknown dim {unknown[0]!r}{did_you_mean(unknown[0], PRUNABLE)}")
    layers = given_layers(prune, teacher)
    if layers is not None and sizes.setdefault("layers", len(layers)) != len(layers):
        raise PlanError(
            f"prune.drop_layers keeps {len(layers)} layers, but prune.shape wants layers={sizes['layers']}: give one"
        )
    student = with_sizes(teacher, **sizes)
    require_cuttable(teacher, student)
    architecture.require_valid(student)
    return student


def default_multiple(size: int) -> int:
    """Step in which a size shrinks: 256 on large models, where kernels and GGUF's 256-wide blocks need it, 16 or more
    on tiny ones."""
    return next((step for least, step in ((2048, 256), (1024, 128), (512, 64), (256, 32)) if size >= least), 16)


def _stages(architecture: Architecture, teacher: Shape, prune: PruneConfig) -> Iterator[list[Shape]]:
    """Sets of candidate shapes, gentlest first."""
    hidden_multiple = prune.hidden_multiple or default_multiple(teacher.hidden)
    ffn_multiple = prune.ffn_multiple or default_multiple(teacher.ffn)
    for base, least_hidden in _bases(architecture, teacher):
        hidden_sizes = _sizes(teacher.hidden, hidden_multiple, least_hidden)
        narrowed = [shape for hidden in hidden_sizes if (shape := architecture.with_hidden(base, hidden))]
        yield [with_sizes(shape, ffn=ffn) for shape in narrowed for ffn in _sizes(teacher.ffn, ffn_multiple, 0.25)]


def _bases(architecture: Architecture, teacher: Shape) -> Iterator[tuple[Shape, float]]:
    """Shapes to narrow, each with the least share of the hidden size to go down to."""
    yield teacher, 0.5
    narrow = teacher
    if not architecture.heads_fill_hidden:  # else heads go with hidden
        halved = with_sizes(teacher, heads=teacher.kv_heads * max(1, teacher.group // 2))
        yield halved, 0.5
        fewer_kv = max(1, teacher.kv_heads // 2)
        narrow = with_sizes(halved, kv_heads=fewer_kv, heads=fewer_kv * halved.group)
    yield narrow, 0.375
    for quarters in (3, 2, 1):
        yield with_sizes(narrow, layers=max(1, teacher.layers * quarters // 4)), 0.25


def _sizes(size: int, step: int, least: float) -> list[int]:
    return sorted({size, *(n for n in range(step, size, step) if n >= least * size)})


def _unevenness(teacher: Shape, student: Shape) -> float:
    return abs(math.log(student.hidden / teacher.hidden) - math.log(student.ffn / teacher.ffn))


def _top(scores: Tensor, count: int) -> Units:
    """Indices of the `count` highest scores, ascending; ties go to the lower index."""
    return tuple(sorted(scores.sort(descending=True, stable=True).indices[:count].tolist()))


def _top_in_groups(scores: Tensor, groups: Units, size: int, count: int) -> Units:
    return tuple(group * size + head for group in groups for head in _top(scores[group * size :][:size], count))


def _require_units(dim: str, units: Units, count: int, total: int) -> None:
    if len(units) != count or list(units) != sorted(set(units)) or (units and not 0 <= units[0] <= units[-1] < total):
        raise PlanError(f"plan: {dim} must list {count} different indices below {total}, in ascending order")
