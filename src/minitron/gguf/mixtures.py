"""A mixture of minitron's own: the type of every matrix, chosen to lose least under a size.

The error of a matrix's outputs, weighted by the importance matrix, tells what a type does to the matrix; the KL
divergence with only this matrix quantized tells what that does to the model. Small errors of several matrices nearly
add up, so their sum is minimised under the size: a knapsack with one choice for each matrix, filled in the order of the
gain per byte.

The effect of an error is measured for two kinds of types, with a smallest value in each block and without. Where the
weights come from a quantized model and were trained on, a type of its kind rounds them back to where they began: the
error is small, and all of it is what was learnt.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as BlockType
from jaxtyping import Float, Int
from torch import Tensor

from minitron.core.errors import GgufError
from minitron.core.text import size
from minitron.gguf.config import GGUF_TYPES
from minitron.gguf.file import PLAIN, GgufModel, GgufTensor, tensor_bytes, weights_bytes
from minitron.gguf.imatrix import ImportanceMatrix
from minitron.gguf.llama_cpp import llama_cpp
from minitron.gguf.types import NEED_IMPORTANCE, Mixture
from minitron.gguf.verify import logits_of
from minitron.model.checkpoint import load_model
from minitron.model.quality_sums import divergence
from minitron.model.samples import Batch

# The types that a matrix may get, as far as its columns make whole blocks of 256 weights, of 32, or of one.
CHOICES = tuple(
    BlockType[name]
    for name in (
        *("IQ2_XXS", "IQ2_XS", "Q2_K", "IQ2_S", "IQ3_XXS", "Q3_K", "IQ3_S", "IQ4_XS", "IQ4_NL"),
        *("Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "F16"),
    )
)
# Types with a smallest value in each block of weights, not only a scale.
WITH_MINIMUM = frozenset(BlockType[name] for name in ("Q2_K", "Q4_1", "Q4_K", "Q5_1", "Q5_K"))
ERROR_ROWS = 256  # rows of each matrix to measure its errors on
SAMPLE_BLOCKS = 8  # blocks of text to measure the effect of errors on


@dataclass(frozen=True)
class Damage:
    """What each type would do to each matrix.

    errors: matrix -> type -> weighted squared error of the outputs, as a share of their squares.
    effect: matrix -> KL in nats a token for each unit of that error, by whether the type has a smallest value.
    """

    errors: Mapping[str, Mapping[BlockType, float]]
    effect: Mapping[str, Mapping[bool, float]]

    def of(self, name: str, kind: BlockType) -> float:
        return self.errors[name][kind] * self.effect[name][kind in WITH_MINIMUM]


def measure_damage(
    model: GgufModel,
    importance: ImportanceMatrix,
    blocks: Int[Tensor, "blocks tokens"],
    *,
    near: BlockType,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Damage:
    """Measure what quantizing does, matrix by matrix.

    Args:
        blocks: text to measure the effect on.
        near: a type about as small as most of the file will be, at which the effect is measured.
    """
    count = threads or os.cpu_count() or 1
    matrices = [tensor for tensor in model.tensors if tensor.is_matrix]
    loaded = load_model(model.checkpoint.path, torch.float32)
    batches = Batch(blocks).split(1)
    wanted = [logits_of(loaded, batch).log_softmax(-1) for batch in batches]
    errors: dict[str, dict[BlockType, float]] = {}
    effect: dict[str, dict[bool, float]] = {}
    with ThreadPoolExecutor(count) as pool:

        def rounded(tensor: GgufTensor, rows: Float[Tensor, "rows columns"], kind: BlockType) -> Tensor:
            if kind in PLAIN:
                return rows.to(PLAIN[kind]).float()
            stored = llama_cpp().quantize(
                kind, rows, tensor_bytes(tuple(rows.shape), kind), importance.of(tensor.name), pool, count
            )
            return torch.from_numpy(gguf.quants.dequantize(stored.view(len(rows), -1).numpy(), kind))

        for number, tensor in enumerate(matrices):
            weights = importance.of(tensor.name)
            weights = torch.ones(tensor.shape[1]) if weights is None else weights
            every = max(1, tensor.shape[0] // ERROR_ROWS)
            whole = torch.cat(list(model.runs(tensor)))
            rows = whole[::every].contiguous()
            total = (rows.square() @ weights).sum()
            errors[tensor.name] = {
                kind: (((rounded(tensor, rows, kind) - rows).square() @ weights).sum() / total).item()
                for kind in _choices(tensor, tensor.name in importance.sums)
            }
            effect[tensor.name] = {}
            for with_minimum in (False, True):
                kinds = [kind for kind in errors[tensor.name] if (kind in WITH_MINIMUM) == with_minimum]
                if not kinds:  # as of rows that make no whole blocks of any such type
                    continue
                changed = rounded(tensor, whole, _nearest(near, kinds))
                error = (((changed - whole).square() @ weights).sum() / (whole.square() @ weights).sum()).item()
                with _changed(loaded, model, tensor, changed - whole):
                    kl = sum(
                        divergence(p, logits_of(loaded, batch).log_softmax(-1)).mean().item()
                        for p, batch in zip(wanted, batches, strict=True)
                    )
                effect[tensor.name][with_minimum] = kl / len(blocks) / error
            progress(number + 1, len(matrices))
    return Damage(errors, effect)


def smallest_mixture(model: GgufModel, fixed: Mapping[str, BlockType]) -> Mixture:
    """Choose the smallest types that the matrices can have with an importance matrix of the layers' matrices.

    Args:
        fixed: the types of matrices that leave no choice.
    """
    types = {tensor.name: BlockType.F32 for tensor in model.tensors}
    for tensor in model.tensors:
        if tensor.is_matrix and tensor.name not in fixed:
            types[tensor.name] = min(
                _choices(tensor, tensor.layer >= 0), key=lambda kind: tensor_bytes(tensor.shape, kind)
            )
    return Mixture("", {**types, **fixed}, {})


def best_mixture(model: GgufModel, damage: Damage, most_bytes: int, fixed: Mapping[str, BlockType]) -> Mixture:
    """Choose the types of least damage whose tensors have at most `most_bytes`.

    Args:
        fixed: the types of matrices that leave no choice.

    Raises: GgufError if no types are so small.
    """
    matrices = {tensor.name: tensor for tensor in model.tensors if tensor.is_matrix}
    options = {name: [kind] for name, kind in fixed.items()} | {
        name: _hull({kind: (tensor_bytes(tensor.shape, kind), damage.of(name, kind)) for kind in damage.errors[name]})
        for name, tensor in matrices.items()
        if name not in fixed
    }
    chosen = {name: steps[0] for name, steps in options.items()}

    def made() -> Mixture:
        types = {tensor.name: chosen.get(tensor.name, BlockType.F32) for tensor in model.tensors}
        return Mixture(_label(types, matrices), types, {})

    smallest = weights_bytes(model, made().types)
    if smallest > most_bytes:
        raise GgufError(f"no types make tensors of {size(most_bytes)}; the smallest have {size(smallest)}")
    # The steps up each matrix's hull, in the order of the gain per byte, as long as the next step fits.
    room = most_bytes - smallest
    steps = []
    for name, hull in options.items():
        for low, high in pairwise(hull):
            cost = tensor_bytes(matrices[name].shape, high) - tensor_bytes(matrices[name].shape, low)
            steps.append(((damage.of(name, low) - damage.of(name, high)) / cost, name, high, cost))
    full = set()
    for _, name, high, cost in sorted(steps, reverse=True):
        if name in full or cost > room:
            full.add(name)
            continue
        chosen[name], room = high, room - cost
    return made()


def _hull(points: Mapping[BlockType, tuple[int, float]]) -> list[BlockType]:
    """The types that are best at some price of a byte, by rising size."""
    hull: list[BlockType] = []
    for kind in sorted(points, key=lambda kind: points[kind]):
        if hull and points[kind][1] >= points[hull[-1]][1]:
            continue
        while hull and points[hull[-1]][0] == points[kind][0]:
            hull.pop()
        while len(hull) > 1 and _slope(points, hull[-2], hull[-1]) <= _slope(points, hull[-1], kind):
            hull.pop()
        hull.append(kind)
    return hull


def _slope(points: Mapping[BlockType, tuple[int, float]], low: BlockType, high: BlockType) -> float:
    """The damage that one more byte saves, between two types."""
    return (points[low][1] - points[high][1]) / (points[high][0] - points[low][0])


def _choices(tensor: GgufTensor, informed: bool) -> Iterator[BlockType]:
    for kind in CHOICES:
        if tensor.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
            continue
        if informed or kind not in NEED_IMPORTANCE:
            yield kind


def _nearest(kind: BlockType, choices: Iterable[BlockType]) -> BlockType:
    """The choice nearest in bits per weight."""

    def bits(one: BlockType) -> float:
        block, count = gguf.GGML_QUANT_SIZES[one]
        return 8 * count / block

    return min(choices, key=lambda one: abs(bits(one) - bits(kind)))


def _label(types: Mapping[str, BlockType], matrices: Mapping[str, GgufTensor]) -> str:
    """The file type in the file's keys: the type of most weights, as llama.cpp names a file of it."""
    weights: dict[BlockType, int] = {}
    for name, tensor in matrices.items():
        weights[types[name]] = weights.get(types[name], 0) + tensor.shape[0] * tensor.shape[1]
    most = max(weights, key=lambda kind: weights[kind])
    return next((name for name, kind in GGUF_TYPES.items() if kind == most.name), "Q4_K_M")


@contextmanager
def _changed(loaded: Any, model: GgufModel, tensor: GgufTensor, change: Tensor) -> Iterator[None]:
    """In the block, a matrix of transformers' model is changed as quantizing changes it in the file."""
    assert tensor.source is not None
    parameter = loaded.get_parameter(tensor.source.name)
    before = parameter.detach().clone()
    if model.in_heads(tensor):
        half = model.checkpoint.shape.head_dim // 2
        change = change.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
    try:
        with torch.no_grad():
            parameter.add_(change)
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)
