"""The likeliest continuations of many prompts, token by token in one batch; what has ended leaves the batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minitron.evaluation.tasks.packing import Pack, Row
from minitron.evaluation.tasks.shared import SharedForward
from minitron.model.caches import GrowingLayer, growing_cache

# The batch is made smaller when this share of its rows has ended: that copies the keys and values of the others.
ENDED_SHARE = 0.25


@dataclass(frozen=True)
class Stops:
    """What ends a continuation.

    tokens: ids, each of which ends it and belongs to it.
    texts: texts that end it wherever they occur in it.
    most: tokens of a continuation.
    lookback: the last tokens, in which a stop text is looked for after each token.
    """

    tokens: frozenset[int]
    texts: tuple[str, ...]
    most: int
    lookback: int


@torch.no_grad()
def continuations(model: Any, tokenizer: Any, rows: Sequence[Row], plan: Sequence[Pack], stops: Stops) -> list[Row]:
    """The likeliest continuation of each row, up to what ends it.

    Args:
        rows: prompts, sorted and distinct.
        plan: the packs in which they are read, of all rows.
    """
    longest = max(map(len, rows))
    layers, logits = _read(SharedForward(model, rows), rows, plan, longest)
    lengths = torch.tensor([len(row) for row in rows], device=logits.device)
    seen = torch.arange(longest + stops.most, device=logits.device) >= longest - lengths[:, None]
    cache = growing_cache(layers)
    made: list[list[int]] = [[] for _ in rows]
    held, ended = list(range(len(rows))), [False] * len(rows)  # the row at each place of the batch
    while True:
        tokens = logits.argmax(-1)
        running = [place for place, row in enumerate(held) if not ended[row]]
        for place, token in zip(running, tokens[running].tolist(), strict=True):
            made[held[place]].append(token)
        tails = tokenizer.batch_decode([made[held[place]][-stops.lookback :] for place in running])
        for place, tail in zip(running, tails, strict=True):
            ids = made[held[place]]
            stopped = ids[-1] in stops.tokens or any(text in tail for text in stops.texts)
            ended[held[place]] = stopped or len(ids) == stops.most
        running = [place for place in running if not ended[held[place]]]
        if not running:
            return [tuple(ids) for ids in made]
        if len(running) <= (1 - ENDED_SHARE) * len(held):
            kept = torch.tensor(running, device=logits.device)
            cache.batch_select_indices(kept)
            tokens, lengths, seen = tokens[kept], lengths[kept], seen[kept]
            held = [held[place] for place in running]
        filled = layers[0].filled
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=seen[:, : filled + 1].long(),
            position_ids=(lengths + filled - longest)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]


def _read(
    forward: SharedForward, rows: Sequence[Row], plan: Sequence[Pack], longest: int
) -> tuple[list[GrowingLayer], Float[Tensor, "rows vocab"]]:
    """The keys and values of all rows in one batch, and the logits behind each row."""
    layers: list[GrowingLayer] = []
    logits: dict[int, Tensor] = {}
    for pack in plan:
        for row, kept, last in forward.keys_and_values(pack):
            layers = layers or [GrowingLayer(keys, len(rows), longest) for keys, _ in kept]
            for layer, (keys, values) in zip(layers, kept, strict=True):
                layer.put(row, keys, values)
            logits[row] = last
    return layers, torch.stack([logits[row] for row in range(len(rows))])
