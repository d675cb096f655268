"""Apply a Plan to a checkpoint, tensor by tensor; the model is never in memory."""

from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from minitron.errors import PlanError
from minitron.model.architecture import Axis, TensorSpec
from minitron.model.checkpoint import SHARD_BYTES, Checkpoint, write_checkpoint
from minitron.prune.plan import Plan


def cut(checkpoint: Checkpoint, plan: Plan, out: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the pruned checkpoint into the existing directory `out`: kept rows and columns, unchanged bits.

    Raises: PlanError if the plan was made for another shape.
    """
    if plan.teacher != checkpoint.shape:
        raise PlanError(f"the plan is for a teacher of shape {plan.teacher}; {checkpoint.path} has {checkpoint.shape}")
    architecture = checkpoint.architecture
    architecture.require_valid(plan.student)
    config = architecture.config_for(checkpoint.config, plan.student, list(plan.layers))
    specs = {spec.name: spec for spec in architecture.specs(config, plan.student.layers)}
    sources = dict(zip(specs, _sources(checkpoint, plan), strict=True))
    write_checkpoint(
        out,
        config=config,
        tensors={
            name: (checkpoint.stored[sources[name]].dtype, spec.shape(plan.student)) for name, spec in specs.items()
        },
        read=lambda name: cut_tensor(checkpoint.read(sources[name]), specs[name], plan),
        carry_from=checkpoint.path,
        shard_bytes=shard_bytes,
    )


def cut_tensor(tensor: Tensor, spec: TensorSpec, plan: Plan) -> Tensor:
    """The part of one of the teacher's tensors that the student keeps; `spec` is the student's."""
    for dim, axis in enumerate(spec.axes):
        rows = kept_rows(axis, plan, spec.layer)
        if len(rows) < tensor.shape[dim]:
            tensor = tensor.index_select(dim, rows)
    return tensor


def kept_rows(axis: Axis, plan: Plan, layer: int | None) -> Int[Tensor, " kept"]:
    """Indices along one axis of a teacher's tensor that stay, for the student's layer `layer`."""
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


def _sources(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """The teacher's tensor behind each of the student's, in the order of the student's specs."""
    by_layer: dict[int | None, list[str]] = {}
    for spec in checkpoint.specs():
        by_layer.setdefault(spec.layer, []).append(spec.name)
    return [name for layer in (None, *plan.layers) for name in by_layer[layer]]
