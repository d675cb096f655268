"""Scores as the recipe asks for them, and a cut in steps, each on scores of what the one before left."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from minitron.calibration.collect import CalibrateConfig, Statistics, calibrate, pass_options
from minitron.core.files import scratch_directory, scratch_errors
from minitron.evaluation.tasks.questions import read_questions
from minitron.model.architecture import Shape
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.samples import Separator
from minitron.pruning.cut import cut
from minitron.pruning.depth import LAYER_CRITERIA, by_loss, by_task
from minitron.pruning.importance import CRITERIA, Scores
from minitron.pruning.plan import Given, Plan, PruneConfig, choose, compose, given_layers, step_shapes


@dataclass(frozen=True)
class Scoring:
    """How units and layers are scored, and on what.

    tokens: the calibration set.
    separator: tells documents apart that are to be kept so in a sample.
    scratch: an existing directory for what does not fit into memory; default the system's.
    progress: called with (layers done, layers).
    """

    config: PruneConfig
    calibrate: CalibrateConfig
    tokens: Int[Tensor, "samples tokens"]
    tokenizer: Any
    scratch: Path | None = None
    separator: Separator | None = None
    progress: Callable[[int, int], None] = lambda done, total: None

    @property
    def pass_options(self) -> dict[str, Any]:
        """Of a pass over the tokens."""
        return pass_options(self.calibrate, scratch=self.scratch, separator=self.separator, progress=self.progress)


def score_units(statistics: Statistics, shape: Shape, config: PruneConfig) -> Scores:
    criterion = CRITERIA[config.criterion]
    return criterion.score(statistics, shape, **{option: getattr(config, option) for option in criterion.options})


def layers_need_a_pass(config: PruneConfig, teacher: Shape, student: Shape) -> bool:
    """Whether layers are to be chosen by scores that the statistics do not hold."""
    by_number = given_layers(config, teacher).layers is not None
    return LAYER_CRITERIA[config.layer_criterion].needs_a_pass and student.layers < teacher.layers and not by_number


def score_layers(checkpoint: Checkpoint, scores: Scores, student: Shape, scoring: Scoring) -> Scores:
    """`scores` with those of the layers by `prune.layer_criterion`, to cut the checkpoint to a student.

    Raises: DataError for a task that cannot be read.
    """
    config, num_layers = scoring.config, checkpoint.shape.layers
    criterion = LAYER_CRITERIA[config.layer_criterion]
    if not layers_need_a_pass(config, checkpoint.shape, student):
        return scores
    assert criterion.score is not None
    if criterion.reads == "questions":
        assert config.layer_task is not None
        questions = read_questions(config.layer_task, config.layer_samples)
        max_tokens = scoring.tokens.shape[1]
        options = scoring.pass_options | {"separator": None}  # a question is one document
        measure = by_task(checkpoint, questions, scoring.tokenizer, max_tokens, **options)
    else:
        measure = by_loss(checkpoint, scoring.tokens[: config.layer_samples], **scoring.pass_options)
    dropped = [num_layers - student.layers] if criterion.drops else []
    return replace(scores, layers=criterion.score(measure, num_layers, *dropped))


def plan_student(
    checkpoint: Checkpoint,
    score: Callable[[Shape], Scores],
    student: Shape,
    scoring: Scoring,
    given: Given,
) -> Plan:
    """The plan of one student as the config asks for it: in as many steps as it says, and layers by their criterion.

    Args:
        score: the scores to cut the checkpoint to a shape by, such as `score_layers` gives.
        given: units that are listed.
    """
    iterations = scoring.config.iterations
    first, *further = step_shapes(checkpoint.architecture, checkpoint.shape, student, iterations, given)
    return refine(checkpoint, choose(score(first), checkpoint.shape, first, given), further, scoring)


def refine(checkpoint: Checkpoint, plan: Plan, shapes: Sequence[Shape], scoring: Scoring) -> Plan:
    """`plan`, a first step, followed by one step to each of the shapes; still a plan of the checkpoint itself.

    The model that each step left lies in `scoring.scratch` while it is scored.

    Paper: P1, "Single-shot vs Iterative Importance Estimation".
    """
    for shape in shapes:
        with scratch_directory(scoring.scratch, prefix="minitron-step-") as path:
            with scratch_errors(scoring.scratch):
                cut(checkpoint, plan, path)
            left = open_checkpoint(path)
            statistics = calibrate(left, scoring.tokens, **scoring.pass_options)
            scores = score_layers(left, score_units(statistics, left.shape, scoring.config), shape, scoring)
            plan = compose(plan, choose(scores, left.shape, shape))
    return plan
