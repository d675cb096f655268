"""The steps that repair a cut: the table of them, and which of them a recipe asks for."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated

from torch import Tensor

from minitron.calibration.statistics import Statistics
from minitron.core.config import Section, choice
from minitron.core.errors import PlanError
from minitron.model.architecture import PRUNABLE, Architecture, Shape
from minitron.model.checkpoint import Checkpoint, ModelConfig
from minitron.model.stream import Stream
from minitron.pruning.given import Units
from minitron.pruning.importance import Scores
from minitron.pruning.plan import Plan
from minitron.pruning.repair.columns import (
    Surgeon,
    drop_ffn_one_by_one,
    drop_heads_one_by_one,
    drop_planned_ffn,
    drop_planned_heads,
)
from minitron.pruning.repair.refit import Output, refit_layers, require_direct_writes
from minitron.pruning.repair.residual_basis import Residual, leading_directions, require_basis, scale_of
from minitron.pruning.repair.residual_heads import add_residual_heads


@dataclass(frozen=True)
class Repair:
    """A row of REPAIRS: the cuts that a step makes up for, its words, and the functions that do its work.

    dims: the dims whose cut the step makes up for; the step does nothing where none of them is cut.
    text: the sentences of the report about the step.
    chooses: the dims whose units the step chooses itself, whatever the plan says.
    ranks: the dims whose units the step ranks by their scores.
    excludes: a step that does the same thing in another way.
    without_choice: the step that does the same thing with the plan's units.
    usual: whether the step belongs to the combination that wins after distillation (docs/log).
    columns: the dims whose product is the number of columns that the step solves for; each column needs a calibration
        token at least.
    require: raises PlanError for an architecture, with tied embeddings or without, that cannot have the step.

    `writer.py` calls the functions of the steps that a cut needs:

    residual: makes the student's residual stream, in place of the channels that the plan keeps, from the teacher, the
        plan and the statistics with a second moment.
    norm_scale: the factor of each token for the gains of norms that read the stream, from the states and whether norms
        subtract the mean.
    site: the site of the architecture whose matrix the next two functions change in every layer.
    change: changes a tensor of the teacher before it is cut: from the tensor, the plan, the number of the student's
        layer and the scores.
    remove: removes columns of the matrix at the site, where their inputs were measured: from a Surgeon, the plan and
        the number of the student's layer. Returns the units that it chose, by dim.
    succeeds: whether the matrix at the site takes over what dropped layers right after its own added to the stream.
    second_pass: writes the student once more, from teacher and student side by side; returns the sha256 of each weight
        file.
    """

    dims: tuple[str, ...]
    text: str
    doc: str
    chooses: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()
    excludes: str | None = None
    without_choice: str | None = None
    usual: bool = False
    columns: tuple[str, ...] = ()
    require: Callable[[Architecture, bool], None] = lambda architecture, tied: None
    residual: Callable[[Checkpoint, Plan, Statistics], Residual] | None = None
    norm_scale: Callable[[Residual, Tensor, bool], Tensor] | None = None
    site: str = ""
    change: Callable[[Tensor, Plan, int, Scores], Tensor] | None = None
    remove: Callable[[Surgeon, Plan, int], Mapping[str, Units]] | None = None
    succeeds: bool = False
    second_pass: Callable[[Stream, Stream, Plan, Residual, Output], dict[str, str]] | None = None


REPAIRS: dict[str, Repair] = {
    "norm_gain": Repair(
        ("hidden",),
        "The gains of the norms make up for the hidden channels that were cut off.",
        doc="norms make up for the channels that are cut off",
        excludes="basis",
        norm_scale=scale_of,
    ),
    "basis": Repair(
        ("hidden",),
        "The residual stream keeps its leading directions, combinations of all hidden channels, instead of some of the "
        "channels. The scores of hidden channels chose nothing.",
        doc="the residual stream keeps its leading directions instead of channels",
        chooses=("hidden",),
        excludes="norm_gain",
        columns=("hidden",),
        require=require_basis,
        residual=leading_directions,
        norm_scale=scale_of,
        usual=True,
    ),
    "ffn_least_squares": Repair(
        ("ffn",),
        "The kept FFN neurons take over what the others contributed, by least squares.",
        doc="the kept neurons take over what the others contributed",
        excludes="ffn_obs",
        site="mlp_out",
        columns=("ffn",),
        remove=drop_planned_ffn,
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
        columns=("ffn",),
        remove=drop_ffn_one_by_one,
        usual=True,
    ),
    "heads_least_squares": Repair(
        ("heads",),
        "The kept attention heads take over what the others contributed, by least squares.",
        doc="the kept heads take over what the others contributed",
        excludes="heads_obs",
        site="attention_out",
        columns=("heads", "head_dim"),
        remove=drop_planned_heads,
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
        columns=("heads", "head_dim"),
        remove=drop_heads_one_by_one,
        usual=True,
    ),
    "layers_least_squares": Repair(
        ("layers",),
        "The layer before dropped ones takes over what they added to the residual stream, by least squares.",
        doc="the layer before dropped ones takes over what they added",
        site="mlp_out",
        columns=("ffn",),
        require=require_direct_writes,
        succeeds=True,
        usual=True,
    ),
    "residual_heads": Repair(
        ("heads",),
        "Kept query heads take over what sets them apart from those that their group loses.",
        doc="query heads take over those that their group loses, as in P1",
        ranks=("heads",),
        site="attention_in",
        change=add_residual_heads,
    ),
    "refit": Repair(
        ("layers", "hidden", "ffn", "heads"),
        "Layer by layer, the matrices were fitted again to what the teacher’s give, on the inputs that the pruned "  # noqa: RUF001
        "model gives itself.",
        doc="matrices are fitted again, layer by layer, to what the teacher's give on the pruned model's own inputs",
        require=require_direct_writes,
        second_pass=refit_layers,
    ),
}
Step = Annotated[str, choice(REPAIRS)]
BEST: tuple[Step, ...] = tuple(step for step, repair in REPAIRS.items() if repair.usual)


class RepairConfig(Section):
    steps: list[Step] | None = None
    """Steps that make up for what the cut removes, in any order. Default: `ffn_obs` and `heads_obs`, and where the
    family allows them `basis` and `layers_least_squares`. An empty list is the plain cut of the papers."""


def replaces_channels(steps: Collection[Step] | None) -> bool:
    """Whether a step replaces the channels of the residual stream, which takes the second moment of the statistics."""
    return any(REPAIRS[step].residual is not None for step in steps or ())


def resolve_repair(config: RepairConfig, model: Checkpoint | ModelConfig, given: Collection[str] = ()) -> RepairConfig:
    """Fill in the steps that suit a model, or check the steps that the config names.

    Args:
        given: the dims whose units the user lists, so that no step may choose others.

    Raises: PlanError if the model cannot have a step, or if two steps exclude each other.
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
    """The reason why a model cannot have a step."""
    try:
        REPAIRS[step].require(model.architecture, model.architecture.tied(model.config))
    except PlanError as problem:
        return problem
    return None


def needed_steps(steps: Sequence[Step], teacher: Shape, student: Shape) -> list[Step]:
    """The steps that have a cut to repair."""
    return [step for step in steps if cut_dims(teacher, student) & set(REPAIRS[step].dims)]


def cut_dims(teacher: Shape, student: Shape) -> set[str]:
    """The dims in which the student is smaller."""
    return {dim for dim in PRUNABLE if getattr(student, dim) < getattr(teacher, dim)}


def columns_of(step: Step, teacher: Shape) -> int:
    """The number of columns that a step solves for; 0 for a step that solves for none."""
    dims = REPAIRS[step].columns
    return prod(getattr(teacher, dim) for dim in dims) if dims else 0


def require_enough_tokens(steps: Sequence[Step], teacher: Shape, num_tokens: int) -> None:
    """Raises: PlanError if a step solves for more columns than there are tokens: the solution would be arbitrary."""
    for step in steps:
        columns = columns_of(step, teacher)
        if columns > num_tokens:
            raise PlanError(
                f"repair step {step} solves for {columns:,} columns and needs as many calibration tokens at "
                f"least; there are {num_tokens:,}: raise calibrate.samples or data.block_tokens, or leave {step} out"
            )
