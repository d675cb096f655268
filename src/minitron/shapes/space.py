"""The shapes that a student can have under a set of budgets, and their costs, computed from the family's table.

All shapes of a space are counted at once, as arrays with one entry per shape.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from minitron.core import parallel
from minitron.core.config import Section, TokenCount
from minitron.core.errors import PlanError, did_you_mean
from minitron.core.machine import bytes_per_second, matmul_flops_per_second
from minitron.model.architecture import (
    DIMS,
    PRUNABLE,
    Architecture,
    ParameterTerms,
    Shape,
    count_terms,
    with_sizes,
)
from minitron.model.checkpoint import Checkpoint, ModelConfig
from minitron.pruning.config import PruneConfig, require_task_fits
from minitron.pruning.target import default_multiple, parse_target

# Least sizes of the default space, as shares of the teacher's.
LEAST_LAYERS, LEAST_HIDDEN, LEAST_FFN = 0.25, 0.25, 0.125
# The most steps in which hidden and ffn shrink, and the most counts of query heads in a group and of kv heads.
HIDDEN_STEPS, FFN_STEPS, HEAD_STEPS = 32, 64, 8
# The shares by which a shape may exceed prune.target and, by default, fall below it.
ABOVE, WINDOW = 0.005, 0.05
PROBE_SIZE = 1024  # of the matrix product that measures this machine's speed
NEAREST = 3  # shapes named when none fits


class SearchConfig(Section):
    level: Literal["predicted", "cut", "distilled"] = "predicted"
    """How the student's shape is found, of all within the budgets: by a prediction of the damage from the statistics,
    then by the loss after the cut, then by distillation; each level includes those before it."""
    window: float | None = Field(default=None, gt=0, lt=1)
    """With prune.target, a candidate has fewer parameters than it by at most this share, or more by at most 0.5%.
    Default: 5%, counted from the largest shape where none comes that near."""
    least: str | None = None
    """The fewest parameters of a candidate, such as 7.8B or 45%, in the kind of prune.target; instead of `window`."""
    max_memory_bytes: float | None = Field(default=None, gt=0)
    """Most bytes of all weights."""
    bytes_per_parameter: float | None = Field(default=None, gt=0)
    """Bytes that a weight will take, such as 0.5625 in a 4.5-bit file. Default: what it takes in the checkpoint."""
    max_kv_cache_bytes: float | None = Field(default=None, gt=0)
    """Most bytes of the key-value cache of `batch` sequences of `context_tokens`."""
    max_decode_seconds: float | None = Field(default=None, gt=0)
    """Longest modelled time of decoding one token of each of `batch` sequences, see `roofline`."""
    max_prefill_seconds: float | None = Field(default=None, gt=0)
    """Longest modelled time of reading `batch` prompts of `context_tokens`, see `roofline`."""
    context_tokens: TokenCount = Field(default=2048, ge=1)
    """Context at which the cache and the times are computed."""
    batch: int = Field(default=1, ge=1)
    """Sequences at once, likewise."""
    bytes_per_second: float | None = Field(default=None, gt=0)
    """Memory bandwidth of the machine that the times are for. Default: measured on this one."""
    flops_per_second: float | None = Field(default=None, gt=0)
    """Speed of matrix products of that machine. Default: measured on this one."""
    dims: dict[str, str] = Field(default={})
    """The space: sizes per dim, such as {layers: 29-32, hidden: 4096-6144/512, ffn: '2.5x,3x', heads: '32,48'}; Nx is a
    multiple of hidden. Default: a quarter of layers and hidden and more, an eighth of ffn and more, and any numbers of
    kv heads and of query heads in each group."""
    gguf_block: Literal[32, 256] | None = None
    """Only shapes that llama.cpp loads, with hidden, ffn and heads * head_dim in multiples of so many: 256 fits all of
    its quantized types, 32 those with blocks of 32 weights."""
    cut_candidates: int = Field(default=16, ge=1)
    """Candidates that the prediction leaves for the measurement after the cut."""
    distill_candidates: int = Field(default=16, ge=2)
    """Candidates that the loss after the cut leaves for distillation. Default: all that were cut, for that loss ranks
    some models' shapes against their loss after distillation."""
    first_rung: float = Field(default=0.0625, gt=0, le=0.5)
    """Share of the final distillation's steps after which the best quarter of these is kept; each later round has eight
    times the steps, until one is left, which goes on to be the student."""
    judge_blocks: int = Field(default=64, ge=1)
    """Blocks that losses are compared on: those of the training text that its first pass reads last."""


@dataclass(frozen=True)
class Machine:
    """The machine that times are modelled for."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Costs:
    """The costs of one shape; times are None where no machine was given."""

    total: int
    non_embedding: int
    weight_bytes: float
    kv_cache_bytes: int
    decode_seconds: float | None
    prefill_seconds: float | None


@dataclass(frozen=True)
class Candidate:
    shape: Shape
    costs: Costs

    @property
    def name(self) -> str:
        """A short name that no other candidate of the same teacher has."""
        return "-".join(f"{dim}{getattr(self.shape, dim)}" for dim in PRUNABLE)

    def to_dict(self) -> dict[str, object]:
        """The candidate as candidates.json holds it."""
        return {"name": self.name, "shape": asdict(self.shape)} | asdict(self.costs)


@dataclass(frozen=True)
class Budget:
    """The limits of one cost, with the recipe key that set them."""

    cost: str
    most: float
    key: str
    least: float = 0.0

    def excess(self, values: np.ndarray) -> np.ndarray:
        """Return how far values are outside the limits, as a logarithm of ratios; 0 inside."""
        with np.errstate(divide="ignore"):
            return np.maximum(0, np.log(values / self.most)) + np.maximum(0, np.log(self.least / values))

    def __str__(self) -> str:
        floor = f"{_number(self.least)} to " if self.least else "at most "
        return f"{self.key} ({self.cost} {floor}{_number(self.most)})"


def feasible(
    architecture: Architecture,
    config: Mapping[str, Any],
    teacher: Shape,
    prune: PruneConfig,
    search: SearchConfig,
    *,
    itemsize: int,
    machine: Machine | None = None,
) -> list[Candidate]:
    """Return all shapes of the space within the budgets, those with the most parameters first.

    Args:
        itemsize: bytes of a weight of the checkpoint, and of a value in the key-value cache.
        machine: needed for budgets of time; without one, candidates have no times.

    Raises: PlanError that names the binding budget and the nearest shapes if there is none.
    """
    terms = architecture.parameter_terms(config)
    limits = budgets(prune, search, terms, teacher)
    sizes = space(architecture, teacher, prune, search)
    costs = cost(terms, sizes, search, itemsize=itemsize, machine=machine)
    excess = {limit: limit.excess(costs[limit.cost]) for limit in limits}
    inside = np.all([values == 0 for values in excess.values()], axis=0)
    if not inside.any() and prune.target is not None and search.window is None and search.least is None:
        limits = [_from_largest(limits[0], limits, costs), *limits[1:]]
        excess = {limit: limit.excess(costs[limit.cost]) for limit in limits}
        inside = np.all([values == 0 for values in excess.values()], axis=0)
    if not inside.any():
        raise PlanError(_why_none(sizes, costs, excess, teacher))
    # By the parameters, then by each dim; lexsort takes the last key first.
    rows = np.flatnonzero(inside)
    rows = rows[np.lexsort([-sizes[dim][rows] for dim in reversed(PRUNABLE)] + [-costs["total"][rows]])]
    return _candidates(sizes, costs, rows)


def _from_largest(target: Budget, limits: Sequence[Budget], costs: Mapping[str, np.ndarray]) -> Budget:
    """Return the budget of the target with its window below the largest shape that all budgets allow, if any."""
    below = np.all([costs[limit.cost] <= limit.most for limit in limits], axis=0)
    if not below.any():
        return target
    return replace(target, least=(1 - WINDOW) * float(costs[target.cost][below].max()))


def feasible_for(
    teacher: Checkpoint | ModelConfig, prune: PruneConfig, search: SearchConfig, machine: Machine | None
) -> list[Candidate]:
    """Return `feasible` for a model on disk."""
    return feasible(
        teacher.architecture,
        teacher.config,
        teacher.shape,
        prune,
        search,
        itemsize=teacher.written_dtype.itemsize,
        machine=machine,
    )


def machine_for(search: SearchConfig, dtype: torch.dtype) -> Machine:
    """Return the machine that the search names; where it names none, measure the first process's."""
    here = Machine(
        search.bytes_per_second or bytes_per_second(),
        search.flops_per_second or matmul_flops_per_second(dtype, PROBE_SIZE),
    )
    return Machine(*parallel.agreed([here.bytes_per_second, here.flops_per_second]))


def budgets(prune: PruneConfig, search: SearchConfig, terms: ParameterTerms, teacher: Shape) -> list[Budget]:
    """Return the budgets that the settings name.

    Raises: PlanError if there is none, or a contradictory one.
    """
    require_task_fits(prune)
    found = []
    if prune.shape is not None or prune.drop_layers is not None or prune.keep_layers is not None:
        raise PlanError(
            "prune.shape, prune.drop_layers and prune.keep_layers give the student's sizes: there is no search; leave "
            "them out"
        )
    if prune.target is not None:
        kind, most = _parameters(prune.target, terms, teacher)
        allowed, least = (1 + ABOVE) * most, (1 - (search.window or WINDOW)) * most
        if search.least is not None:
            least_kind, least = _parameters(search.least, terms, teacher)
            allowed = most
            if least_kind != kind or least > most:
                raise PlanError(
                    f"search.least {search.least} must be in the kind of prune.target {prune.target} (a percentage of "
                    "the non-embedding parameters, or a total), and not above it"
                )
        found.append(Budget(kind, allowed, "prune.target", least))
    elif search.least is not None:
        raise PlanError("search.least needs prune.target, which says the most parameters")
    for key in ("memory_bytes", "kv_cache_bytes", "decode_seconds", "prefill_seconds"):
        limit = getattr(search, f"max_{key}")
        if limit is not None:
            found.append(Budget(key.replace("memory", "weight"), limit, f"search.max_{key}"))
    if not found:
        raise PlanError(
            "the student's size is not given: give prune.target (--target-params), sizes as prune.shape, or a budget "
            "for a search: search.max_memory_bytes, max_kv_cache_bytes, max_decode_seconds or max_prefill_seconds"
        )
    return found


def needs_machine(search: SearchConfig) -> bool:
    return search.max_decode_seconds is not None or search.max_prefill_seconds is not None


def space(
    architecture: Architecture, teacher: Shape, prune: PruneConfig, search: SearchConfig
) -> dict[str, np.ndarray]:
    """Return every shape of the space that the family and transformers accept: dim -> its size in each shape [shapes].

    Raises: PlanError for sizes that cannot be read, that the teacher does not have, or if nothing is left.
    """
    unknown = [dim for dim in search.dims if dim not in PRUNABLE]
    if unknown:
        raise PlanError(f"search.dims has unknown dim {unknown[0]!r}{did_you_mean(unknown[0], PRUNABLE)}")
    multiples = {
        "hidden": prune.hidden_multiple or default_multiple(teacher.hidden, HIDDEN_STEPS),
        "ffn": prune.ffn_multiple or default_multiple(teacher.ffn, FFN_STEPS),
    }
    given = {dim: parse_sizes(dim, text, multiples.get(dim, 1)) for dim, text in search.dims.items()}
    layers = np.array(_sizes("layers", given, teacher, range(math.ceil(LEAST_LAYERS * teacher.layers), teacher.layers)))
    blocks = []
    for shape in _narrowed(architecture, teacher, given, multiples["hidden"]):
        ffn = _ffn_sizes(teacher, shape.hidden, given, multiples["ffn"])
        columns = {dim: np.full(len(layers) * len(ffn), getattr(shape, dim)) for dim in DIMS}
        columns["layers"], columns["ffn"] = np.repeat(layers, len(ffn)), np.tile(ffn, len(layers))
        blocks.append(columns)
    if not any(len(block["layers"]) for block in blocks):
        wanted = ", ".join(f"{dim}={text}" for dim, text in search.dims.items()) or "the default space"
        raise PlanError(f"no {architecture.name} model has a shape of search.dims {wanted}: give other sizes")
    found = {dim: np.concatenate([block[dim] for block in blocks]) for dim in DIMS}
    if search.gguf_block is None:
        return found
    clean = _gguf_clean(architecture, teacher, found, search.gguf_block)
    return {dim: sizes[clean] for dim, sizes in found.items()}


def _gguf_clean(architecture: Architecture, teacher: Shape, sizes: Mapping[str, np.ndarray], block: int) -> np.ndarray:
    """Tell which shapes llama.cpp loads, with rows of whole blocks [shapes].

    Raises: PlanError if it is none of them.
    """
    table = architecture.gguf
    if table is None:
        raise PlanError(f"search.gguf_block: llama.cpp does not know the {architecture.name} family; leave it out")
    filling = sizes["heads"] * sizes["head_dim"]
    clean = (sizes["hidden"] % block == 0) & (sizes["ffn"] % block == 0) & (filling % block == 0)
    if table.heads_fill_hidden:
        clean &= sizes["hidden"] == filling
    if table.no_rope_step:  # it takes layers without rotary positions by their number, and a cut renumbers them
        clean &= sizes["layers"] == teacher.layers
    if not clean.any():
        rules = f"hidden, ffn and heads * head_dim in multiples of {block}"
        rules += ", hidden = heads * head_dim" if table.heads_fill_hidden else ""
        rules += ", all layers" if table.no_rope_step else ""
        raise PlanError(
            f"no shape of the search space has what search.gguf_block={block} asks for ({rules}): "
            f"widen search.dims{', or ask for 32' if block == 256 else ''}"
        )
    return clean


@dataclass(frozen=True)
class SizeList:
    """The sizes that a text such as `4096-6144/512,7168` or `2.5x,3x` stands for."""

    numbers: tuple[int, ...]
    factors: tuple[float, ...] = ()


def parse_sizes(dim: str, text: str, step: int) -> SizeList:
    """Read numbers, ranges (with both ends, in multiples of `step` or of the number after a slash), factors of hidden.

    Raises: PlanError if a part is none of these.
    """
    numbers: set[int] = set()
    factors: set[float] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)(?:\s*-\s*(\d+)(?:\s*/\s*(\d+))?)?|(\d+(?:\.\d+)?)x)\s*", part)
        if not match or (match[4] and dim != "ffn") or match[3] == "0":
            raise PlanError(
                f"search.dims {dim}={text!r}: {part.strip()!r} is no size such as 4096, no range such as 4096-6144 or "
                "4096-6144/512" + (", and no multiple of hidden such as 2.5x" if dim == "ffn" else "")
            )
        if match[4]:
            factors.add(float(match[4]))
        elif match[2]:
            by = int(match[3] or step)
            numbers |= {n for n in range(int(match[1]), int(match[2]) + 1) if n % by == 0}
        else:
            numbers.add(int(match[1]))
    return SizeList(tuple(sorted(numbers)), tuple(sorted(factors)))


def cost(
    terms: ParameterTerms,
    sizes: Mapping[str, np.ndarray],
    search: SearchConfig,
    *,
    itemsize: int,
    machine: Machine | None,
) -> dict[str, np.ndarray]:
    """Return the costs of each shape: a field of `Costs` -> its value in each shape [shapes]."""
    total, non_embedding = (count_terms(terms, sizes, kind=kind) for kind in ("total", "non_embedding"))
    weight = search.bytes_per_parameter or float(itemsize)
    cache = _kv_bytes(sizes, itemsize) * search.context_tokens * search.batch
    costs = {"total": total, "non_embedding": non_embedding, "weight_bytes": total * weight, "kv_cache_bytes": cache}
    if machine is not None:
        costs["decode_seconds"], costs["prefill_seconds"] = roofline(
            non_embedding, sizes, cache, machine, weight=weight, context=search.context_tokens, batch=search.batch
        )
    elif needs_machine(search):
        raise PlanError("a budget of time needs search.bytes_per_second and search.flops_per_second")
    return costs


def roofline(
    non_embedding: np.ndarray,
    sizes: Mapping[str, np.ndarray],
    cache_bytes: np.ndarray,
    machine: Machine,
    *,
    weight: float,
    context: int,
    batch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the seconds of one decoding step of `batch` sequences at `context` tokens, and of reading that context.

    A step takes as long as the longer of two: moving its bytes (every matrix once, the output projection too, the
    embedding's few rows not, and the key-value cache), or doing its operations (2 per weight and token, and 4 per
    channel of a query head and token of context; half of that on average where a prompt is read, whose mask is causal
    and of which only the last token is projected to logits). Launches, samplers and tokenizers are not in the model.

    Args:
        cache_bytes: of the whole batch at `context`.
        weight: bytes per parameter.
    """
    head = sizes["vocab"] * sizes["hidden"]
    attention = 4 * context * sizes["layers"] * sizes["heads"] * sizes["head_dim"]
    moved = (non_embedding + head) * weight + cache_bytes
    decode = batch * (2 * (non_embedding + head) + attention)
    prefill = batch * (context * (2 * non_embedding + attention / 2) + 2 * head)
    seconds = [
        np.maximum(moved / machine.bytes_per_second, flops / machine.flops_per_second) for flops in (decode, prefill)
    ]
    return seconds[0], seconds[1]


def _narrowed(
    architecture: Architecture, teacher: Shape, given: Mapping[str, SizeList], hidden_multiple: int
) -> Iterator[Shape]:
    """Yield the teacher with every hidden size and set of heads that the family accepts; layers and ffn stay."""
    least = LEAST_HIDDEN * teacher.hidden
    hidden_sizes = [n for n in range(hidden_multiple, teacher.hidden, hidden_multiple) if n >= least]
    seen = set()
    for base in _with_heads(architecture, teacher, given):
        for hidden in _sizes("hidden", given, teacher, hidden_sizes):
            shape = architecture.with_hidden(base, hidden)
            allowed = shape is not None and all(
                dim not in given or getattr(shape, dim) in given[dim].numbers for dim in ("heads", "kv_heads")
            )
            if shape is not None and allowed and shape not in seen:
                architecture.require_valid(shape)
                seen.add(shape)
                yield shape


def _with_heads(architecture: Architecture, teacher: Shape, given: Mapping[str, SizeList]) -> Iterator[Shape]:
    if architecture.heads_fill_hidden:  # heads go with hidden
        yield teacher
        return
    fewer_kv = range(0, teacher.kv_heads, -(-teacher.kv_heads // HEAD_STEPS))[1:]
    groups = range(0, teacher.group, -(-teacher.group // HEAD_STEPS))[1:]
    for kv_heads in _sizes("kv_heads", given, teacher, fewer_kv):
        fewer = [kv_heads * group for group in groups]
        for heads in _sizes("heads", given, teacher, fewer, whole=kv_heads * teacher.group):
            if heads % kv_heads == 0 and 0 < heads // kv_heads <= teacher.group:
                yield with_sizes(teacher, heads=heads, kv_heads=kv_heads)


def _sizes(
    dim: str, given: Mapping[str, SizeList], teacher: Shape, default: Any, whole: int | None = None
) -> list[int]:
    """Return the sizes given for a dim, or the default ones and the whole.

    Raises: PlanError for a given size that cannot be cut from the teacher's.
    """
    have = getattr(teacher, dim)
    if dim not in given:
        return sorted({*default, whole or have})
    for size in given[dim].numbers:
        if not 0 < size <= have:
            raise PlanError(f"search.dims {dim}={size}: the teacher has {dim}={have}, and pruning only removes units")
    return list(given[dim].numbers)


def _ffn_sizes(teacher: Shape, hidden: int, given: Mapping[str, SizeList], multiple: int) -> list[int]:
    least = LEAST_FFN * teacher.ffn
    sizes = _sizes("ffn", given, teacher, [n for n in range(multiple, teacher.ffn, multiple) if n >= least])
    scaled = [
        round(factor * hidden / multiple) * multiple for factor in (given["ffn"].factors if "ffn" in given else ())
    ]
    return sorted({*sizes, *(n for n in scaled if 0 < n <= teacher.ffn)})


def _parameters(text: str, terms: ParameterTerms, teacher: Shape) -> tuple[str, float]:
    """Return the kind of count and the number of parameters that a text such as 50% or 4.5B stands for."""
    kind, value = parse_target(text)
    have = count_terms(terms, vars(teacher), kind=kind)
    number = value * have if kind == "non_embedding" else value
    if number > have:
        raise PlanError(f"target {text} is larger than the model, which has {have:,} {kind} parameters")
    return kind, number


def _kv_bytes(sizes: Mapping[str, np.ndarray], itemsize: int) -> np.ndarray:
    """Return the bytes of the key-value cache per token of context."""
    return 2 * sizes["layers"] * sizes["kv_heads"] * sizes["head_dim"] * itemsize


def _candidates(sizes: Mapping[str, np.ndarray], costs: Mapping[str, np.ndarray], rows: np.ndarray) -> list[Candidate]:
    of_sizes = [sizes[dim][rows].tolist() for dim in DIMS]
    unknown = [None] * len(rows)
    names = [field.name for field in fields(Costs)]
    of_costs = [costs[name][rows].tolist() if name in costs else unknown for name in names]
    found = zip(zip(*of_sizes, strict=True), zip(*of_costs, strict=True), strict=True)
    return [Candidate(Shape(*one), Costs(*cost)) for one, cost in found]


def _why_none(
    sizes: Mapping[str, np.ndarray],
    costs: Mapping[str, np.ndarray],
    excess: Mapping[Budget, np.ndarray],
    teacher: Shape,
) -> str:
    """Say which budget binds, and name the nearest shapes with their costs."""
    parts = []
    for limit in excess:
        others = [values == 0 for other, values in excess.items() if other != limit]
        alone, without = int((excess[limit] == 0).sum()), int(np.all(others, axis=0).sum()) if others else 0
        if not alone:
            parts.append(f"{limit} leaves none by itself")
        elif without:
            parts.append(f"{limit} binds: without it {without:,} would fit")
    over = np.sum(list(excess.values()), axis=0)
    nearest = []
    for row in np.argsort(over, kind="stable")[:NEAREST].tolist():
        shape = _candidates(sizes, costs, np.array([row]))[0].shape
        changed = " ".join(f"{dim}={getattr(shape, dim)}" for dim in PRUNABLE)
        needs = ", ".join(
            f"{b.cost} {_number(float(costs[b.cost][row]))}" for b, values in excess.items() if values[row] > 0
        )
        nearest.append(f"{changed} ({needs})")
    return (
        f"no shape fits the budgets, of {len(over):,} in the space: "
        + "; ".join(parts or ["each budget leaves some, but no two the same"])
        + f". Nearest: {'; '.join(nearest)}. Raise a budget, widen search.window, or give other sizes in search.dims"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
