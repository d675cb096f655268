"""The sizes that a user gives the student: a target such as 50% or 4.5B, or numbers."""

import re
from typing import Literal

from minitron.core.errors import PlanError, did_you_mean
from minitron.model.architecture import PRUNABLE, Architecture, Shape, with_sizes
from minitron.pruning.config import PruneConfig, require_task_fits
from minitron.pruning.given import NOTHING_GIVEN, Given, given_layers


def require_cuttable(teacher: Shape, student: Shape) -> None:
    """Raises: PlanError that names the first size of the student that pruning cannot reach."""
    for dim in PRUNABLE:
        wanted, have = getattr(student, dim), getattr(teacher, dim)
        if wanted > have:
            raise PlanError(
                f"target {dim}={wanted} is larger than the teacher's {dim}={have}; "
                f"pruning only removes units: lower {dim} in prune.shape"
            )
        if wanted <= 0:
            raise PlanError(f"target {dim}={wanted} leaves nothing: every size must be positive")
    for dim in ("head_dim", "vocab"):
        if getattr(student, dim) != getattr(teacher, dim):
            raise PlanError(f"{dim} cannot change: the teacher has {getattr(teacher, dim)}, keep it")
    if student.heads % student.kv_heads or student.group > teacher.group:
        raise PlanError(
            f"heads={student.heads} with kv_heads={student.kv_heads} cannot be cut from heads={teacher.heads} with "
            f"kv_heads={teacher.kv_heads}: each kept group keeps the same number of its {teacher.group} query heads"
        )


def parse_target(text: str) -> tuple[Literal["total", "non_embedding"], float]:
    """Parse a target: `50%` is a share of the non-embedding parameters; `4.5B`, `300M` and `12_000` are total counts.

    Raises: PlanError if the text is neither.
    """
    match = re.fullmatch(r"([0-9][0-9_]*\.?[0-9]*)\s*([%KMBkmb]?)", text.strip())
    if not match:
        raise PlanError(f"target {text!r} is neither a percentage such as 50% nor a count such as 4.5B or 300M")
    value, unit = float(match[1]), match[2].upper()
    if unit == "%":
        if not 0 < value <= 100:
            raise PlanError(f"target {text!r} must be more than 0% and at most 100%")
        return "non_embedding", value / 100
    return "total", value * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[unit]


def is_given(prune: PruneConfig, given: Given = NOTHING_GIVEN) -> bool:
    """Whether the student's sizes are given, instead of a target for which the shape is searched.

    Raises: PlanError if neither is given, or both.
    """
    require_task_fits(prune)
    sizes = bool(prune.shape is not None or prune.drop_layers or prune.keep_layers or given.sizes)
    if (prune.target is not None) == sizes:
        raise PlanError(
            "give either prune.target (such as 50%), or prune.shape and prune.drop_layers (or keep_layers, or a plan "
            "that lists units), and not both"
        )
    return sizes


def given_shape(architecture: Architecture, teacher: Shape, prune: PruneConfig, given: Given = NOTHING_GIVEN) -> Shape:
    """The student's shape by the sizes of the recipe and of `given`; dims not named stay.

    Raises: PlanError for an unknown dim, a size that is given twice, or one that cannot be cut from the teacher.
    """
    sizes = dict(prune.shape or {})
    unknown = [dim for dim in sizes if dim not in PRUNABLE]
    if unknown:
        raise PlanError(f"prune.shape has unknown dim {unknown[0]!r}{did_you_mean(unknown[0], PRUNABLE)}")
    by_number = given_layers(prune, teacher)
    if by_number.layers is not None and given.layers is not None:
        raise PlanError("layers are given twice, as numbers and in the plan file: give one")
    for units, name in (
        (by_number, f"prune.{'keep' if prune.keep_layers else 'drop'}_layers"),
        (given, "the plan file"),
    ):
        for dim, size in units.sizes.items():
            if sizes.setdefault(dim, size) != size:
                raise PlanError(f"{name} keeps {size} {dim}, but prune.shape wants {dim}={sizes[dim]}: give one")
    if given.kv_heads is not None and "heads" not in sizes:
        sizes["heads"] = sizes["kv_heads"] * teacher.group
    student = with_sizes(teacher, **sizes)
    require_cuttable(teacher, student)
    architecture.require_valid(student)
    return student


def step_shapes(
    architecture: Architecture, teacher: Shape, student: Shape, steps: int, given: Given = NOTHING_GIVEN
) -> list[Shape]:
    """The shapes from the teacher to the student, the student's last, in steps of equal size where the family has them.

    Layers that are given by number are dropped in the first step. Where the family has no model in between, attention
    and hidden are cut in a later step.

    Raises: PlanError if units other than layers are given, and there are several steps.
    """
    if steps > 1 and given.sizes.keys() > {"layers"}:
        raise PlanError("units that a plan file lists are cut at once: give no iterations with them")
    shapes: list[Shape] = []
    start = teacher if given.layers is None else with_sizes(teacher, layers=student.layers)
    for step in range(1, steps):
        before, share = shapes[-1] if shapes else teacher, step / steps

        def between(one: int, other: int, share: float = share) -> int:
            return round(one + share * (other - one))

        kv_heads = between(teacher.kv_heads, student.kv_heads)
        heads = kv_heads * between(teacher.group, student.group)
        multiple = heads if architecture.hidden_multiple_of_heads else 1
        hidden = -(-between(teacher.hidden, student.hidden) // multiple) * multiple
        if architecture.heads_fill_hidden:
            hidden = heads * teacher.head_dim
        ffn = between(teacher.ffn, student.ffn)
        shape = with_sizes(before, layers=between(start.layers, student.layers), ffn=ffn)
        narrower = with_sizes(shape, kv_heads=kv_heads, heads=heads, hidden=hidden)
        if _lies_between(architecture, before, narrower, student):
            shape = narrower
        if shape not in (before, student):
            shapes.append(shape)
    return [*shapes, student]


def _lies_between(architecture: Architecture, larger: Shape, shape: Shape, smaller: Shape) -> bool:
    try:
        architecture.require_valid(shape)
        require_cuttable(larger, shape)
        require_cuttable(shape, smaller)
    except PlanError:
        return False
    return True


def default_multiple(size: int, steps: int) -> int:
    """The step in which a size shrinks: the largest power of two that leaves so many steps, from 32 (16 for sizes below
    512, 4 below 256) to 256, which suits kernels and GGUF's blocks."""
    least = 32 if size >= 512 else 16 if size >= 256 else 4
    return next((step for step in (256, 128, 64, 32, 16, 8) if step >= least and steps * step <= size), least)
