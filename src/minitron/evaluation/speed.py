"""Prefill and decode speed of several models, measured in turn so that they meet the same machine.

A model is whatever does a load of work and says how long it took: `transformers_timer` makes one of a loaded model.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from minitron.core.machine import forget_peak_memory, peak_memory

TEACHER, STUDENT, RATIO = "teacher", "student", "ratio"
DEFAULT_ROUNDS = 5
KINDS = ("prefill", "decode")


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
        """What is read: a number may have to be taken modulo the vocabulary. Each sequence is another."""
        return [range(row, row + self.context) for row in range(self.batch)]


@dataclass(frozen=True)
class Timing:
    """Of one load.

    made: the tokens of each sequence, the likeliest ones: 1 + new_tokens.
    peak_memory_bytes: None where it cannot be told.
    """

    prefill_seconds: float
    decode_seconds: float
    made: list[list[int]] = field(repr=False)
    peak_memory_bytes: int | None = None


Timer = Callable[[Load], Timing]


@dataclass(frozen=True)
class Speed:
    """Medians over rounds, tokens per second of all sequences together, with the slowest and fastest round."""

    prefill: float
    prefill_range: tuple[float, float]
    decode: float
    decode_range: tuple[float, float]
    prompt_tokens: int
    new_tokens: int
    batch: int = 1
    peak_memory_bytes: int | None = None


def measure_in_turn(
    models: Mapping[str, Timer],
    loads: Iterable[Load],
    *,
    rounds: int = DEFAULT_ROUNDS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Every round gives each load to each model, forwards and backwards in turn.

    The first round warms up and is not counted. It goes from the smallest load up, and memory is told in it: what a
    larger load took before may not all have been given back.

    Returns a row for each load: `batch`, `context`, and a Speed as a dict under each model's name; with a teacher and a
    student among them also `ratio`, student to teacher, the median and range of the rounds' own ratios.
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


def _row(load: Load, timings: Mapping[str, Sequence[Timing]]) -> dict[str, Any]:
    rates = {name: _rates(load, some[1:]) for name, some in timings.items()}
    row: dict[str, Any] = {"batch": load.batch, "context": load.context}
    for name, some in timings.items():
        row[name] = asdict(
            Speed(
                **_medians(rates[name]),
                prompt_tokens=load.context,
                new_tokens=load.new_tokens,
                batch=load.batch,
                peak_memory_bytes=some[0].peak_memory_bytes,
            )
        )
    if TEACHER in rates and STUDENT in rates:
        pairs = {kind: zip(rates[STUDENT][kind], rates[TEACHER][kind], strict=True) for kind in KINDS}
        row[RATIO] = _medians({kind: [student / teacher for student, teacher in pairs[kind]] for kind in KINDS})
    return row


def _rates(load: Load, timings: Sequence[Timing]) -> dict[str, list[float]]:
    """Tokens per second of each round. A time that is none, of a disturbed round of an engine whose steps are told by
    a difference, gives NaN."""
    tokens = {"prefill": load.batch * load.context, "decode": load.batch * load.new_tokens}
    seconds = {
        "prefill": [timing.prefill_seconds for timing in timings],
        "decode": [timing.decode_seconds for timing in timings],
    }
    return {kind: [tokens[kind] / time if time > 0 else math.nan for time in seconds[kind]] for kind in KINDS}


def _medians(rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for kind, values in rates.items():
        known = [value for value in values if not math.isnan(value)] or [math.nan]
        facts |= {kind: statistics.median(known), f"{kind}_range": (min(known), max(known))}
    return facts


def transformers_timer(model: Any) -> Timer:
    """Of a loaded transformers model: its own forward with its own cache, greedy, without `generate` around it."""
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


def with_cuda_memory(timer: Timer, device: torch.device) -> Timer:
    """Also tell the most memory that tensors took on the GPU, weights included."""

    def measured(load: Load) -> Timing:
        torch.cuda.reset_peak_memory_stats(device)
        timing = timer(load)
        return replace(timing, peak_memory_bytes=torch.cuda.max_memory_allocated(device))

    return measured


def with_resident_memory(timer: Timer, before_bytes: int) -> Timer:
    """Also tell the most resident memory of this process beyond `before_bytes`, weights included.

    Means something only where the model is alone in its process.
    """

    def measured(load: Load) -> Timing:
        forget_peak_memory()
        timing = timer(load)
        return replace(timing, peak_memory_bytes=max(0, peak_memory() - before_bytes))

    return measured
