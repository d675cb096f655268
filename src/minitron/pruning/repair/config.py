"""The steps that repair a cut: the table of them, which of them a recipe asks for, and what they leave to be chosen.

To add a step: a row of REPAIRS, the work behind it in writer.py, and a row of the tests.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated

from minitron.core.config import Section, choice
from minitron.core.errors import PlanError
from minitron.model.architecture import PRUNABLE, Architecture, Shape
from minitron.model.checkpoint import Checkpoint, ModelConfig
from minitron.pruning.config import PruneConfig
from minitron.pruning.given import Given
from minitron.pruning.plan import Plan
from minitron.pruning.repair.refit import require_refit
from minitron.pruning.repair.residual_basis import require_basis
from minitron.pruning.target import step_shapes


def _require_nothing(architecture: Architecture, tied: bool) -> None:
    pass


def _no_columns(teacher: Shape) -> int:
    return 0


def _ffn_columns(teacher: Shape) -> int:
    return teacher.ffn


def _heads_columns(teacher: Shape) -> int:
    return teacher.heads * teacher.head_dim


@dataclass(frozen=True)
class Repair:
    """A row of REPAIRS.

    dims: the dims whose cut the step makes up for; the step does nothing where none of them is cut.
    text: what the report says that the step did.
    chooses: dims of which the step chooses the units itself, whatever the plan has.
    ranks: dims whose units the step ranks by their scores.
    excludes: a step that does the same thing in another way.
    without_choice: the step that does the same and leaves the plan its units.
    site: the site of the architecture to the products of whose channels the step is fitted.
    directions: whether the student's residual stream holds directions instead of channels, which come from the second
        moment of the teacher's.
    scales: whether the step is fitted to the sizes of what the norms read.
    columns: how many columns the step solves for; each needs a calibration token at least.
    require: raises PlanError for an architecture, with tied embeddings or without, that cannot have the step.
    usual: whether the step belongs to the combination that wins after distillation (docs/log).
    """

    dims: tuple[str, ...]
    text: str
    doc: str
    chooses: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()
    excludes: str | None = None
    without_choice: str | None = None
    site: str | None = None
    directions: bool = False
    scales: bool = False
    columns: Callable[[Shape], int] = _no_columns
    require: Callable[[Architecture, bool], None] = _require_nothing
    usual: bool = False


REPAIRS: dict[str, Repair] = {
    "norm_gain": Repair(
        ("hidden",),
        "The gains of the norms make up for the hidden channels that were cut off.",
        doc="norms make up for the channels that are cut off",
        excludes="basis",
        scales=True,
    ),
    "basis": Repair(
        ("hidden",),
        "The residual stream keeps its leading directions, combinations of all hidden channels, instead of some of the "
        "channels. The scores of hidden channels chose nothing.",
        doc="the residual stream keeps its leading directions instead of channels",
        chooses=("hidden",),
        excludes="norm_gain",
        directions=True,
        scales=True,
        columns=lambda teacher: teacher.hidden,
        require=lambda architecture, tied: require_basis(architecture, tied=tied),
        usual=True,
    ),
    "ffn_least_squares": Repair(
        ("ffn",),
        "The kept FFN neurons take over what the others contributed, by least squares.",
        doc="the kept neurons take over what the others contributed",
        excludes="ffn_obs",
        site="mlp_out",
        columns=_ffn_columns,
    ),
    "ffn_obs": Repair(
        ("ffn",),
        "FFN neurons were dropped one by one, each time the one that the layer’s output misses least, and the kept "  # noqa: RUF001
        "ones take over what the others contributed. The scores had no say in it.",
        doc="the same, and the neurons that are dropped are chosen by what that costs",
        chooses=("ffn",),
        excludes="ffn_least_squares",
        without_choice="ffn_least_squares",
        site="mlp_out",
        columns=_ffn_columns,
        usual=True,
    ),
    "heads_least_squares": Repair(
        ("heads",),
        "The kept attention heads take over what the others contributed, by least squares.",
        doc="the kept heads take over what the others contributed",
        excludes="heads_obs",
        site="attention_out",
        columns=_heads_columns,
    ),
    "heads_obs": Repair(
        ("heads",),
        "Attention heads were dropped one by one, each time the one that the layer’s output misses least, and the "  # noqa: RUF001
        "kept ones take over what the others contributed. The scores had no say in it.",
        doc="the same, and the heads that are dropped are chosen by what that costs",
        chooses=("heads", "kv_heads"),
        excludes="heads_least_squares",
        without_choice="heads_least_squares",
        site="attention_out",
        columns=_heads_columns,
        usual=True,
    ),
    "residual_heads": Repair(
        ("heads",),
        "Kept query heads take over what sets them apart from those that their group loses.",
        doc="query heads take over those that their group loses, as in P1",
        ranks=("heads",),
    ),
    "refit": Repair(
        ("layers", "hidden", "ffn", "heads"),
        "Layer by layer, the matrices were fitted again to what the teacher’s give, on the inputs that the pruned "  # noqa: RUF001
        "model gives itself.",
        doc="matrices are fitted again, layer by layer, to what the teacher's give on the pruned model's own inputs",
        require=lambda architecture, tied: require_refit(architecture),
    ),
}
Step = Annotated[str, choice(REPAIRS)]
BEST: tuple[Step, ...] = tuple(step for step, repair in REPAIRS.items() if repair.usual)


class RepairConfig(Section):
    steps: list[Step] | None = None
    """What to do at the cut against what it loses, in any order. Default: `basis` where the family allows it, `ffn_obs`
    and `heads_obs`. An empty list is the plain cut of the papers."""


def replaces_channels(steps: Collection[Step] | None) -> bool:
    """Whether one of the steps has the residual stream hold directions, which takes the statistics' second moment."""
    return any(REPAIRS[step].directions for step in steps or ())


def resolve_repair(config: RepairConfig, model: Checkpoint | ModelConfig, given: Collection[str] = ()) -> RepairConfig:
    """Fill in the steps that suit a model, or see to it that it can have those that are named.

    Args:
        given: dims whose units are given, so that no step may choose others.

    Raises: PlanError if a step cannot be had, or if two exclude each other.
    """
    given = {*given, "heads"} if "kv_heads" in given else set(given)
    if config.steps is None:
        best = [(step, REPAIRS[step]) for step in BEST]
        steps = [repair.without_choice if given.intersection(repair.chooses) else step for step, repair in best]
        return RepairConfig(steps=[step for step in steps if step and _obstacle(step, model) is None])
    for step, repair in REPAIRS.items():
        if step in config.steps and repair.excludes in config.steps:
            raise PlanError(
                f"repair.steps names both {step} and {repair.excludes}, which do the same thing in two ways: keep one"
            )
    for step in config.steps:
        repair = REPAIRS[step]
        if listed := [dim for dim in repair.chooses if dim in given]:
            other = repair.without_choice
            instead = f"use {other}, which leaves the choice" if other else "leave it out"
            raise PlanError(f"repair step {step} chooses which {listed[0]} stay, but the plan lists them: {instead}")
    for step in config.steps:
        if (problem := _obstacle(step, model)) is not None:
            raise problem
    return config


def _obstacle(step: Step, model: Checkpoint | ModelConfig) -> PlanError | None:
    """Why a model cannot have a step."""
    try:
        REPAIRS[step].require(model.architecture, model.architecture.tied(model.config))
    except PlanError as problem:
        return problem
    return None


def needed_steps(steps: Sequence[Step], plan: Plan) -> list[Step]:
    """Those of the steps that have something to repair."""
    return _needed(steps, plan.teacher, plan.student)


def _needed(steps: Sequence[Step], teacher: Shape, student: Shape) -> list[Step]:
    return [step for step in steps if _cut_dims(teacher, student) & set(REPAIRS[step].dims)]


def _cut_dims(teacher: Shape, student: Shape) -> set[str]:
    return {dim for dim in PRUNABLE if getattr(student, dim) < getattr(teacher, dim)}


@dataclass(frozen=True)
class Choice:
    """What a cut leaves to be chosen, known before anything is scored.

    by_criterion: dims with units that `prune.criterion` chooses, or that a repair ranks by it.
    layers: whether layers are chosen by `prune.layer_criterion`.
    steps: of the cut.
    repairs: those that have something to repair.
    """

    by_criterion: frozenset[str]
    layers: bool
    steps: int
    repairs: tuple[Step, ...]


@dataclass(frozen=True)
class CutNeeds:
    """What a cut reads, known before it is read, and what it leaves to be chosen by that."""

    choice: Choice
    statistics: bool
    text: bool


def choice_left(
    architecture: Architecture, config: PruneConfig, teacher: Shape, student: Shape, given: Given, steps: Sequence[Step]
) -> Choice:
    """
    Args:
        given: units that are listed, layers by number among them.
        steps: repairs, such as `resolve_repair` gives.
    """
    repairs = _needed(steps, teacher, student)
    open_dims = {dim for dim in _cut_dims(teacher, student) if getattr(given, dim) is None}
    chosen_by_repair = {dim for step in repairs for dim in REPAIRS[step].chooses}
    ranked = {dim for step in repairs for dim in REPAIRS[step].ranks}
    return Choice(
        by_criterion=frozenset(open_dims - {"layers"} - chosen_by_repair | ranked),
        layers="layers" in open_dims,
        steps=len(step_shapes(architecture, teacher, student, config.iterations, given)) if open_dims else 1,
        repairs=tuple(repairs),
    )


def require_enough_tokens(steps: Sequence[Step], plan: Plan, num_tokens: int) -> None:
    """Raises: PlanError if there are fewer tokens than columns to solve for: the solution would be arbitrary."""
    for step in steps:
        columns = REPAIRS[step].columns(plan.teacher)
        if columns > num_tokens:
            raise PlanError(
                f"repair step {step} solves for {columns:,} columns and needs as many calibration tokens at "
                f"least; there are {num_tokens:,}: raise calibrate.samples or data.block_tokens, or leave {step} out"
            )
