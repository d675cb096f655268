"""Prefill and decode speed of several models, measured in turn so that they meet the same machine."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Speed:
    """Medians over rounds, tokens per second, with the slowest and fastest round."""

    prefill: float
    prefill_range: tuple[float, float]
    decode: float
    decode_range: tuple[float, float]
    prompt_tokens: int
    new_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure_speed(
    models: Mapping[str, Any], *, prompt_tokens: int, new_tokens: int = 32, rounds: int = 5
) -> dict[str, Speed]:
    """One sequence at a time; each round visits every model once. The first round warms up and is not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for round in range(rounds + 1):
        for name, model in models.items():
            both = (_seconds(model, prompt_tokens, 1), _seconds(model, prompt_tokens, 1 + new_tokens))
            if round > 0:
                times[name].append(both)
    return {name: _summarize(pairs, prompt_tokens, new_tokens) for name, pairs in times.items()}


def _seconds(model: Any, prompt_tokens: int, new_tokens: int) -> float:
    device = next(model.parameters()).device
    tokens = torch.arange(prompt_tokens, device=device)[None] % model.config.vocab_size
    start = time.perf_counter()
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _summarize(pairs: list[tuple[float, float]], prompt_tokens: int, new_tokens: int) -> Speed:
    prefill = [prompt_tokens / first for first, _ in pairs]
    # A round can be disturbed so that the longer call is the shorter one; it then says nothing about decoding.
    decode = [new_tokens / (both - first) for first, both in pairs if both > first] or [float("nan")]
    return Speed(
        prefill=statistics.median(prefill),
        prefill_range=(min(prefill), max(prefill)),
        decode=statistics.median(decode),
        decode_range=(min(decode), max(decode)),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )
