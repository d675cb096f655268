"""A shape for a target that does not depend on statistics: hidden and ffn shrink by nearly equal ratios.

It was minitron's rule for a target at first, so the older results are of it. It is the rule of a benchmark now, whose
runs compare ways of cutting or training one shape.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from minitron.model.architecture import Shape, count_terms, with_sizes
from minitron.model.checkpoint import Checkpoint
from minitron.pruning.target import parse_target


def even_width(model: Checkpoint, target: str, start: Shape | None = None) -> Shape:
    """The pair of hidden and ffn that shrinks both by nearly the same ratio and misses the target by little.

    If no pair fits, it halves the query heads of each group, then the kv heads, and then drops layers.

    Args:
        start: the shape that is cut, and that the target is a share of; the model's by default.
    """
    shape = start or model.shape
    kind, value = parse_target(target)
    terms = model.architecture.parameter_terms(model.config)
    limit = value * (count_terms(terms, vars(shape), kind=kind) if kind == "non_embedding" else 1)
    for base, least in _unnarrowed(model, shape):
        narrowed = [model.architecture.with_hidden(base, hidden) for hidden in _sizes(shape.hidden, least)]
        shapes = [replace(one, ffn=ffn) for one in narrowed if one for ffn in _sizes(shape.ffn, 0.25)]
        counted = [(one, count_terms(terms, vars(one), kind=kind)) for one in shapes]
        fitting = [(_unevenness(shape, one) + 2 * math.log(limit / n), one) for one, n in counted if n <= limit]
        if fitting:
            return min(fitting, key=lambda pair: pair[0])[1]
    raise SystemExit(f"no shape of {shape} fits {target}")


def _unnarrowed(model: Checkpoint, shape: Shape) -> Iterator[tuple[Shape, float]]:
    """Shapes before hidden and ffn are cut, each with the smallest share of the hidden size that may be left."""
    yield shape, 0.5
    narrow = shape
    if not model.architecture.heads_fill_hidden:
        halved = with_sizes(shape, heads=shape.kv_heads * max(1, shape.group // 2))
        yield halved, 0.5
        fewer_kv = max(1, shape.kv_heads // 2)
        narrow = with_sizes(halved, kv_heads=fewer_kv, heads=fewer_kv * halved.group)
    yield narrow, 0.375
    for quarters in (3, 2, 1):
        yield with_sizes(narrow, layers=max(1, shape.layers * quarters // 4)), 0.25


def _sizes(size: int, least: float) -> list[int]:
    step = next((step for big, step in ((2048, 256), (1024, 128), (512, 64), (256, 32)) if size >= big), 16)
    return sorted({size, *(n for n in range(step, size, step) if n >= least * size)})


def _unevenness(teacher: Shape, student: Shape) -> float:
    return abs(math.log(student.hidden / teacher.hidden) - math.log(student.ffn / teacher.ffn))
