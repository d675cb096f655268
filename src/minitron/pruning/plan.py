"""A plan says which units stay, in each dim and layer: chosen by scores, or read from a file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from minitron.core.errors import PlanError, did_you_mean
from minitron.core.reading import Json, read_json
from minitron.core.typed_files import as_typed
from minitron.model.architecture import LAYER_DIMS, PRUNABLE, Shape, with_sizes
from minitron.pruning import layouts
from minitron.pruning.given import NOTHING_GIVEN, Given, Units
from minitron.pruning.importance import Scores
from minitron.pruning.target import require_cuttable


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

    def with_units(self, layer: int, units: Mapping[str, Units]) -> "Plan":
        """The plan with other units of some dims in one of the student's layers."""
        ffn, heads, kv_heads = (
            tuple(units.get(dim, own) if number == layer else own for number, own in enumerate(getattr(self, dim)))
            for dim in LAYER_DIMS
        )
        return replace(self, ffn=ffn, heads=heads, kv_heads=kv_heads)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> "Plan":
        """Raises: PlanError if the file is no valid plan."""
        return _whole_plan(_read_plan_file(path), path)


def _read_plan_file(path: Path) -> object:
    if not path.exists() and not path.is_symlink():
        raise PlanError(f"plan {path} does not exist")
    return read_json(path, PlanError)


def _whole_plan(raw: object, path: Path) -> Plan:
    whole = as_typed(raw, layouts.PLAN, str(path), PlanError)
    teacher, student = (Shape(**vars(sizes)) for sizes in (whole.teacher, whole.student))
    ffn, heads, kv_heads = (tuple(map(tuple, getattr(whole, dim))) for dim in LAYER_DIMS)
    plan = Plan(teacher, student, tuple(whole.layers), tuple(whole.hidden), ffn, heads, kv_heads)
    try:
        require_consistent(plan)
    except PlanError as error:
        raise PlanError(f"{path} is not a plan file: {error}") from None
    return plan


def choose(scores: Scores, teacher: Shape, student: Shape, given: Given = NOTHING_GIVEN) -> Plan:
    """Keep the highest-scored units of each dim: layers and hidden in one order, the rest layer by layer.

    Query heads are ranked inside their kv group and each group keeps the same number (P1, "Importance Analysis").

    Args:
        given: the units that stay whatever their score, as many as `student` has.

    Raises: PlanError if the student's shape cannot be cut from the teacher's, or the given units contradict each other.
    """
    require_cuttable(teacher, student)
    layers = _top(scores.layers, student.layers) if given.layers is None else given.layers
    kv_heads = given.of_layers("kv_heads", layers)
    if kv_heads is None:
        kv_heads = tuple(_top(scores.kv_heads[layer], student.kv_heads) for layer in layers)
    heads = given.of_layers("heads", layers)
    if heads is None:
        heads = tuple(
            _top_in_groups(scores.heads[layer], kept, teacher.group, student.group)
            for layer, kept in zip(layers, kv_heads, strict=True)
        )
    ffn = given.of_layers("ffn", layers)
    plan = Plan(
        teacher=teacher,
        student=student,
        layers=layers,
        hidden=_top(scores.hidden, student.hidden) if given.hidden is None else given.hidden,
        ffn=tuple(_top(scores.ffn[layer], student.ffn) for layer in layers) if ffn is None else ffn,
        heads=heads,
        kv_heads=kv_heads,
    )
    require_consistent(plan)
    return plan


def needs_scores(teacher: Shape, student: Shape, given: Given) -> bool:
    """Whether scores decide which units of some dim stay."""
    return any(getattr(teacher, dim) != getattr(student, dim) for dim in PRUNABLE if getattr(given, dim) is None)


def compose(first: Plan, second: Plan) -> Plan:
    """Join two plans, of which the second cuts the student of the first, into one plan of the first one's teacher."""
    assert second.teacher == first.student

    def units(dim: str) -> tuple[Units, ...]:
        lists = (getattr(first, dim)[layer] for layer in second.layers)
        return tuple(tuple(own[unit] for unit in kept) for own, kept in zip(lists, getattr(second, dim), strict=True))

    return Plan(
        teacher=first.teacher,
        student=second.student,
        layers=tuple(first.layers[layer] for layer in second.layers),
        hidden=tuple(first.hidden[channel] for channel in second.hidden),
        ffn=units("ffn"),
        heads=units("heads"),
        kv_heads=units("kv_heads"),
    )


def require_consistent(plan: Plan) -> None:
    """Raises: PlanError if a plan's unit lists do not fit its shapes."""
    require_cuttable(plan.teacher, plan.student)
    _require_units("layers", plan.layers, plan.student.layers, plan.teacher.layers)
    _require_units("hidden", plan.hidden, plan.student.hidden, plan.teacher.hidden)
    for dim in LAYER_DIMS:
        per_layer = getattr(plan, dim)
        if len(per_layer) != plan.student.layers:
            raise PlanError(f"plan: {dim} has {len(per_layer)} lists for {plan.student.layers} layers")
        for units in per_layer:
            _require_units(dim, units, getattr(plan.student, dim), getattr(plan.teacher, dim))
    for heads, kv_heads in zip(plan.heads, plan.kv_heads, strict=True):
        groups = [head // plan.teacher.group for head in heads]
        if any(groups.count(group) != plan.student.group for group in kv_heads):
            raise PlanError("plan: each kept kv head must keep the same number of its own query heads")


def load_given(path: Path, teacher: Shape) -> Plan | Given:
    """Load a plan file, or a file that lists the units of some dims only, such as {"layers": [0, 1, 3]}.

    Where heads are listed and kv heads are not, the kv heads are those of the listed heads.

    Raises: PlanError if the file is neither, or lists units that the teacher does not have.
    """
    raw = _read_plan_file(path)
    if not isinstance(raw, dict) or not raw:
        raise PlanError(f"{path} is not a plan file: it must be an object that lists the units to keep of some dims")
    if raw.keys() & {"teacher", "student"}:
        return _whole_plan(raw, path)
    unknown = [dim for dim in raw if dim not in PRUNABLE]
    if unknown:
        raise PlanError(f"{path} has unknown dim {unknown[0]!r}{did_you_mean(unknown[0], PRUNABLE)}")
    try:
        as_typed(raw, layouts.LISTED_UNITS, str(path), PlanError)
        return _checked(_listed_units(raw), teacher)
    except PlanError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise PlanError(
            f"{where}{error}; layers and hidden are lists of numbers, ffn, heads and kv_heads lists of such lists, "
            "one per layer"
        ) from None


def _listed_units(raw: Json) -> Given:
    ffn, heads, kv_heads = (tuple(map(tuple, raw[dim])) if dim in raw else None for dim in LAYER_DIMS)
    layers, hidden = (tuple(raw[dim]) if dim in raw else None for dim in ("layers", "hidden"))
    return Given(layers, hidden, ffn, heads, kv_heads)


def _checked(given: Given, teacher: Shape) -> Given:
    """Check the listed units, and add the kv heads that follow from the heads."""
    for dim in ("layers", "hidden"):
        units = getattr(given, dim)
        if units is not None:
            _require_units(dim, units, len(units), getattr(teacher, dim))
            require_cuttable(teacher, with_sizes(teacher, **{dim: len(units)}))
    num_lists, whose = (len(given.layers), "kept layer") if given.layers else (teacher.layers, "layer of the teacher")
    for dim in LAYER_DIMS:
        lists = getattr(given, dim)
        if lists is None:
            continue
        if len(lists) != num_lists:
            raise PlanError(f"plan: {dim} has {len(lists)} lists, and needs one for each {whose}, {num_lists}")
        for units in lists:
            _require_units(dim, units, len(lists[0]), getattr(teacher, dim))
    if given.heads is None or given.kv_heads is not None:
        return given
    groups = tuple(tuple(sorted({head // teacher.group for head in heads})) for heads in given.heads)
    if len({len(kept) for kept in groups}) > 1:
        raise PlanError("plan: heads must be of the same number of kv heads in each layer")
    return replace(given, kv_heads=groups)


def _top(scores: Tensor, count: int) -> Units:
    """The indices of the `count` highest scores in ascending order; of equal scores the lower index wins."""
    return tuple(sorted(scores.sort(descending=True, stable=True).indices[:count].tolist()))


def _top_in_groups(scores: Tensor, groups: Units, size: int, count: int) -> Units:
    return tuple(group * size + head for group in groups for head in _top(scores[group * size :][:size], count))


def _require_units(dim: str, units: Units, count: int, total: int) -> None:
    if len(units) != count or list(units) != sorted(set(units)) or (units and not 0 <= units[0] <= units[-1] < total):
        raise PlanError(f"plan: {dim} must list {count} different indices below {total}, in ascending order")
