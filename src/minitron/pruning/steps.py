"""From statistics to a student: score, plan, cut and repair, at once or in several steps.

The verb `prune`, the stages of a run and the candidates of a search all take this path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import Statistics
from minitron.core.files import scratch_directory, scratch_errors
from minitron.evaluation.tasks.questions import read_questions
from minitron.model.architecture import PRUNABLE, Shape
from minitron.model.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.pruning.config import PruneConfig
from minitron.pruning.cut import cut
from minitron.pruning.depth import LAYER_CRITERIA, by_loss, by_task
from minitron.pruning.given import NOTHING_GIVEN, Given, given_layers
from minitron.pruning.importance import CRITERIA, Scores, even_scores
from minitron.pruning.plan import Plan, choose, compose, needs_scores
from minitron.pruning.repair import REPAIRS, Step, cut_dims, needed_steps
from minitron.pruning.repair.writer import Evidence, Repaired, repaired_cut
from minitron.pruning.target import given_shape, is_given, step_shapes


@dataclass(frozen=True)
class Scoring:
    """How units and layers are scored, and on which data.

    samples: the calibration samples; None where only statistics are read (see `cut_needs`).
    pass_: the settings of passes over the calibration samples.
    tokenizer: the model's tokenizer, for questions by which layers are scored; else None.
    """

    config: PruneConfig
    samples: Samples | None
    pass_: Pass
    tokenizer: Any

    @property
    def calibration(self) -> Samples:
        assert self.samples is not None, "cut_needs says that text is read"
        return self.samples


@dataclass(frozen=True)
class Pruner:
    """Makes students of one teacher by the sections `prune` and `repair` of a recipe.

    repairs: the repair steps, as `resolve_repair` returns them; steps that a cut does not need do nothing.
    statistics: the teacher's statistics; None where neither a choice nor a repair reads them.
    """

    teacher: Checkpoint
    scoring: Scoring
    repairs: Sequence[Step]
    statistics: Statistics | None
    # The scores by the number of layers that stay, on which alone they depend: they may take many passes.
    _scores: dict[int, Scores] = field(default_factory=dict)

    def at(self, scratch: Path) -> "Pruner":
        """The same, with scratch files in another directory."""
        pass_ = replace(self.scoring.pass_, scratch=scratch)
        return replace(self, scoring=replace(self.scoring, pass_=pass_))

    @cached_property
    def unit_scores(self) -> Scores:
        """The scores of units, with the scores of layers that the statistics contain."""
        assert self.statistics is not None, "cut_needs says that statistics are read"
        return score_units(self.statistics, self.teacher.shape, self.scoring.config)

    def score(self, first: Shape) -> Scores:
        """The scores for the first step of the cut, which leaves the shape `first`."""
        if first.layers not in self._scores:
            self._scores[first.layers] = score_layers(self.teacher, self.unit_scores, first, self.scoring)
        return self._scores[first.layers]

    def shapes(self, student: Shape, given: Given = NOTHING_GIVEN) -> list[Shape]:
        """The shape after each step of the cut; the last is the student's."""
        iterations = self.scoring.config.iterations
        return step_shapes(self.teacher.architecture, self.teacher.shape, student, iterations, given)

    def plan(self, student: Shape, given: Given = NOTHING_GIVEN, scores: Scores | None = None) -> Plan:
        """The plan of a student of that shape, made in as many steps as the config asks for.

        Args:
            given: the units that the user lists.
            scores: the scores for the first step, if they are known.
        """
        teacher = self.teacher.shape
        if scores is None and not needs_scores(teacher, student, given):
            return choose(even_scores(teacher), teacher, student, given)
        first, *further = self.shapes(student, given)
        plan = choose(scores or self.score(first), teacher, first, given)
        return refine(self.teacher, plan, further, self.scoring)

    def cut(self, plan: Plan, out: Path) -> Repaired:
        """Write the pruned checkpoint into the existing directory `out`, with the repairs that it needs."""
        if not needed_steps(self.repairs, plan.teacher, plan.student):
            return Repaired(plan, cut(self.teacher, plan, out))
        assert self.statistics is not None
        evidence = Evidence(self.statistics, self.unit_scores, self.scoring.calibration)
        return repaired_cut(self.teacher, plan, out, self.repairs, evidence, self.scoring.pass_)

    def make(self, student: Shape, out: Path) -> Repaired:
        """Plan and cut a student of that shape into the existing directory `out`."""
        return self.cut(self.plan(student), out)


@dataclass(frozen=True)
class Choice:
    """The choices that a cut leaves open, known before anything is scored.

    by_criterion: the dims whose units `prune.criterion` chooses, or which a repair ranks by it.
    layers: whether `prune.layer_criterion` chooses layers.
    steps: the number of steps of the cut.
    repairs: the repair steps that have a cut to repair.
    """

    by_criterion: frozenset[str]
    layers: bool
    steps: int
    repairs: tuple[Step, ...]


@dataclass(frozen=True)
class CutNeeds:
    """The choices that a cut leaves open, and whether it reads statistics and text for them."""

    choice: Choice
    statistics: bool
    text: bool


def choice_left(
    model: Checkpoint | ModelConfig, config: PruneConfig, student: Shape | None, given: Given, steps: Sequence[Step]
) -> Choice:
    """
    Args:
        student: None where the shape is not known yet, so that any dim may be cut.
        given: units that are listed, layers by number among them.
        steps: repairs, such as `resolve_repair` gives.
    """
    teacher = model.shape
    if student is None:
        repairs, cut_steps = list(steps), config.iterations
        open_dims = {dim for dim in PRUNABLE if getattr(given, dim) is None}
    else:
        repairs = needed_steps(steps, teacher, student)
        open_dims = {dim for dim in cut_dims(teacher, student) if getattr(given, dim) is None}
        shapes = step_shapes(model.architecture, teacher, student, config.iterations, given) if open_dims else [student]
        cut_steps = len(shapes)
    chosen_by_repair = {dim for step in repairs for dim in REPAIRS[step].chooses}
    ranked = {dim for step in repairs for dim in REPAIRS[step].ranks}
    return Choice(
        by_criterion=frozenset(open_dims - {"layers"} - chosen_by_repair | ranked),
        layers="layers" in open_dims,
        steps=cut_steps,
        repairs=tuple(repairs),
    )


def wanted(
    teacher: Checkpoint, config: PruneConfig, listed: Plan | Given = NOTHING_GIVEN
) -> tuple[Shape | None, Given]:
    """The student's shape, and the units that the user lists in a plan file, or layers by number in the config.

    The shape is None for `prune.target`, where it depends on the statistics.
    """
    if isinstance(listed, Plan):
        return listed.student, Given(**{dim: getattr(listed, dim) for dim in PRUNABLE})
    if not is_given(config, listed):
        return None, listed
    shape = given_shape(teacher.architecture, teacher.shape, config, listed)
    layers = given_layers(config, teacher.shape).layers
    return shape, listed if layers is None else replace(listed, layers=layers)


def cut_needs(
    teacher: Checkpoint,
    config: PruneConfig,
    student: Shape | None,
    given: Given,
    repairs: Sequence[Step],
    *,
    with_statistics: bool,
) -> CutNeeds:
    """The data that a cut reads, known before anything is read.

    Args:
        with_statistics: whether the teacher's statistics exist already.
    """
    choice = choice_left(teacher, config, student, given, repairs)
    passes = choice.steps > 1 or (choice.layers and LAYER_CRITERIA[config.layer_criterion].needs_a_pass)
    scored = student is None or needs_scores(teacher.shape, student, given)
    return CutNeeds(
        choice,
        statistics=scored or bool(choice.repairs),
        text=bool(choice.repairs) or (scored and (passes or not with_statistics)),
    )


def score_units(statistics: Statistics, shape: Shape, config: PruneConfig) -> Scores:
    """The scores of units by `prune.criterion`, with the scores of layers that the statistics contain."""
    criterion = CRITERIA[config.criterion]
    return criterion.score(statistics, shape, **{option: getattr(config, option) for option in criterion.options})


def layers_need_a_pass(config: PruneConfig, teacher: Shape, student: Shape) -> bool:
    """Whether layers are chosen by scores for which the model must be read once more."""
    by_number = given_layers(config, teacher).layers is not None
    return LAYER_CRITERIA[config.layer_criterion].needs_a_pass and student.layers < teacher.layers and not by_number


def score_layers(checkpoint: Checkpoint, scores: Scores, student: Shape, scoring: Scoring) -> Scores:
    """Replace the scores of layers by scores of `prune.layer_criterion`, for a cut to a student.

    Raises: DataError for a task that cannot be read.
    """
    config, num_layers, pass_ = scoring.config, checkpoint.shape.layers, scoring.pass_
    if not layers_need_a_pass(config, checkpoint.shape, student):
        return scores
    criterion, samples = LAYER_CRITERIA[config.layer_criterion], scoring.calibration
    assert criterion.score is not None
    if criterion.reads == "questions":
        assert config.layer_task is not None
        questions = read_questions(config.layer_task, config.layer_samples)
        measure = by_task(checkpoint, questions, scoring.tokenizer, samples.block_tokens, pass_)
    else:
        measure = by_loss(checkpoint, samples[: config.layer_samples], pass_)
    dropped = [num_layers - student.layers] if criterion.drops else []
    return replace(scores, layers=criterion.score(measure, num_layers, *dropped))


def refine(checkpoint: Checkpoint, plan: Plan, shapes: Sequence[Shape], scoring: Scoring) -> Plan:
    """Extend a plan, the first step of a cut, by a step to each of the shapes; it remains a plan of the checkpoint.

    The model after each step lies in the scratch directory while it is scored.

    Paper: P1, "Single-shot vs Iterative Importance Estimation".
    """
    for shape in shapes:
        scratch = scoring.pass_.scratch
        with scratch_directory(scratch, prefix="minitron-step-") as path:
            with scratch_errors(scratch):
                cut(checkpoint, plan, path)
            left = open_checkpoint(path)
            statistics = measure_statistics(left, scoring.calibration, scoring.pass_)
            scores = score_layers(left, score_units(statistics, left.shape, scoring.config), shape, scoring)
            plan = compose(plan, choose(scores, left.shape, shape))
    return plan
