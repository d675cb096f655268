"""Which rows of tokens go through a model together, so that what rows begin with in common is computed once.

The rows of one forward call form a prefix tree: each token after a beginning that several rows share is a node once.
What many calls share is computed before them, and its keys and values are kept. This module only plans; `shared.py`
computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

Row = tuple[int, ...]

# Keys and values of fewer tokens than these are not worth a forward call of their own.
LEAST_PREFIX_TOKENS = 64
# Rules of rotary positions whose frequencies follow the longest row of a call: rows must not share one.
OF_THE_LONGEST_ROW = ("longrope", "dynamic")


@dataclass(frozen=True)
class Most:
    """The limits of one forward call; a single row may be beyond them.

    tokens: nodes of the prefix tree of its rows.
    wanted: positions whose logits are wanted.
    rows: rows, each of which ends at a node of its own.
    prefix: tokens whose keys and values may be kept between calls.
    """

    tokens: int
    wanted: int
    rows: int
    prefix: int


@dataclass(frozen=True)
class Pack:
    """The rows `start` to `stop` of all sorted rows, computed in one forward call behind a common prefix.

    prefix: the number of tokens whose keys and values come from an earlier call.
    """

    start: int
    stop: int
    prefix: int


@dataclass(frozen=True)
class Tree:
    """The tokens of some rows behind their common prefix, those that rows share only once, in depth-first order.

    positions: of each node in its rows, counted from the beginning of the prefix.
    ends: the node after the last one that has this node on its path.
    paths: the nodes of each row.
    """

    tokens: Int[Tensor, " nodes"]
    positions: Int[Tensor, " nodes"]
    ends: Int[Tensor, " nodes"]
    paths: tuple[tuple[int, ...], ...]

    @property
    def is_one_path(self) -> bool:
        return bool((self.ends == len(self.tokens)).all())


def common_length(one: Row, other: Row) -> int:
    """The number of tokens with which both rows begin."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def prefix_tree(rows: Sequence[Row], prefix: int) -> Tree:
    """Make the tree of sorted rows that have the first `prefix` tokens in common."""
    tokens: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    path: list[int] = []
    paths: list[tuple[int, ...]] = []
    before = rows[0][:prefix]
    for row in rows:
        shared = common_length(before, row)
        for node in path[shared - prefix :]:
            ends[node] = len(tokens)
        del path[shared - prefix :]
        for position in range(shared, len(row)):
            path.append(len(tokens))
            tokens.append(row[position])
            positions.append(position)
            ends.append(0)
        paths.append(tuple(path))
        before = row
    for node in path:
        ends[node] = len(tokens)
    return Tree(torch.tensor(tokens), torch.tensor(positions), torch.tensor(ends), tuple(paths))


def packs(rows: Sequence[Row], wanted: Sequence[int], most: Most) -> list[Pack]:
    """Group sorted, distinct rows into forward calls; calls with the same prefix follow each other.

    Args:
        wanted: the number of positions at the end of each row whose logits are wanted.
    """
    planner = _Planner(rows, wanted, most)
    return planner.split(0, len(rows), 0) if rows else []


class _Planner:
    def __init__(self, rows: Sequence[Row], wanted: Sequence[int], most: Most):
        self.rows, self.wanted, self.most = rows, wanted, most
        self.shared = [0, *(common_length(one, other) for one, other in pairwise(rows))]  # with the row before

    def split(self, start: int, stop: int, prefix: int) -> list[Pack]:
        """Plan the rows from `start` to `stop`, of whose common beginning `prefix` tokens are known."""
        if stop - start == 1:
            return [Pack(start, stop, prefix)]
        if self._fits(start, stop, prefix):
            return [Pack(start, stop, prefix)]
        common = min(self.shared[start + 1 : stop])
        # The logits of a prefix are not computed, so it ends before the first of them that is wanted.
        known = min(common, *(len(self.rows[at]) - self.wanted[at] for at in range(start, stop)))
        inner = known if known - prefix >= LEAST_PREFIX_TOKENS and known <= self.most.prefix else prefix
        branches = [start, *(at for at in range(start + 1, stop) if self.shared[at] == common), stop]
        found: list[Pack] = []
        for first, last in pairwise(branches):
            for pack in self.split(first, last, inner):
                joined = found and found[-1].prefix == pack.prefix == inner
                if joined and self._fits(found[-1].start, pack.stop, inner):
                    found[-1] = Pack(found[-1].start, pack.stop, inner)
                else:
                    found.append(pack)
        return found

    def _fits(self, start: int, stop: int, prefix: int) -> bool:
        if stop - start > self.most.rows:
            return False
        tokens, wanted = 0, 0
        for at in range(start, stop):
            tokens += len(self.rows[at]) - (prefix if at == start else self.shared[at])
            wanted += self.wanted[at]
            if tokens > self.most.tokens or wanted > self.most.wanted:
                return False
        return True


def rows_may_share(config: Any) -> bool:
    """Whether the keys of a token depend on the tokens before it only, and not on the longest row of a call."""
    rules = getattr(config, "rope_parameters", None) or {}
    of_layers = [rule for rule in rules.values() if isinstance(rule, dict)]
    return not any(rule.get("rope_type") in OF_THE_LONGEST_ROW for rule in (rules, *of_layers))
