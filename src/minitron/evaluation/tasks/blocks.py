"""Attention over a prefix tree in blocks of its nodes, so that no products of rows that do not see each other are made.

A block is a path of nodes, or a few small branches that are not worth a call of their own. It sees its own nodes and
those on the path to it; within it, and in a window, the mask of the whole tree says what is seen.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface

from minitron.evaluation.tasks.packing import Tree
from minitron.model import attention

# Branches of fewer nodes than these are computed together. On a GPU a tree is one block: the starts of many small
# kernels would take longer than the products that they save.
LEAST_NODES = 64
_BLOCKS: ContextVar["Sequence[Block]"] = ContextVar("blocks")  # of the call that runs: some families pass no options on
_IN_BLOCKS = "minitron-tree"
_WHOLE = ("sdpa", attention.NAME)  # the attention whose calls are divided

Range = tuple[int, int]
Queries = Float[Tensor, "batch heads tokens head_dim"]
SeenKeys = Float[Tensor, "batch kv_heads keys head_dim"]


@dataclass(frozen=True)
class Block:
    """Neighbouring nodes of a tree whose attention is one call.

    nodes: the first node, and the one after the last.
    keys: the ranges of keys that any of its nodes sees; keys of the prefix come before those of the nodes.
    causal: whether each of its nodes sees exactly the keys before it and itself.
    """

    nodes: Range
    keys: tuple[Range, ...]
    causal: bool


def tree_blocks(tree: Tree, prefix: int, *, windowed: bool) -> list[Block]:
    """Divide the nodes of a tree behind a prefix, in their order.

    Args:
        windowed: whether a window is shorter than the rows, so that no block is causal.
    """
    ends = tree.ends.tolist()
    found: list[Block] = []
    left: list[tuple[int, int, tuple[Range, ...]]] = [(0, len(ends), ((0, prefix),) if prefix else ())]
    while left:
        start, stop, seen = left.pop()
        inner = start + 1  # the end of the path with which the branch begins
        while inner < stop and ends[inner] == ends[start] == stop:
            inner += 1
        if stop - start <= LEAST_NODES or ends[start] == stop:
            last = stop if stop - start <= LEAST_NODES else inner
            causal = inner == last and not seen and not windowed
            keys = _with(seen, (prefix + start, prefix + last))
            found.append(Block((start, last), keys, causal))
            if last < stop:
                left.append((last, stop, keys))
        else:
            left += [(*part, seen) for part in reversed(_parts(ends, start, stop))]
    return found


def _with(ranges: tuple[Range, ...], more: Range) -> tuple[Range, ...]:
    if ranges and ranges[-1][1] == more[0]:
        return (*ranges[:-1], (ranges[-1][0], more[1]))
    return (*ranges, more)


def _parts(ends: Sequence[int], start: int, stop: int) -> list[Range]:
    """The branches from `start` to `stop`, small neighbours together."""
    parts: list[Range] = []
    while start < stop:
        end = ends[start]
        while end < stop and ends[end] - start <= LEAST_NODES:
            end = ends[end]
        parts.append((start, end))
        start = end
    return parts


@contextmanager
def in_blocks(model: Any, blocks: Sequence[Block]) -> Iterator[None]:
    """In the block, a model's attention is computed in `blocks`, if it is one that can be divided."""
    whole = model.config._attn_implementation
    if len(blocks) < 2 or whole not in _WHOLE:
        yield
        return
    token = _BLOCKS.set(blocks)
    model.config._attn_implementation = _IN_BLOCKS
    try:
        yield
    finally:
        model.config._attn_implementation = whole
        _BLOCKS.reset(token)


def _attention(
    module: Any,
    query: Queries,
    key: SeenKeys,
    value: SeenKeys,
    attention_mask: Float[Tensor, "1 1 tokens keys"],
    **options: Any,
) -> tuple[Float[Tensor, "batch tokens heads head_dim"], None]:
    """Compute attention as transformers' own functions of these arguments do, block by block."""
    parts = []
    for block in _BLOCKS.get():
        start, stop = block.nodes
        mask = None if block.causal else _columns(attention_mask[:, :, start:stop], block.keys, -1)
        keys, values = _columns(key, block.keys, -2), _columns(value, block.keys, -2)
        parts.append(attention.attend(module, query[:, :, start:stop], keys, values, mask, **options)[0])
    return torch.cat(parts, 1), None


def _columns(tensor: Tensor, ranges: Sequence[Range], axis: int) -> Tensor:
    found = [tensor.narrow(axis, start, stop - start) for start, stop in ranges]
    return found[0] if len(found) == 1 else torch.cat(found, axis)


AttentionInterface.register(_IN_BLOCKS, _attention)
