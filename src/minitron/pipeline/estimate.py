"""The shapes and the cost of a run, estimated from the teacher's config.json alone: no text or weight is read."""

from dataclasses import asdict, dataclass, replace

import torch

from minitron.core.device import DeviceType, compute_dtype, pick_device
from minitron.core.machine import matmul_flops_per_second
from minitron.data.sources import TEACHER
from minitron.data.supply import block_length
from minitron.distillation.memory import StepMemory, step_memory
from minitron.distillation.optim import Optimizer, Weights, training_bytes
from minitron.distillation.schedule import Schedule
from minitron.gguf.source import model_directory
from minitron.model.architecture import Shape
from minitron.model.checkpoint import ModelConfig, open_config, planned_checkpoint
from minitron.model.describe import Description, describe, describe_shape, forward_flops
from minitron.pipeline.run import resolve_recipe
from minitron.pipeline.stage_seconds import StageSeconds, resolved, stage_seconds
from minitron.recipe import Recipe

# Share of a large matrix product's speed that training reaches; measured on small models on a CPU, and an assumption.
UTILISATION = 0.25
# The length of a training whose text decides it: only the optimizer's and the batch's defaults follow from it here.
ASSUMED_TOKENS = 1_000_000_000


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a run is estimated for."""

    count: int
    teraflops: float = 989.0  # dense bfloat16 peak of an H100, by its data sheet
    utilisation: float = 0.4  # share of the peak that training reaches: an assumption

    @property
    def flops_per_second(self) -> float:
        return self.count * self.teraflops * 1e12 * self.utilisation


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
    memory: of a training step on this machine's device, or on each of the GPUs; None where it was not asked for.
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
    memory: StepMemory | None = None
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
        del facts["gpus"]
        facts["memory"] = None if self.memory is None else asdict(self.memory)
        if self.gpus is None:
            return facts
        costs = {"seconds": self.seconds_on_gpus, "bytes_per_gpu": self.bytes_per_gpu}
        return facts | {"gpus": asdict(self.gpus) | costs}


def estimate(recipe: Recipe, gpus: Gpus | None = None, *, timed: bool = False, stepped: bool = False) -> Estimate:
    """Estimate a run: exact shapes, parameters and bytes of both models, then tokens, operations, time and memory.

    With `stepped` a training step is run on tensors without values, which takes seconds, and `memory` holds what it
    would have held: on each of the GPUs, or else on this machine.

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
    # The student in training, and the teacher in bfloat16, or trained as the student is; activations come on top. A
    # teacher that is corrected before is trained in float32.
    distill = resolved(recipe, teacher, shape, tokens) if tokens else recipe.distill
    optimizer, weights = distill.optimizer_name, distill.weights
    held = training_bytes(teacher.architecture, teacher.config, shape, optimizer, weights)
    if correction == "parallel":
        held += _of_teacher(teacher, optimizer, weights)
    else:
        held += 2 * teacher.parameters.total
    if correction == "before":
        held = max(held, _of_teacher(teacher, optimizer, "float32"))
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
        training_bytes=held,
        here=Here(rate, UTILISATION, (flops + corrected_flops) / rate if flops else None),
        searched=recipe.searches,
        gpus=gpus,
    )
    if stepped:
        found = replace(found, memory=_step_memory(recipe, teacher, shape, gpus))
    if not timed:
        return found
    stages = tuple(stage_seconds(recipe, teacher, shape))
    return replace(found, stages=stages, here=_as_timed(found, stages))


def _step_memory(recipe: Recipe, teacher: ModelConfig, shape: Shape, gpus: Gpus | None) -> StepMemory:
    """Return the memory of the student's steps, or of those of a teacher that is corrected before, where it is more."""
    device: DeviceType = "cuda" if gpus is not None or pick_device().type == "cuda" else "cpu"
    dtype = compute_dtype(recipe.distill.precision, pick_device())
    if device == "cuda" and recipe.distill.precision == "auto":
        dtype = torch.bfloat16
    block_tokens = block_length(recipe.data, teacher)
    config = resolved(recipe, teacher, shape, recipe.distill.tokens or ASSUMED_TOKENS)
    processes = 1 if gpus is None else gpus.count
    schedule = Schedule.of_student(config, block_tokens, recipe.seed)
    found = step_memory(planned_checkpoint(teacher, shape), teacher, schedule, dtype, device, processes=processes)
    if config.correction != "before":
        return found
    own = Schedule.of_correction(config, block_tokens, recipe.seed)
    corrected = step_memory(teacher, None, own, dtype, device, processes=processes)
    return max(found, corrected, key=lambda memory: memory.peak)


def _as_timed(found: Estimate, stages: tuple[StageSeconds, ...]) -> Here:
    """Return the speed of the trainings that the stages' seconds are of."""
    trainings = [stage.seconds for stage in stages if stage.name in ("corrected", "student")]
    seconds = sum(one or 0.0 for one in trainings)
    if found.flops is None or not seconds:
        return found.here
    speed = found.flops / seconds
    return Here(speed, found.here.utilisation * speed / found.here.flops_per_second, seconds)


def _of_teacher(teacher: ModelConfig, optimizer: Optimizer, weights: Weights) -> int:
    """Return the memory that training the teacher itself takes."""
    return training_bytes(teacher.architecture, teacher.config, teacher.shape, optimizer, weights)
