"""An optimizer step: the models and the optimizer that it needs in memory, and the gradients that it makes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from minitron.core import parallel
from minitron.core.device import sums_device
from minitron.distillation.optim import OPTIMIZERS, OptimizerOptions, make_optimizer, vocabulary_of
from minitron.distillation.schedule import Schedule
from minitron.distillation.student import StudentModule, student_module
from minitron.distillation.teachers import LearningTeacher, Teacher, open_teacher
from minitron.model.checkpoint import Checkpoint
from minitron.model.samples import Batch
from minitron.model.sharded import shard_into


@dataclass(frozen=True)
class Learners:
    """The models of a training on their device, and the optimizer of those that are trained."""

    student: StudentModule
    teacher: Teacher | None
    optimizer: torch.optim.Optimizer
    optimizer_name: str

    @property
    def learner(self) -> LearningTeacher | None:
        """The teacher, where it is trained too."""
        return self.teacher if isinstance(self.teacher, LearningTeacher) else None

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that the optimizer moves, of all models."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def holders(self) -> dict[Tensor, int]:
        """Parameter -> the process that holds its whole state; a parameter that is missing is sharded."""
        return dict(OPTIMIZERS[self.optimizer_name].holders(self.optimizer))


def set_up(
    student: Checkpoint,
    teacher: Checkpoint | None,
    schedule: Schedule,
    dtype: torch.dtype,
    device: torch.device,
    *,
    recording: Path | None = None,
) -> Learners:
    """Load the models of a training, shard them among the processes, and make the optimizer.

    Args:
        teacher: the model in memory; where `recording` is given, its recorded logits teach instead.
        dtype: of matrix products.
    """
    config = schedule.config
    teaching = open_teacher(teacher, recording, student, config, dtype, device)
    module = student_module(student, teacher, schedule, dtype)
    shard_into(module, module.model, module.layers, student, dtype, device)
    module.train()
    trained: dict[str, list[Tensor]] = {"student": [*module.parameters()]}
    vocabulary = vocabulary_of(module.model)
    if isinstance(teaching, LearningTeacher):
        trained["teacher"] = [*teaching.parameters().values()]
        vocabulary += vocabulary_of(teaching.module.model)
    options = OptimizerOptions(config.weights, config.betas, config.weight_decay, dtype, schedule.seed)
    optimizer = make_optimizer(trained, config.optimizer_name, options, vocabulary=vocabulary)
    return Learners(module, teaching, optimizer, config.optimizer_name)


def blocks_at_once(micro_batch_tokens: int, block_tokens: int) -> int:
    """Return the number of blocks in a micro-batch of at most so many tokens, or of one block."""
    return max(1, micro_batch_tokens // block_tokens)


def add_gradients(
    learners: Learners,
    micros: Sequence[tuple[Batch, float]],
    num_predicted: int,
    *,
    between_weight: float,
    teacher_learns: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Float64[Tensor, "3"] | None:
    """Add the gradients of a batch to the parameters'.

    Nothing waits for the device, so that micro-batches follow each other without a pause.

    Args:
        micros: the parts of the batch that this process reads, with the weight of their losses.
        num_predicted: the predicted tokens of the batch, of all processes together.
        between_weight: the weight of the loss on hidden states.
        teacher_learns: whether a teacher that is trained too makes its gradients.
        stop: is asked before each micro-batch but the first, and ends the batch.

    Returns the sums over this process's tokens of the objective, the loss on hidden states and the teacher's loss; or
        None where the batch was ended, which leaves gradients of a part.
    """
    student, teacher, learner = learners.student, learners.teacher, learners.learner if teacher_learns else None
    sums = torch.zeros(3, dtype=torch.float64, device=sums_device(micros[0][0].tokens.device))
    for index, (micro, weight) in enumerate(micros):
        if index > 0 and stop():
            return None
        if learner is None:
            output, read = None if teacher is None else teacher(micro), sums.new_zeros(())
        else:
            output, read = learner.learn(micro, weight, num_predicted)
        objective, between = student(micro, output)
        (weight * (objective + between_weight * between) / num_predicted).backward()
        found = (objective.detach(), between.detach(), read)
        sums += weight * torch.stack([value.to(sums) for value in found])
    return sums


def clipped(parameters: Iterable[Tensor], most: float) -> Float[Tensor, ""]:
    """Scale the gradients down to the norm `most`, where theirs is larger; return their norm before."""
    return parallel.full(torch.nn.utils.clip_grad_norm_(list(parameters), most))
