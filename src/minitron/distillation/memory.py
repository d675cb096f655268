"""The memory of a training step, by running it on tensors without values."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minitron.core import parallel
from minitron.core.device import DeviceType
from minitron.core.fake_memory import fake_tensors
from minitron.distillation.objective import TeacherOutput, TopK
from minitron.distillation.recording import DEFAULT_TOP_K
from minitron.distillation.schedule import Schedule
from minitron.distillation.step import Learners, add_gradients, blocks_at_once, clipped, set_up
from minitron.distillation.teachers import OnlineTeacher, Teacher
from minitron.model.checkpoint import Checkpoint, ModelConfig, planned_checkpoint
from minitron.model.samples import Batch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepMemory:
    """The bytes that one process of a training holds.

    student, teacher: the weights of the models in memory, or of its shards of them.
    optimizer: the optimizer's state.
    peak: the most at once during a step, with gradients, activations and gathered parameters.
    """

    student: int
    teacher: int
    optimizer: int
    peak: int

    @property
    def working(self) -> int:
        """The bytes that a step takes beyond those that stay from step to step."""
        return self.peak - self.student - self.teacher - self.optimizer


def step_memory(
    student: Checkpoint | ModelConfig,
    teacher: Checkpoint | ModelConfig | None,
    schedule: Schedule,
    dtype: torch.dtype,
    device: DeviceType,
    *,
    processes: int = 1,
) -> StepMemory:
    """Run a training step as `distill` does, on tensors of the real sizes without values, and count its bytes.

    The optimizer has its state already, as in all steps but the first. No weights are read, and a step takes
    seconds whatever the sizes. Documents are not kept apart, and nothing is compiled.

    Args:
        student, teacher: a teacher whose logits are recorded is not in memory.
        dtype: of matrix products.
        device: the type of device that is planned for.
        processes: among which the models are sharded; the memory is that of the first, which has the largest shards.

    Raises: RunError in a process of a job, if it is asked about several processes.
    """
    config = schedule.config.model_copy(update={"compile": False})
    schedule = replace(schedule, config=config)
    recorded = config.teacher == "recorded" and config.objective.needs_teacher
    own = -(-schedule.batch_blocks // processes)
    at_once = min(own, blocks_at_once(config.micro_batch_tokens, schedule.block_tokens))
    taught = planned_checkpoint(student, student.shape)
    teaching = None if recorded or teacher is None else planned_checkpoint(teacher, teacher.shape)
    with parallel.pretended(processes), fake_tensors(device) as counted:
        learners = set_up(taught, teaching, schedule, dtype, CPU)
        if recorded:
            learners = replace(learners, teacher=_recorded(config.top_k or DEFAULT_TOP_K))
        batch = Batch(torch.zeros(at_once, schedule.block_tokens, dtype=torch.int64))
        # The second micro-batch finds the gradients of the first; all others are like it.
        micros = [(batch, 1.0)] * (2 if own > at_once else 1)
        for parameter in learners.trained:
            parameter.grad = torch.zeros_like(parameter)
        learners.optimizer.step()  # makes its state, which a step finds there
        learners.optimizer.zero_grad()
        counted.restart()
        add_gradients(
            learners, micros, batch.num_predicted, between_weight=1.0, teacher_learns=learners.learner is not None
        )
        clipped(learners.trained, config.gradient_clip)
        learners.optimizer.step()
        learners.optimizer.zero_grad()
        state = (value for entries in learners.optimizer.state.values() for value in entries.values())
        return StepMemory(
            student=_bytes(learners.student.parameters()),
            teacher=_bytes(_weights_of(learners)),
            optimizer=_bytes(state),
            peak=counted.peak,
        )


def _weights_of(learners: Learners) -> Iterable[Tensor]:
    """Return the teacher's parameters, where it is in memory."""
    if learners.learner is not None:
        return learners.learner.parameters().values()
    return learners.teacher.model.parameters() if isinstance(learners.teacher, OnlineTeacher) else []


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of this process's shards of tensors; those on the meta device have none here."""
    shards = {id(tensor): parallel.local_shard(tensor) for tensor in tensors if not tensor.is_meta}
    return sum(shard.numel() * shard.itemsize for shard in shards.values())


def _recorded(top_k: int) -> Teacher:
    """Return a teacher whose logits come from a disk."""

    def output(batch: Batch) -> TeacherOutput:
        tokens = batch.targets.numel()
        ids, logs = torch.zeros(tokens, top_k, dtype=torch.int64), torch.zeros(tokens, top_k)
        return TeacherOutput(TopK(ids, logs, torch.zeros(tokens)))

    return output
