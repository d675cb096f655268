"""Apply a plan to a checkpoint, some rows at a time: neither the model nor its largest tensor is ever in memory."""

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from minitron.core.direct_io import ahead, buffers
from minitron.core.errors import PlanError
from minitron.core.reading import Json
from minitron.model.architecture import Architecture, Axis, TensorSpec
from minitron.model.checkpoint import Checkpoint
from minitron.model.hub import transformers_config
from minitron.model.weights import runs
from minitron.model.writing import SHARD_BYTES, write_checkpoint
from minitron.pruning.plan import Plan

# The integer type of each width in bytes.
_BITS = {2: torch.int16, 4: torch.int32}


def cut(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, str]:
    """Write the pruned checkpoint into the existing directory `out`: the kept rows and columns, bit by bit.

    Returns the sha256 of each weight file by its name.

    Args:
        changes: functions that change the kept rows of some of the student's tensors, by name, before they are written;
            they keep dtype and shape.

    Raises: PlanError if the plan was made for another shape.
    """
    require_plan_for(checkpoint, plan)
    config = student_config(checkpoint, plan)
    specs = {spec.name: spec for spec in checkpoint.architecture.specs(config, plan.student.layers)}
    sources = dict(zip(specs, sources_of(checkpoint, plan), strict=True))
    changes = _embedding_changes(checkpoint, plan) | dict(changes or {})
    with closing(_pieces(checkpoint, plan, specs, sources, changes)) as pieces:
        return write_checkpoint(
            out,
            config=config,
            tensors={
                name: (checkpoint.stored[sources[name]].written_dtype, spec.shape(plan.student))
                for name, spec in specs.items()
            },
            pieces=pieces,
            carry_from=checkpoint.path,
            shard_bytes=shard_bytes,
        )


def require_plan_for(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raises: PlanError if the plan was made for another shape, or if its student is no model of the family."""
    if plan.teacher != checkpoint.shape:
        raise PlanError(f"the plan is for a teacher of shape {plan.teacher}; {checkpoint.path} has {checkpoint.shape}")
    checkpoint.architecture.require_valid(plan.student)


def student_config(checkpoint: Checkpoint, plan: Plan) -> Json:
    """The student's config.json."""
    config = dict(checkpoint.config)
    if len(plan.layers) < plan.teacher.layers:
        config |= _derived_lists(checkpoint)
    return checkpoint.architecture.config_for(config, plan.student, list(plan.layers))


def _derived_lists(checkpoint: Checkpoint) -> dict[str, list[Any]]:
    """The lists with an entry per layer that config.json leaves out, as transformers derives them from layer numbers.

    The student's layers have other numbers, so its config must contain the lists that the teacher's could leave out.
    """
    missing = [key for key in checkpoint.architecture.per_layer_keys if checkpoint.config.get(key) is None]
    full = transformers_config(checkpoint.config).to_dict() if missing else {}
    return {key: full[key] for key in missing if isinstance(full.get(key), list)}


def embedding_gain(checkpoint: Checkpoint, plan: Plan) -> float:
    """The factor by which the embedding grows to keep its scale where a model multiplies it by sqrt(hidden); else 1.

    Where the embedding is also the output projection, the gains of the final norm are divided by it.
    """
    if not checkpoint.architecture.embedding_times_sqrt_hidden:
        return 1.0
    return math.sqrt(plan.teacher.hidden / plan.student.hidden)


def _embedding_changes(checkpoint: Checkpoint, plan: Plan) -> dict[str, Callable[[Tensor], Tensor]]:
    table = checkpoint.architecture
    gain, offset = embedding_gain(checkpoint, plan), table.norm_gain_offset
    if gain == 1.0:
        return {}
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        table.embedding: lambda rows: (rows.float() * gain).to(rows.dtype)
    }
    if table.tied(checkpoint.config):
        changes[f"{table.final_norm}.weight"] = lambda w: ((offset + w.float()) / gain - offset).to(w.dtype)
    return changes


def cut_tensor(tensor: Tensor, spec: TensorSpec, plan: Plan) -> Tensor:
    """The part of a teacher's tensor that the student keeps, by the spec of the student's tensor."""
    return _take(tensor, [kept_rows(axis, plan, spec.layer) for axis in spec.axes])


def kept_rows(axis: Axis, plan: Plan, layer: int | None) -> Int[Tensor, " kept"]:
    """The indices that stay along one axis of a teacher's tensor, for the student's layer `layer`."""
    parts = []
    offset = 0
    for segment in axis:
        block = segment.size(plan.teacher) // getattr(plan.teacher, segment.unit)
        units = torch.tensor(_kept_units(plan, segment.unit, layer))
        parts.append(offset + (units[:, None] * block + torch.arange(block)).flatten())
        offset += segment.size(plan.teacher)
    return torch.cat(parts)


def _kept_units(plan: Plan, unit: str, layer: int | None) -> tuple[int, ...]:
    if unit in ("ffn", "heads", "kv_heads"):
        assert layer is not None, f"{unit} outside a layer"
        return getattr(plan, unit)[layer]
    return plan.hidden if unit == "hidden" else tuple(range(getattr(plan.teacher, unit)))


def sources_of(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """The names of the teacher's tensors from which the student's are cut, in the order of the student's specs."""
    by_layer: dict[int | None, list[str]] = {}
    for spec in checkpoint.specs():
        by_layer.setdefault(spec.layer, []).append(spec.name)
    return [name for layer in (None, *plan.layers) for name in by_layer[layer]]


def writing_order(architecture: Architecture, specs: list[TensorSpec]) -> list[TensorSpec]:
    """Sort tensors into the order in which a streamed pass can write them: the embedding, the layers, and the rest."""

    def rank(spec: TensorSpec) -> tuple[int, int]:
        if spec.layer is not None:
            return 1, spec.layer
        return (0, 0) if spec.name == architecture.embedding else (2, 0)

    return sorted(specs, key=rank)


def _pieces(
    checkpoint: Checkpoint,
    plan: Plan,
    specs: Mapping[str, TensorSpec],
    sources: Mapping[str, str],
    changes: Mapping[str, Callable[[Tensor], Tensor]],
) -> Generator[Tensor, None, None]:
    """The student's tensors in order, some rows at a time; the next rows are read while these are cut."""
    with closing(ahead(_runs(checkpoint, plan, specs, sources))) as read:
        for name, rows, kept in read:
            piece = _take(rows, kept)
            changed = changes[name](piece) if name in changes else piece
            yield changed.to(checkpoint.stored[sources[name]].written_dtype)


def _runs(
    checkpoint: Checkpoint, plan: Plan, specs: Mapping[str, TensorSpec], sources: Mapping[str, str]
) -> Generator[tuple[str, Tensor, list[Tensor]], None, None]:
    """For each of the student's tensors, its name, rows of the teacher's tensor, and the kept indices on each axis."""
    room = buffers()
    for name, spec in specs.items():
        rows, *columns = (kept_rows(axis, plan, spec.layer) for axis in spec.axes)
        for start, stop in runs(rows, checkpoint.stored[sources[name]].row_bytes):
            first, last = int(rows[start]), int(rows[stop - 1])
            read = checkpoint.read_rows(sources[name], first, last + 1, next(room))
            yield name, read, [rows[start:stop] - first, *columns]


def _take(tensor: Tensor, kept: list[Tensor]) -> Tensor:
    # In numpy, on integers of the same width: for two-byte types torch's index_select has half the speed.
    bits = tensor.view(_BITS[tensor.itemsize]).numpy()
    for axis, indices in enumerate(kept):
        if len(indices) < bits.shape[axis]:
            bits = np.take(bits, indices.numpy(), axis=axis)
    return torch.from_numpy(bits).view(tensor.dtype)
