"""Prefill and decode speed of several models, measured in turn so that they meet the same machine.

A timer does a load of work and returns how long it took: `transformers_timer` makes one of a loaded model.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import torch

from minitron.evaluation.layouts import Ratios, Speed

TEACHER, STUDENT, RATIO = "teacher", "student", "ratio"
DEFAULT_ROUNDS = 5


@dataclass(frozen=True)
class Load:
    """`batch` sequences of `context` tokens, read at once; then `new_tokens` further steps of one token each.

    Reading gives the first new token; each step reads the token before it and gives the next.
    """

    batch: int
    context: int
    new_tokens: int

    @property
    def prompts(self) -> list[range]:
        """The tokens that are read, different for each sequence; take them modulo the vocabulary."""
        return [range(row, row + self.context) for row in range(self.batch)]


@dataclass(frozen=True)
class Timing:
    """How long one load took.

    made: the 1 + new_tokens likeliest tokens of each sequence.
    peak_memory_bytes: None where it cannot be measured.
    """

    prefill_seconds: float
    decode_seconds: float
    made: list[list[int]] = field(repr=False)
    peak_memory_bytes: int | None = None


Timer = Callable[[Load], Timing]


@dataclass(frozen=True)
class SpeedRow:
    """The speeds of all models under one load.

    speeds: model -> its speed.
    ratio: None unless a teacher and a student are among the models.
    """

    load: Load
    speeds: Mapping[str, Speed]
    ratio: Ratios | None

    def to_dict(self) -> dict[str, object]:
        """The row as the command prints it: the speeds stand beside `batch` and `context`, each under its model."""
        ratio = {} if self.ratio is None else {RATIO: self.ratio.model_dump()}
        speeds = {name: speed.model_dump() for name, speed in self.speeds.items()}
        return {"batch": self.load.batch, "context": self.load.context, **speeds, **ratio}


def measure_in_turn(
    models: Mapping[str, Timer],
    loads: Iterable[Load],
    *,
    rounds: int = DEFAULT_ROUNDS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SpeedRow]:
    """Measure every model under every load in each round, the models forwards and backwards in turn.

    The first round warms up and is not counted. It goes from the smallest load up, and peak memory is read in it,
    because memory that a larger load took before may not all have been given back.

    Returns a row for each load, from the smallest up.
    """
    loads = sorted(set(loads), key=lambda load: (load.batch * load.context, load.batch))
    seen: dict[Load, dict[str, list[Timing]]] = {load: {name: [] for name in models} for load in loads}
    names, done, total = list(models), 0, (rounds + 1) * len(loads) * len(models)
    for round in range(rounds + 1):
        for load in loads:
            for name in names[::-1] if round % 2 else names:
                seen[load][name].append(models[name](load))
                done += 1
                progress(done, total)
    return [_row(load, timings) for load, timings in seen.items()]


class _Medians(TypedDict):
    prefill: float
    prefill_range: list[float]
    decode: float
    decode_range: list[float]


def _row(load: Load, timings: Mapping[str, Sequence[Timing]]) -> SpeedRow:
    read, written = load.batch * load.context, load.batch * load.new_tokens
    prefill = {name: [_rate(read, one.prefill_seconds) for one in some[1:]] for name, some in timings.items()}
    decode = {name: [_rate(written, one.decode_seconds) for one in some[1:]] for name, some in timings.items()}
    speeds = {
        name: Speed(
            **_medians(prefill[name], decode[name]),
            prompt_tokens=load.context,
            new_tokens=load.new_tokens,
            batch=load.batch,
            peak_memory_bytes=some[0].peak_memory_bytes,
        )
        for name, some in timings.items()
    }
    ratio = None
    if TEACHER in timings and STUDENT in timings:
        pairs = (zip(of_kind[STUDENT], of_kind[TEACHER], strict=True) for of_kind in (prefill, decode))
        ratio = Ratios(**_medians(*([student / teacher for student, teacher in pair] for pair in pairs)))
    return SpeedRow(load, speeds, ratio)


def _rate(tokens: int, seconds: float) -> float:
    """Tokens per second; NaN where a disturbed round of an engine that measures by a difference took no time."""
    return tokens / seconds if seconds > 0 else math.nan


def _medians(prefill: Sequence[float], decode: Sequence[float]) -> _Medians:
    known = [[value for value in values if not math.isnan(value)] or [math.nan] for values in (prefill, decode)]
    (reads, writes), (read_range, write_range) = map(statistics.median, known), ([min(k), max(k)] for k in known)
    return {"prefill": reads, "prefill_range": read_range, "decode": writes, "decode_range": write_range}


def transformers_timer(model: Any) -> Timer:
    """Time a loaded transformers model: its forward with its cache, greedy, without `generate` around it."""
    return lambda load: _time(model, load)


@torch.no_grad()
def _time(model: Any, load: Load) -> Timing:
    device, vocab = model.device, model.get_input_embeddings().num_embeddings
    tokens = torch.tensor([list(prompt) for prompt in load.prompts], device=device) % vocab
    made = []
    start = _now(device)
    output = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    made.append(output.logits[:, -1].argmax(-1, keepdim=True))
    middle = _now(device)
    for _ in range(load.new_tokens):
        output = model(input_ids=made[-1], past_key_values=output.past_key_values, use_cache=True)
        made.append(output.logits[:, -1].argmax(-1, keepdim=True))
    end = _now(device)
    return Timing(middle - start, end - middle, torch.cat(made, 1).tolist())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def with_memory(timer: Timer, forget_peak: Callable[[], object], peak_bytes: Callable[[], int]) -> Timer:
    """Also measure the most memory that a load takes, weights included."""

    def measured(load: Load) -> Timing:
        forget_peak()
        timing = timer(load)
        return replace(timing, peak_memory_bytes=max(0, peak_bytes()))

    return measured
