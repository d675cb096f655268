"""The shapes and the cost of a run, estimated from the teacher's config.json alone: no text or weight is read."""

from dataclasses import asdict, dataclass, replace

from minitron.core.device import compute_dtype, pick_device
from minitron.core.machine import matmul_flops_per_second
from minitron.data.sources import TEACHER
from minitron.data.supply import block_length
from minitron.gguf.source import model_directory
from minitron.model.checkpoint import open_config, planned_checkpoint
from minitron.model.describe import Description, describe, describe_shape, forward_flops
from minitron.pipeline.fit import USABLE, Planned, Room, Settled, held_bytes
from minitron.pipeline.run import resolve_recipe
from minitron.pipeline.stage_seconds import StageSeconds, stage_seconds
from minitron.recipe import Recipe

# Share of a large matrix product's speed that training reaches; measured on small models on a CPU, and an assumption.
UTILISATION = 0.25


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a run is estimated for.

    memory: the bytes of each.
    """

    count: int
    teraflops: float = 989.0  # dense bfloat16 peak of an H100, by its data sheet
    utilisation: float = 0.4  # share of the peak that training reaches: an assumption
    memory: float = 80e9

    @property
    def flops_per_second(self) -> float:
        return self.count * self.teraflops * 1e12 * self.utilisation

    @property
    def room(self) -> Room:
        return Room(int(USABLE * self.memory), self.count, "cuda")


@dataclass(frozen=True)
class Here:
    """The time of a run on this machine.

    flops_per_second: the share `utilisation` of a large matrix product's speed.
    seconds: None where the number of tokens is not known yet.
    """

    flops_per_second: float
    utilisation: float
    seconds: float | None


@dataclass(frozen=True)
class Estimate:
    """The shapes and the cost of a run. Costs of distillation are None where the text decides the number of tokens.

    context: tokens of a block.
    sampled_tokens: training tokens that are sampled from the teacher.
    correction_tokens: tokens that a corrected teacher reads, at most.
    training_bytes: weights, gradients and optimizer of all processes together, without activations.
    settled: the memory of a training step on this machine's device, or on each of the GPUs, and the settings that were
        changed to fit it; None where it was not asked for.
    searched: whether the student's shape is searched for, which takes the statistics; `student` is the largest then.
    gpus: the GPUs of the estimate, with the seconds and the bytes on each.
    stages: the seconds of each stage on this machine, where its work was timed.
    """

    teacher: Description
    student: Description
    context: int
    sampled_tokens: int | None
    calibration_tokens: int
    calibration_flops: int
    distill_tokens: int | None
    teacher_forward_flops_per_token: int
    student_step_flops_per_token: int
    distill_flops: int | None
    correction_tokens: int | None
    correction_flops: int | None
    training_bytes: int
    here: Here
    settled: Settled | None = None
    searched: bool = False
    gpus: Gpus | None = None
    stages: tuple[StageSeconds, ...] = ()

    @property
    def seconds(self) -> float:
        """The seconds of all stages that are known, on this machine."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def flops(self) -> int | None:
        """The operations of all trainings."""
        return None if self.distill_flops is None else self.distill_flops + (self.correction_flops or 0)

    @property
    def seconds_on_gpus(self) -> float | None:
        assert self.gpus is not None
        return None if self.flops is None else self.flops / self.gpus.flops_per_second

    @property
    def bytes_per_gpu(self) -> float:
        assert self.gpus is not None
        return self.training_bytes / self.gpus.count

    def to_dict(self) -> dict[str, object]:
        """Return the estimate as `--dry-run --json` prints it."""
        facts = vars(self) | {"teacher": self.teacher.to_dict(), "student": self.student.to_dict()}
        facts |= {"here": asdict(self.here), "stages": [asdict(stage) for stage in self.stages]}
        del facts["gpus"], facts["settled"]
        settled = self.settled
        facts["memory"] = None if settled is None else asdict(settled.memory)
        facts["fit"] = None if settled is None or settled.fit is None else settled.fit.model_dump()
        if self.gpus is None:
            return facts
        costs = {"seconds": self.seconds_on_gpus, "bytes_per_gpu": self.bytes_per_gpu}
        return facts | {"gpus": asdict(self.gpus) | costs}


def estimate(
    recipe: Recipe, gpus: Gpus | None = None, *, timed: bool = False, settled: Settled | None = None
) -> Estimate:
    """Estimate a run: exact shapes, parameters and bytes of both models, then tokens, operations, time and memory.

    Args:
        recipe: with the settings that were changed for the memory, see `settle_memory`.
        settled: what was found of the memory; it is only passed on.

    With `timed` the work of each stage is done for some seconds on a few layers of the real sizes, and `here` holds the
    speed that the trainings then have; else it is a share of a large matrix product's.

    A training step of the student costs three forward passes: one forward, and two for the gradients of backward; with
    activation checkpointing a fourth, which computes the activations again. So does a step of a teacher that is
    corrected; in parallel, its forward pass is the one that the student learns from.
    """
    teacher = open_config(model_directory(recipe.model, recipe.revision, config_only=True))
    recipe, shape = resolve_recipe(recipe, teacher)
    student = describe_shape(teacher.architecture, teacher.config, shape, teacher.written_dtype)
    block_tokens = block_length(recipe.data, teacher)
    calibration_tokens, tokens = recipe.calibrate.num_samples * block_tokens, recipe.distill.tokens
    forward = forward_flops(teacher.shape, teacher.parameters, block_tokens)
    passes = 4 if recipe.distill.activation_checkpointing else 3
    step = passes * forward_flops(shape, teacher.architecture.count(shape, teacher.config), block_tokens)
    rate = UTILISATION * matmul_flops_per_second(compute_dtype(recipe.distill.precision, pick_device()))
    correction = recipe.distill.correction
    corrected_tokens = (recipe.distill.correction_tokens or tokens) if correction else 0
    corrected_flops = (
        {None: 0, "before": passes, "parallel": passes - 1}[correction] * forward * (corrected_tokens or 0)
    )
    flops = tokens * (forward + step) if tokens else None
    planned = Planned(recipe, planned_checkpoint(teacher, shape), teacher)
    found = Estimate(
        teacher=describe(teacher),
        student=student,
        context=block_tokens,
        sampled_tokens=recipe.data.max_tokens if recipe.data.source == TEACHER else 0,
        calibration_tokens=calibration_tokens,
        calibration_flops=calibration_tokens * forward,
        distill_tokens=tokens,
        teacher_forward_flops_per_token=forward,
        student_step_flops_per_token=step,
        distill_flops=flops,
        correction_tokens=corrected_tokens,
        correction_flops=corrected_flops if flops else None,
        training_bytes=held_bytes(planned),
        here=Here(rate, UTILISATION, (flops + corrected_flops) / rate if flops else None),
        searched=recipe.searches,
        gpus=gpus,
        settled=settled,
    )
    if not timed:
        return found
    stages = tuple(stage_seconds(recipe, teacher, shape))
    return replace(found, stages=stages, here=_as_timed(found, stages))


def _as_timed(found: Estimate, stages: tuple[StageSeconds, ...]) -> Here:
    """Return the speed of the trainings that the stages' seconds are of."""
    trainings = [stage.seconds for stage in stages if stage.name in ("corrected", "student")]
    seconds = sum(one or 0.0 for one in trainings)
    if found.flops is None or not seconds:
        return found.here
    speed = found.flops / seconds
    return Here(speed, found.here.utilisation * speed / found.here.flops_per_second, seconds)
