"""Text sampled from a model, for a teacher whose own text is not at hand.

A document begins with the tokenizer's BOS token, or with its EOS token where there is no BOS, as text does that follows
another document; it ends where the model says so, or at the length of a block. Batch n is a function of the model, the
settings, the seed and n, so an interrupted sampling goes on as if it had not been.

Paper: LLM-QAT (arXiv:2305.17888), "Data-free Distillation"; here from the start token and without a greedy beginning.
"""

import json
import os
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitron.core.device import pick_device
from minitron.core.errors import CheckpointError, DataError
from minitron.core.reading import read_rows
from minitron.data.corpus import DataConfig, delimiters, is_heldout, keyed
from minitron.model.checkpoint import load_model
from minitron.model.tokens import first_token, num_rows_needed, text_ids

# A model that says little may never fill the held-out part: sampling ends at so many times what is to be expected.
PATIENCE = 4


@dataclass(frozen=True)
class Sampled:
    """A row of the file. `tokens` were drawn, the end token among them; `ended` is False for a text cut at the length
    of a block."""

    text: str
    tokens: int
    ended: bool


def sample_text(
    model: Path,
    tokenizer: Any,
    config: DataConfig,
    file: Path,
    *,
    block_tokens: int,
    seed: int,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> list[Sampled]:
    """Sample until the training part has `config.max_tokens` tokens and the held-out part a block, into a JSONL file.

    What an interrupted call left in the file is gone on from, and ends with the bytes of one undisturbed call.

    Args:
        model: its directory; it is loaded whole, in its own dtype.
        block_tokens: most tokens of a document, its start token among them.
        progress: called with (training tokens, how many there will be, speed).

    Raises: DataError for a tokenizer without a token to start from, CheckpointError for logits that are not finite.
    """
    goal, start = _Goal(config, tokenizer, block_tokens), start_token(tokenizer)
    rows = _resume(file, config.sample_batch)
    for row in rows:
        goal.count(row)
    if goal.reached:
        return rows
    clock, first, done = time.monotonic(), goal.drawn, 1

    def step(drawn: int) -> None:
        nonlocal done  # never falls, though what a batch adds to the training part is only known at its end
        done = max(done, min(goal.train + round(drawn * goal.train_share), goal.tokens))
        speed = (goal.drawn + drawn - first) / (time.monotonic() - clock)
        progress(done, goal.tokens, f"tokens sampled, {speed:,.0f} a second")

    loaded = load_model(model).to(pick_device())
    ends = end_tokens(tokenizer, loaded)
    with file.open("a", encoding="utf-8") as lines:
        while not goal.reached:
            number = len(rows) // config.sample_batch
            draws = np.random.default_rng([seed, number]).random((config.sample_batch, block_tokens - 1), np.float32)
            batch = sample_batch(
                loaded,
                start,
                ends,
                draws,
                temperature=config.sample_temperature,
                top_k=config.sample_top_k,
                top_p=config.sample_top_p,
                vocab=num_rows_needed(tokenizer),
                step=step,
            )
            for row in (_decoded(ids, ends, tokenizer) for ids in batch):
                goal.count(row)
                rows.append(row)
                lines.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
    del loaded
    torch.cuda.empty_cache()  # passes that follow look at what is free
    return rows


def start_token(tokenizer: Any) -> int:
    """Raises: DataError if the tokenizer has neither a BOS nor an EOS token."""
    return first_token(tokenizer, "text cannot be sampled from the teacher", "give text as data.source")


def end_tokens(tokenizer: Any, model: Any) -> set[int]:
    """What ends a document: EOS, what else the model's generation config names, and BOS, which begins the next one."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return {token for token in (*named, tokenizer.eos_token_id, tokenizer.bos_token_id) if token is not None}


@torch.no_grad()
def sample_batch(
    model: Any,
    start: int,
    ends: Collection[int],
    draws: Float[np.ndarray, "documents tokens"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    vocab: int,
    step: Callable[[int], None] = lambda drawn: None,
) -> list[list[int]]:
    """Token ids of one document for each row of `draws`, without the start token, with the end token where it has one.

    Args:
        draws: a number in [0, 1) for each token: where among the cumulated probabilities it is.
        vocab: tokens that the tokenizer knows; a model may have more rows than that.
        step: called with the number of tokens drawn so far, after each token of the longest document.
    """
    device = next(model.parameters()).device
    documents: list[list[int]] = [[] for _ in draws]
    rows, open_rows = np.arange(len(draws)), set(range(len(draws)))  # in the cache, and among these still going on
    tokens, cache = torch.full((len(draws), 1), start, device=device), None
    for position in range(draws.shape[1]):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1, :vocab].float()
        if not logits.isfinite().all():
            raise CheckpointError(
                f"the teacher's logits are not finite after {position + 1} tokens of its own text: its weights are "
                f"damaged, or too large for {model.dtype}"
            )
        chosen = draw(probabilities(logits / temperature, top_k, top_p), torch.from_numpy(draws[rows, position]))
        for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
            if row in open_rows:
                documents[row].append(token)
                if token in ends:
                    open_rows.remove(row)
        step(sum(map(len, documents)))
        if not open_rows:
            break
        tokens = chosen[:, None]
        if 2 * len(open_rows) <= len(rows):
            kept = np.flatnonzero(np.isin(rows, list(open_rows)))
            rows, index = rows[kept], torch.from_numpy(kept).to(device)
            tokens = tokens[index]
            cache.batch_select_indices(index)
    return documents


def probabilities(
    logits: Float[Tensor, "rows vocab"], top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "rows vocab"]:
    """Of each token: 0 but for the `top_k` likeliest, and among these but for the fewest that have `top_p` together."""
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    found = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = found.sort(descending=True, stable=True)
        likelier = ordered.cumsum(-1) - ordered
        found = torch.zeros_like(found).scatter(-1, order, ordered.masked_fill(likelier >= top_p, 0))
    return found / found.sum(-1, keepdim=True)


def draw(of: Float[Tensor, "rows vocab"], at: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The token of each row within whose part of the cumulated probabilities the number in [0, 1) lies."""
    cumulated = of.double().cumsum(-1)
    points = at.to(of.device).double()[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, points, right=True)[:, 0]


class _Goal:
    """How much of the text there is, packed and split as `data.prepare` does it."""

    def __init__(self, config: DataConfig, tokenizer: Any, block_tokens: int):
        assert config.max_tokens is not None
        self.tokens = config.max_tokens
        self.config, self.tokenizer, self.block_tokens = config, tokenizer, block_tokens
        prefix, suffix, _ = delimiters(config.delimiter, tokenizer)
        self.num_delimiters = len(prefix) + len(suffix)
        self.train = self.heldout = self.drawn = 0
        held = 0.0 if config.heldout else config.heldout_fraction
        self.train_share = 1 - held
        self.most = PATIENCE * (self.tokens / self.train_share + (block_tokens / held if held else 0))

    @property
    def reached(self) -> bool:
        enough_held = self.config.heldout is not None or self.heldout >= self.block_tokens
        return (self.train >= self.tokens and enough_held) or self.drawn >= self.most

    def count(self, row: Sampled) -> None:
        self.drawn += row.tokens
        if not row.text.strip():
            return  # no document
        tokens = len(text_ids(self.tokenizer, row.text)) + self.num_delimiters
        if self.config.heldout is None and is_heldout(keyed(row.text), self.config.heldout_fraction):
            self.heldout += tokens
        else:
            self.train += tokens


def _decoded(ids: list[int], ends: Collection[int], tokenizer: Any) -> Sampled:
    ended = ids[-1] in ends
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = text.replace("\0", "")  # a token of most tokenizers, and no character of text
    # The length may cut a character in two.
    return Sampled(text if ended else text.rstrip("\N{REPLACEMENT CHARACTER}"), len(ids), ended)


def _resume(path: Path, batch: int) -> list[Sampled]:
    """The whole batches in the file; what is behind them is cut off."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = sum(line.endswith(b"\n") for line in lines) // batch * batch
    if path.exists():
        os.truncate(path, sum(map(len, lines[:whole])))
    try:
        return [Sampled(**row) for _, row in read_rows(path, DataError)] if path.exists() else []
    except (DataError, TypeError) as problem:
        raise DataError(
            f"{path}, the text sampled so far, is damaged ({problem}): delete it, and sampling begins anew"
        ) from None
