"""What is to be timed of a run, and the seconds that are found for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from minitron.core.device import pick_device
from minitron.distillation.config import DistillConfig
from minitron.distillation.schedule import ModelSize, resolve
from minitron.model.architecture import Shape
from minitron.pipeline.probe import WEIGHTS_RMS, Modelled, ProbeSize
from minitron.recipe import Recipe

TrainingKind = Literal["student", "corrected", "scratch"]
# The operations of a timed training step, on a CPU and on a GPU: enough to be longer than what happens around it.
STEP_FLOPS, STEP_FLOPS_ON_GPU = 1e11, 1e13
LEAST_BLOCK = 64


@dataclass(frozen=True)
class Asked:
    """What is to be timed: a recipe whose defaults are resolved, of two models.

    batch_tokens: of a training step, as far as it is known; None where the batch is yet to follow from a speed.
    kinds: the trainings.
    trainings_only: whether nothing else is timed.
    """

    recipe: Recipe
    teacher: Modelled
    student: Modelled
    block_tokens: int
    batch_tokens: int | None
    kinds: tuple[TrainingKind, ...]
    trainings_only: bool = False

    def parameters(self, size: ProbeSize) -> int:
        """Return the parameters of a probe's teacher, of its layers and its head."""
        return size.layers * self.teacher.layer_parameters + size.vocab * self.teacher.shape.hidden

    def timed_block(self, size: ProbeSize) -> int:
        """Return the tokens of a probe's blocks: the run's, where a step of one block is short enough to be timed."""
        flops = STEP_FLOPS if pick_device().type == "cpu" else STEP_FLOPS_ON_GPU
        return min(self.block_tokens, max(LEAST_BLOCK, round(flops / (8 * self.parameters(size)))))


@dataclass(frozen=True)
class TrainingSeconds:
    """The seconds of a training's parts.

    start: loading, and what the first step takes longer than others.
    token: of a training token, forward and backward.
    update: of a step besides its tokens, which is the optimizer's.
    evaluation_block: of a held-out block in an evaluation.
    save: of a state.
    """

    start: float
    token: float
    update: float
    evaluation_block: float
    save: float

    def of(self, config: DistillConfig, block_tokens: int, heldout_blocks: int) -> float:
        """Add up a training whose settings are resolved."""
        assert config.tokens and config.batch_blocks
        assert config.evaluate_steps and config.evaluate_blocks and config.checkpoint_steps
        batch_tokens = config.batch_blocks * block_tokens
        steps = max(1, round(config.tokens / batch_tokens))
        evaluations, saves = (-(-steps // every) for every in (config.evaluate_steps, config.checkpoint_steps))
        return (
            self.start
            + steps * (self.update + batch_tokens * self.token)
            + evaluations * min(config.evaluate_blocks, heldout_blocks) * self.evaluation_block
            + saves * self.save
        )


@dataclass(frozen=True)
class WorkSeconds:
    """The seconds of work other than trainings; None for work that was not timed.

    calibration_start, calibration_token: of a pass that collects statistics, by token.
    lessons_token: of a token whose logits are recorded.
    repair_start, repair_token: of a cut with its repairs, by calibration token.
    load: of a teacher that is read into memory.
    teacher_token, student_token: of a held-out token, of the teacher alone and of a model against the teacher.
    prompt_token: of a token that is generated.
    sampled_step: of a token of each document of those that are sampled together.
    """

    calibration_start: float
    calibration_token: float
    lessons_token: float
    repair_start: float
    repair_token: float
    load: float
    teacher_token: float
    student_token: float
    prompt_token: float
    sampled_step: float


@dataclass(frozen=True)
class GgufSeconds:
    """The seconds of the files of the student: all but their proof, and by held-out block of the proof."""

    start: float
    block: float


@dataclass(frozen=True)
class Timed:
    """The seconds of the parts of a run, of the real models."""

    work: WorkSeconds | None
    trainings: Mapping[str, TrainingSeconds]
    repair_known: bool = True
    gguf: GgufSeconds | None = None


def resolved(recipe: Recipe, teacher: Shape, student: Shape, *, block_tokens: int, tokens: int) -> DistillConfig:
    """Fill in the settings of a recipe's training of so many tokens, on a text that is as long."""
    return resolve(
        recipe.distill.model_copy(update={"tokens": tokens}),
        ModelSize(student, WEIGHTS_RMS),
        ModelSize(teacher, WEIGHTS_RMS),
        block_tokens=block_tokens,
        train_tokens=tokens,
        repaired=bool(recipe.repair.steps),
    )
