"""The memory that a step is said to take is the memory that torch's allocator hands out in a real step."""

from typing import Any

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile
from trainings import resolved

from minitron.core import parallel
from minitron.core.errors import RunError
from minitron.distillation.config import DistillConfig
from minitron.distillation.memory import StepMemory, step_memory
from minitron.distillation.schedule import Schedule
from minitron.distillation.step import add_gradients, clipped, set_up
from minitron.model.architecture import with_sizes
from minitron.model.checkpoint import Checkpoint, open_checkpoint, planned_checkpoint
from minitron.model.samples import Batch

BLOCK = 32
KINDS: dict[str, dict[str, Any]] = {
    "hidden states, SOAP": {"optimizer": "soap"},
    "logits, AdamW": {"intermediate": "off", "optimizer": "adamw"},
    "several micro-batches": {"micro_batch_tokens": 2 * BLOCK, "optimizer": "soap_light"},
    "activation checkpointing": {"activation_checkpointing": True, "optimizer": "adamw"},
    "stochastic rounding": {"weights": "bfloat16_stochastic", "intermediate": "off"},
    "Kahan summation": {"weights": "bfloat16_kahan"},
    "a teacher that learns": {"correction": "parallel", "optimizer": "adamw"},
}


SIZES = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 16, "vocab_size": 640}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny.checkpoint("llama", tmp_path_factory.mktemp("teacher"), **SIZES))


@pytest.fixture(scope="module")
def student(teacher: Checkpoint) -> Checkpoint:
    return planned_checkpoint(teacher, with_sizes(teacher.shape, hidden=96, ffn=256, layers=3))


def schedule_of(student: Checkpoint, of: Checkpoint, **settings: Any) -> Schedule:
    config = DistillConfig(**({"tokens": 100 * BLOCK, "batch_blocks": 4, "compile": False} | settings))
    found = resolved(config, student.shape, of.shape, block_tokens=BLOCK, train_tokens=100 * BLOCK, repaired=True)
    return Schedule.of_student(found, BLOCK, 0)


def said(student: Checkpoint, of: Checkpoint, *, processes: int = 1, **settings: Any) -> StepMemory:
    schedule = schedule_of(student, of, **settings)
    return step_memory(student, of, schedule, torch.bfloat16, "cpu", processes=processes)


def taken(student: Checkpoint, teacher: Checkpoint, **settings: Any) -> int:
    """The peak of a real third step: what is there before it, and what the allocator reports while it runs."""
    schedule, cpu = schedule_of(student, teacher, **settings), torch.device("cpu")
    learners = set_up(student, teacher, schedule, torch.bfloat16, cpu)
    trained = [parameter for group in learners.optimizer.param_groups for parameter in group["params"]]
    with torch.no_grad():
        for parameter in learners.student.parameters():
            parameter.normal_(std=0.05)  # planned weights have any values
    batch = Batch(tiny.tokens(4, BLOCK))
    micros = [(Batch(part), 1.0) for part in batch.tokens.split(settings.get("micro_batch_tokens", 4096) // BLOCK)]

    def step() -> None:
        learns = learners.learner is not None
        add_gradients(learners, micros, batch.num_predicted, between_weight=1.0, teacher_learns=learns)
        clipped(trained, 1.0)
        learners.optimizer.step()
        learners.optimizer.zero_grad()

    step()
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    state = [value for entries in learners.optimizer.state.values() for value in entries.values()]
    models = (
        [*learners.student.parameters(), *learners.teacher.model.parameters()] if learners.learner is None else trained
    )
    return peak + sum(tensor.numel() * tensor.itemsize for tensor in (*state, *models))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_takes_what_it_is_said_to_take(kind: str, student: Checkpoint, teacher: Checkpoint) -> None:
    found = said(student, teacher, **KINDS[kind])
    assert found.peak == pytest.approx(taken(student, teacher, **KINDS[kind]), rel=0.03)


def test_nothing_is_read_and_larger_models_take_what_their_parameters_say(teacher: Checkpoint) -> None:
    large = planned_checkpoint(teacher, with_sizes(teacher.shape, hidden=4096, ffn=14336, layers=8))
    found = said(large, large, intermediate="off", optimizer="adamw")
    total = large.parameters.total
    assert (found.student, found.teacher) == (4 * total, 2 * total)
    assert found.optimizer == pytest.approx(8 * total, rel=1e-6)  # and a count for each matrix
    assert found.working > 4 * total  # the gradients


def test_shards_divide_what_stays_and_a_process_gathers_layer_by_layer(teacher: Checkpoint) -> None:
    large = planned_checkpoint(teacher, with_sizes(teacher.shape, hidden=1024, ffn=4096, layers=4))
    settings = {"intermediate": "off", "optimizer": "adamw", "batch_blocks": 32}
    alone, shared = said(large, large, **settings), said(large, large, processes=8, **settings)
    assert shared.student == pytest.approx(alone.student / 8, rel=0.01)
    assert shared.optimizer == pytest.approx(alone.optimizer / 8, rel=0.01)
    # Beyond its shards it holds a layer or two whole, in bfloat16.
    layer = large.parameters.non_embedding / large.shape.layers
    gradients = 4 * large.parameters.total / 8
    assert 2 * layer < shared.working - gradients < alone.working
    assert not torch.distributed.is_initialized()


def test_a_recorded_teacher_takes_no_memory(student: Checkpoint, teacher: Checkpoint) -> None:
    online = said(student, teacher, intermediate="off")
    recorded = said(student, teacher, teacher="recorded")
    assert recorded.teacher == 0 and recorded.peak < online.peak


def test_a_process_of_a_job_does_not_plan_for_several() -> None:
    with parallel.pretended(2), pytest.raises(RunError, match="without torchrun"), parallel.pretended(3):
        pass
