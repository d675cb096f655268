"""A Plan says which units stay, per dim and per layer. Pure functions from scores and a target to a Plan."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from minitron.calibration.collect import PER_LAYER
from minitron.core.config import Section, UserPath
from minitron.core.errors import PlanError, did_you_mean
from minitron.core.reading import read_json
from minitron.core.typed_files import as_typed
from minitron.model.architecture import PRUNABLE, Architecture, Shape, count_terms, with_sizes
from minitron.pruning import layouts
from minitron.pruning.depth import LAYER_CRITERIA, LayerCriterionName, layer_criteria_that_read
from minitron.pruning.importance import Aggregate, CriterionName, Scores

Units = tuple[int, ...]
WHOSE = ("teacher", "student")


class PruneConfig(Section):
    target: str | None = None
    """Size of the student: `50%` of the teacher's non-embedding parameters, or a total such as `4.5B` or `300M`."""
    shape: dict[str, int] | None = None
    """The student's sizes instead of a target, such as {hidden: 3072, ffn: 9216}; dims not named stay."""
    drop_layers: str | None = None
    """Layers to drop whatever their score, such as `15-30` or `3,7,9-11`, numbered from 0 as in the tensors' names."""
    keep_layers: str | None = None
    """Instead of `drop_layers`, the layers to keep."""
    criterion: CriterionName = "activation"
    """How units other than layers are scored."""
    sequence_aggregate: Aggregate = "mean"
    """Reduction of absolute activations over the tokens of a sample; mean is best in P1's ablation."""
    batch_aggregate: Aggregate = "l2"
    """Reduction over samples; l2 is best in P1's ablation."""
    seed: int = Field(default=0, ge=0)
    """Seed of the criterion `random`; the others have no use for it."""
    layer_criterion: LayerCriterionName = "block_influence"
    """How layers are scored."""
    layer_task: UserPath | None = None
    """For the layer criterion `task`: a .jsonl file of multiple-choice questions, or, where lm-evaluation-harness is
    installed, the name of one of its tasks or a .yaml file of one."""
    layer_samples: int = Field(default=128, ge=1)
    """Calibration blocks on which layers are scored by loss, or questions by task; at most."""
    iterations: int = Field(default=1, ge=1)
    """Steps of the cut, each on scores of what the one before left. More than one gained nothing after retraining
    in P1."""
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
        return _whole(_read(path), path)


def _read(path: Path) -> Any:
    if not path.exists() and not path.is_symlink():
        raise PlanError(f"plan {path} does not exist")
    return read_json(path, PlanError)


def _whole(raw: Any, path: Path) -> Plan:
    """The plan that a whole plan file holds."""
    whole = as_typed(raw, layouts.PLAN, str(path), PlanError)
    teacher, student = (Shape(**vars(sizes)) for sizes in (whole.teacher, whole.student))
    ffn, heads, kv_heads = (tuple(map(tuple, getattr(whole, dim))) for dim in PER_LAYER)
    plan = Plan(teacher, student, tuple(whole.layers), tuple(whole.hidden), ffn, heads, kv_heads)
    try:
        require_consistent(plan)
    except PlanError as error:
        raise PlanError(f"{path} is not a plan file: {error}") from None
    return plan


@dataclass(frozen=True)
class Given:
    """Units to keep whatever their score, as sorted indices into the teacher; None where the scores decide.

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
        """The student's sizes that follow."""
        flat = {dim: units for dim in ("layers", "hidden") if (units := getattr(self, dim)) is not None}
        flat |= {dim: lists[0] for dim in PER_LAYER if (lists := getattr(self, dim)) is not None}
        return {dim: len(units) for dim, units in flat.items()}

    def of_layers(self, dim: str, layers: Units) -> tuple[Units, ...] | None:
        """The lists of an `ffn`, `heads` or `kv_heads` for the layers that are kept."""
        lists = getattr(self, dim)
        return lists if lists is None or self.layers is not None else tuple(lists[layer] for layer in layers)


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


def choose(scores: Scores, teacher: Shape, student: Shape, given: Given = Given()) -> Plan:
    """Keep the highest-scored units of each dim: layers and hidden in one order, the rest layer by layer.

    Query heads are ranked inside their kv group and each group keeps the same number (P1, "Importance Analysis").

    Args:
        given: units that are kept whatever their score, as many as `student` has.

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
    """Whether any choice is left to the scores."""
    return any(getattr(teacher, dim) != getattr(student, dim) for dim in PRUNABLE if getattr(given, dim) is None)


def compose(first: Plan, second: Plan) -> Plan:
    """The plan that cuts at once what `second` cuts from the student of `first`."""
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


def load_given(path: Path, teacher: Shape) -> Plan | Given:
    """A plan file, or one that lists the units of some dims only, such as {"layers": [0, 1, 3]}.

    Where heads are listed and kv heads are not, the kv heads are those of the listed heads.

    Raises: PlanError if the file is neither, or lists what the teacher does not have.
    """
    raw = _read(path)
    if not isinstance(raw, dict) or not raw:
        raise PlanError(f"{path} is not a plan file: it must be an object that lists the units to keep of some dims")
    if raw.keys() & set(WHOSE):
        return _whole(raw, path)
    unknown = [dim for dim in raw if dim not in PRUNABLE]
    if unknown:
        raise PlanError(f"{path} has unknown dim {unknown[0]!r}{did_you_mean(unknown[0], PRUNABLE)}")
    try:
        as_typed(raw, layouts.UNITS, str(path), PlanError)
        units: dict[str, Any] = {dim: tuple(raw[dim]) for dim in ("layers", "hidden") if dim in raw}
        units |= {dim: tuple(map(tuple, raw[dim])) for dim in PER_LAYER if dim in raw}
        return _checked(Given(**units), teacher)
    except PlanError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise PlanError(
            f"{where}{error}; layers and hidden are lists of numbers, ffn, heads and kv_heads lists of such lists, "
            "one per layer"
        ) from None


def _checked(given: Given, teacher: Shape) -> Given:
    """`given` with the kv heads that follow from the heads."""
    for dim in ("layers", "hidden"):
        units = getattr(given, dim)
        if units is not None:
            _require_units(dim, units, len(units), getattr(teacher, dim))
            require_cuttable(teacher, with_sizes(teacher, **{dim: len(units)}))
    num_lists, whose = (len(given.layers), "kept layer") if given.layers else (teacher.layers, "layer of the teacher")
    for dim in PER_LAYER:
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


def given_layers(prune: PruneConfig, teacher: Shape) -> Given:
    """The layers that `drop_layers` or `keep_layers` leave, if either is set.

    Raises: PlanError if that is no list of the teacher's layers, or leaves none, or all.
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
    """The numbers in a text such as `15-30` or `3,7,9-11`: some of the teacher's layers, and not all."""
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


def target_shape(
    architecture: Architecture,
    config: Mapping[str, Any],
    teacher: Shape,
    prune: PruneConfig,
    given: Given = Given(),
) -> Shape:
    """The student's shape: the explicit one, with the sizes of `given`, or the default rule for a parameter target.

    The rule: width first, head_dim fixed. Among hidden sizes of at least half the teacher's and ffn sizes of at
    least a quarter, in their multiples and not above the target, take the pair that shrinks both by the most nearly
    equal ratio while missing the target by little. Only if none fits: halve the query heads of each group, then the
    kv heads, then take layers away, a quarter at a time.

    Raises: PlanError if the target is larger than the teacher or smaller than the rule can reach.
    """
    require_task_fits(prune)
    explicit = bool(prune.shape is not None or prune.drop_layers or prune.keep_layers or given.sizes)
    if (prune.target is not None) == explicit:
        raise PlanError(
            "give either prune.target (such as 50%), or prune.shape and prune.drop_layers (or keep_layers, or a plan "
            "that lists units), and not both"
        )
    if prune.target is None:
        return _given_shape(architecture, teacher, prune, given)
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


def require_task_fits(prune: PruneConfig) -> None:
    """Raises: PlanError for a task without the criterion that reads it, and the other way round."""
    if (LAYER_CRITERIA[prune.layer_criterion].reads == "questions") != (prune.layer_task is not None):
        raise PlanError(
            f"prune.layer_criterion is {prune.layer_criterion!r} and prune.layer_task is {prune.layer_task!r}: "
            f"the criterion {' or '.join(map(repr, layer_criteria_that_read('questions')))} needs a task, and no other "
            "criterion has use for one"
        )


def _given_shape(architecture: Architecture, teacher: Shape, prune: PruneConfig, given: Given) -> Shape:
    sizes = dict(prune.shape or {})
    unknown = [dim for dim in sizes if dim not in PRUNABLE]
    if unknown:
        raise PlanError(f"prune.shape has unknown dim {unknown[0]!r}{did_you_mean(unknown[0], PRUNABLE)}")
    by_number = given_layers(prune, teacher)
    if by_number.layers is not None and given.layers is not None:
        raise PlanError("layers are given twice, as numbers and in the plan file: give one")
    for units, name in (
        (by_number, f"prune.{'keep' if prune.keep_layers else 'drop'}_layers"),
        (given, "the plan file"),
    ):
        for dim, size in units.sizes.items():
            if sizes.setdefault(dim, size) != size:
                raise PlanError(f"{name} keeps {size} {dim}, but prune.shape wants {dim}={sizes[dim]}: give one")
    if given.kv_heads is not None and "heads" not in sizes:
        sizes["heads"] = sizes["kv_heads"] * teacher.group
    student = with_sizes(teacher, **sizes)
    require_cuttable(teacher, student)
    architecture.require_valid(student)
    return student


def step_shapes(
    architecture: Architecture, teacher: Shape, student: Shape, steps: int, given: Given = Given()
) -> list[Shape]:
    """Shapes on the way from the teacher to the student, the student last, in steps of equal size where there are such.

    Layers that are given by number go at once, in the first step. Where the family has no model in between, attention
    and hidden wait for a later step.

    Raises: PlanError if units other than layers are given, and there are several steps.
    """
    if steps > 1 and given.sizes.keys() > {"layers"}:
        raise PlanError("units that a plan file lists are cut at once: give no iterations with them")
    shapes: list[Shape] = []
    start = teacher if given.layers is None else with_sizes(teacher, layers=student.layers)
    for step in range(1, steps):
        before, share = shapes[-1] if shapes else teacher, step / steps

        def between(one: int, other: int, share: float = share) -> int:
            return round(one + share * (other - one))

        kv_heads = between(teacher.kv_heads, student.kv_heads)
        heads = kv_heads * between(teacher.group, student.group)
        multiple = heads if architecture.hidden_multiple_of_heads else 1
        hidden = -(-between(teacher.hidden, student.hidden) // multiple) * multiple
        if architecture.heads_fill_hidden:
            hidden = heads * teacher.head_dim
        ffn = between(teacher.ffn, student.ffn)
        shape = with_sizes(before, layers=between(start.layers, student.layers), ffn=ffn)
        narrower = with_sizes(shape, kv_heads=kv_heads, heads=heads, hidden=hidden)
        if _lies_between(architecture, before, narrower, student):
            shape = narrower
        if shape not in (before, student):
            shapes.append(shape)
    return [*shapes, student]


def _lies_between(architecture: Architecture, larger: Shape, shape: Shape, smaller: Shape) -> bool:
    try:
        architecture.require_valid(shape)
        require_cuttable(larger, shape)
        require_cuttable(shape, smaller)
    except PlanError:
        return False
    return True


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
