"""The memory of the trainings of a run, and the settings that are changed where it would be too much."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minitron.core import parallel
from minitron.core.device import DeviceType, compute_dtype, free_bytes, pick_device
from minitron.core.errors import RunError
from minitron.core.files import write_json
from minitron.core.progress import SILENT, Listener
from minitron.core.text import both, size
from minitron.core.typed_files import read_typed
from minitron.data.supply import block_length
from minitron.distillation.config import DistillConfig
from minitron.distillation.layouts import FIT, Fit
from minitron.distillation.memory import StepMemory, step_memory
from minitron.distillation.optim import training_bytes
from minitron.distillation.savings import Changes, changed_by_savings, fitted
from minitron.distillation.schedule import Schedule
from minitron.distillation.step import blocks_at_once
from minitron.model.architecture import Architecture, Shape
from minitron.model.checkpoint import Checkpoint, ModelConfig
from minitron.pipeline.asked import resolved
from minitron.recipe import Recipe

# The length of a training whose text decides it: only the optimizer's and the batch's defaults follow from it here.
ASSUMED_TOKENS = 1_000_000_000
# The share of the free memory that a step may take. torch's allocator keeps some of what it was given for later, and
# other programs may want some too.
USABLE = 0.9
# Where a rough sum of a step's bytes is so many times smaller than the memory, no step is run to see that it fits.
FAR_LESS = 4


@dataclass(frozen=True)
class Room:
    """The place that is planned for: the bytes that a step may take in each of so many processes, each on a device."""

    memory: int
    processes: int
    device: DeviceType

    @classmethod
    def here(cls, config: DistillConfig) -> "Room":
        """The room of this job's processes on this machine: the bytes that were given, or those that are free now."""
        ranks, device = parallel.ranks(), pick_device()
        if device.type == "cuda":
            memory = free_bytes(torch.device("cuda", ranks.local_rank))
        else:
            memory = free_bytes(device) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        room = cls(int(USABLE * memory), ranks.size, "cuda" if device.type == "cuda" else "cpu")
        return room.given(config)

    def given(self, config: DistillConfig) -> "Room":
        """Return the room with the bytes that the settings give, if they do."""
        return self if isinstance(config.fit, str) else replace(self, memory=config.fit)


@dataclass(frozen=True)
class Planned:
    """A run whose trainings are planned: a recipe with its defaults, and both models, of which only configs count."""

    recipe: Recipe
    student: Checkpoint | ModelConfig
    teacher: Checkpoint | ModelConfig

    @property
    def block_tokens(self) -> int:
        return block_length(self.recipe.data, self.teacher)

    def config(self, changes: Changes | None = None) -> DistillConfig:
        """Return the settings of the distillation, changed and resolved."""
        distill = self.recipe.distill.model_copy(update=changes)
        return resolved(
            self.recipe.model_copy(update={"distill": distill}),
            self.teacher.shape,
            self.student.shape,
            block_tokens=self.block_tokens,
            tokens=distill.tokens or ASSUMED_TOKENS,
        )


def training_memory(planned: Planned, room: Room, changes: Changes | None = None) -> StepMemory:
    """Return the memory of the student's steps, or of those of a teacher that is corrected before, where it is more."""
    config, seed, block_tokens = planned.config(changes), planned.recipe.seed, planned.block_tokens
    dtype = compute_dtype(config.precision, pick_device())
    if room.device == "cuda" and planned.recipe.distill.precision == "auto":
        dtype = torch.bfloat16
    schedule = Schedule.of_student(config, block_tokens, seed)
    found = step_memory(planned.student, planned.teacher, schedule, dtype, room.device, processes=room.processes)
    if config.correction != "before":
        return found
    own = Schedule.of_correction(config, block_tokens, seed)
    corrected = step_memory(planned.teacher, None, own, dtype, room.device, processes=room.processes)
    return max(found, corrected, key=lambda memory: memory.peak)


def held_bytes(planned: Planned, changes: Changes | None = None) -> int:
    """Return the bytes of weights, gradients and optimizer of all processes together, without activations."""
    config, teacher = planned.config(changes), planned.teacher
    optimizer = config.optimizer_name
    held = training_bytes(*_built(planned.student), optimizer, config.weights)
    if config.correction == "parallel":
        return held + training_bytes(*_built(teacher), optimizer, config.weights)
    if config.objective.needs_teacher and config.teacher == "online":
        held += 2 * teacher.parameters.total
    # A teacher that is corrected before is trained in float32.
    return max(held, training_bytes(*_built(teacher), optimizer, "float32")) if config.correction else held


@dataclass(frozen=True)
class Settled:
    """The memory of a training step, and what was settled for it to fit; `fit` is None where it was not to be."""

    memory: StepMemory
    fit: Fit | None = None


def settle(planned: Planned, room: Room) -> Settled:
    """Find the settings with which the trainings of a run fit; those that the user set stay.

    Raises: RunError if they cannot fit, with the settings that take the least, and what else there is to change.
    """
    asked = training_memory(planned, room)
    fit = Fit(memory=room.memory, processes=room.processes, asked=asked.peak, peak=asked.peak)
    if asked.peak <= room.memory:
        return Settled(asked, fit)
    kept = planned.recipe.distill.model_fields_set
    found, memory = _fitted(planned, room, kept)
    fit = fit.model_copy(update={"peak": memory.peak, "changes": found})
    if memory.peak <= room.memory:
        return Settled(memory, fit)
    each = "" if room.processes == 1 else f" in each of {room.processes} processes"
    tried = f"; with {fit.settings} it still takes {size(memory.peak)}" if found else ""
    raise RunError(
        f"a training step takes {size(asked.peak)}{each}, and {size(room.memory)} may be taken{tried}. "
        f"{_open_settings(planned, room, kept)}Otherwise take more processes or a smaller data.block_tokens, or start "
        "it anyway with distill.fit=off"
    )


def _open_settings(planned: Planned, room: Room, kept: Collection[str]) -> str:
    """Say which of the user's own settings stand in the way of what would fit; nothing where none do."""
    in_the_way = changed_by_savings(planned.config(), planned.block_tokens) & set(kept)
    if not in_the_way:
        return ""
    found, memory = _fitted(planned, room, ())
    if memory.peak > room.memory:
        return ""
    own = both(f"distill.{name}" for name in found if name in in_the_way)
    settings = Fit(memory=room.memory, processes=room.processes, changes=found).settings
    return f"Without {own}, {settings} would fit it into {size(memory.peak)}. "


def _fitted(planned: Planned, room: Room, kept: Collection[str]) -> tuple[dict[str, Any], StepMemory]:
    """Choose the changes that fit, or take the least, and return the memory of a step with them."""
    seen: dict[str, StepMemory] = {}

    def takes(changes: Changes) -> int:
        seen[str(changes)] = training_memory(planned, room, changes)
        return seen[str(changes)].peak

    def at_least(changes: Changes) -> int:
        return held_bytes(planned, changes) // room.processes

    found = fitted(planned.config(), planned.block_tokens, room.memory, takes=takes, at_least=at_least, kept=kept)
    return found, seen[str(found)]


def _rough_bytes(planned: Planned) -> int:
    """Return about as many bytes as one process would take for a step, by a sum that leaves out what is small."""
    config, shapes = planned.config(), (planned.student.shape, planned.teacher.shape)
    tokens = planned.block_tokens * blocks_at_once(config.micro_batch_tokens, planned.block_tokens)
    row = sum(
        shape.layers * (16 * (shape.hidden + shape.ffn) + 8 * shape.heads * (shape.head_dim + planned.block_tokens))
        + 32 * shape.vocab
        for shape in shapes
    )
    heads = sum(12 * shape.vocab * shape.hidden for shape in shapes)
    return held_bytes(planned) + tokens * row + heads


def find_fit(
    config: DistillConfig, file: Path, planned: Callable[[], Planned], listener: Listener = SILENT
) -> Fit | None:
    """Find the settings with which trainings fit: those of `file`, or anew; None where nothing is to be changed.

    It plans for all processes of the job, which only one alone can, before they meet.

    Raises: RunError if they cannot fit, and for a file of another memory.
    """
    if config.fit == "off":
        return None
    known = known_fit(config, file)
    if known is not None:
        return known
    plan, room = planned(), Room.here(config)
    if FAR_LESS * _rough_bytes(plan) <= room.memory:
        return Fit(memory=room.memory, processes=room.processes)
    listener.stage("memory", "running")
    fit = settle(plan, room).fit
    listener.stage("memory", "done")
    if fit is not None and fit.changes:
        listener.warn(str(fit))
    return fit


def known_fit(config: DistillConfig, file: Path) -> Fit | None:
    """Read what an earlier call of the same command has settled; None where there was none.

    Raises: RunError for another memory.
    """
    if not file.exists():
        return None
    found = read_typed(file, FIT, RunError, way_out=f"remove {file.parent} to start again")
    if not isinstance(config.fit, str) and config.fit != found.memory:
        raise RunError(
            f"{file} settled a step for {found.memory} bytes, and distill.fit is {config.fit} now: leave it out, or "
            "choose another --out"
        )
    return found


def agreed_fit(fit: Fit | None) -> Fit | None:
    """Return what the first process has settled, in all of them."""
    found = parallel.agreed(None if fit is None else fit.model_dump())
    return None if found is None else Fit(**found)


def with_fit(config: DistillConfig, fit: Fit) -> DistillConfig:
    """Take over the settings that were changed."""
    return config.model_copy(update=fit.changes)


def keep_fit(fit: Fit | None, file: Path) -> None:
    """Write what was settled, so that the next call of the same command takes it whatever memory is free then.

    Where a step takes far less than there is, nothing was settled.
    """
    if fit is not None and fit.peak is not None and parallel.is_first() and not file.exists():
        write_json(file, fit.model_dump())


def _built(model: Checkpoint | ModelConfig) -> tuple[Architecture, Mapping[str, Any], Shape]:
    return model.architecture, model.config, model.shape
