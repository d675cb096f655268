"""Text sampled from a model, for a teacher whose training text is not available.

A document begins with the tokenizer's BOS token, or if there is no BOS with the EOS token, like text behind another
document. It ends at an end token, or at the length of a block. A batch is a function of the model, the settings, the
seed and the batches before it, so an interrupted sampling continues as if it had not been interrupted.

Paper: LLM-QAT (arXiv:2305.17888), "Data-free Distillation"; here from the start token and without a greedy beginning.
"""

import json
import math
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
from minitron.core.progress import Pace
from minitron.core.reading import read_rows
from minitron.data.config import DataConfig
from minitron.data.sources import keyed
from minitron.data.writing import delimiters, is_heldout
from minitron.model.checkpoint import Checkpoint, load_model
from minitron.model.tokens import first_token, num_rows_needed, text_ids

# Sampling ends at this multiple of the expected tokens: documents may be so short that the held-out part never fills.
MOST_OF_EXPECTED = 4
# The last batches have only as many documents as are missing, or so many: fewer are drawn at little more speed.
LEAST_ROWS = 8
# Rows of documents that have ended are computed until only so many of all are open.
OPEN_SHARE = 7 / 8


@dataclass(frozen=True)
class SampledDocument:
    """A row of the file. `tokens` is the number of drawn tokens, with the end token; `ended` is False for a text that
    was cut at the length of a block."""

    text: str
    tokens: int
    ended: bool


def sample_text(
    model: Checkpoint,
    config: DataConfig,
    file: Path,
    *,
    block_tokens: int,
    seed: int,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> list[SampledDocument]:
    """Sample into a JSONL file until the training part has `config.max_tokens` tokens and the held-out part a block.

    Text that an interrupted call left in the file is continued, and ends with the bytes of an undisturbed call.

    Args:
        model: the model, which is loaded whole in its own dtype.
        block_tokens: the most tokens of a document, with its start token.
        progress: called with (training tokens, how many there will be, speed).

    Raises: DataError for a tokenizer without a token to start from, CheckpointError for logits that are not finite.
    """
    tokenizer = model.tokenizer
    goal, start = _Goal(config, tokenizer, block_tokens), start_token(tokenizer)
    documents = _resume(file, goal)
    if goal.reached:
        return documents
    loaded = load_model(model.path).to(pick_device())
    sampling = Sampling(
        start,
        end_tokens(tokenizer, loaded),
        num_rows_needed(tokenizer),
        config.sample_temperature,
        config.sample_top_k,
        config.sample_top_p,
    )
    told = goal.progress(progress)
    with file.open("a", encoding="utf-8") as lines:
        while not goal.reached:
            numbers = np.random.default_rng([seed, len(documents)])
            draws = numbers.random((goal.next_rows, block_tokens - 1), np.float32)
            for ids in sample_batch(loaded, sampling, draws, told):
                documents.append(_decoded(ids, sampling.ends, tokenizer))
                goal.count(documents[-1])
                lines.write(json.dumps(asdict(documents[-1]), ensure_ascii=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
    del loaded
    torch.cuda.empty_cache()  # later passes measure the free memory
    return documents


def start_token(tokenizer: Any) -> int:
    """Raises: DataError if the tokenizer has neither a BOS nor an EOS token."""
    return first_token(tokenizer, "text cannot be sampled from the teacher", "give text as data.source")


def end_tokens(tokenizer: Any, model: Any) -> set[int]:
    """The tokens that end a document: EOS, the end tokens of the generation config, and BOS, which begins another."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return {token for token in (*named, tokenizer.eos_token_id, tokenizer.bos_token_id) if token is not None}


@dataclass(frozen=True)
class Sampling:
    """The settings by which tokens are drawn.

    start, ends: the token that each document begins with, and the tokens that end it.
    vocab: the number of tokens that the tokenizer knows; a model may have more rows.
    """

    start: int
    ends: Collection[int]
    vocab: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def sample_batch(
    model: Any,
    sampling: Sampling,
    draws: Float[np.ndarray, "documents tokens"],
    progress: Callable[[int], None] = lambda drawn: None,
) -> list[list[int]]:
    """The token ids of one document for each row of `draws`, without the start token but with an end token.

    Args:
        draws: for each token a number in [0, 1), which picks it by the cumulated probabilities.
        progress: called with the number of tokens drawn so far, after each token of the longest document.
    """
    device = next(model.parameters()).device
    documents: list[list[int]] = [[] for _ in draws]
    rows, open_rows = np.arange(len(draws)), set(range(len(draws)))  # in the cache, and not yet ended
    tokens, cache = torch.full((len(draws), 1), sampling.start, device=device), None
    for position in range(draws.shape[1]):
        chosen, cache = next_tokens(model, sampling, tokens, cache, torch.from_numpy(draws[rows, position]))
        for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
            if row in open_rows:
                documents[row].append(token)
                if token in sampling.ends:
                    open_rows.remove(row)
        progress(sum(map(len, documents)))
        if not open_rows:
            break
        tokens = chosen[:, None]
        if len(open_rows) <= OPEN_SHARE * len(rows):
            kept = np.flatnonzero(np.isin(rows, list(open_rows)))
            rows, index = rows[kept], torch.from_numpy(kept).to(device)
            tokens = tokens[index]
            cache.batch_select_indices(index)
    return documents


@torch.no_grad()
def next_tokens(
    model: Any, sampling: Sampling, tokens: Int[Tensor, "rows 1"], cache: Any, at: Float[Tensor, " rows"]
) -> tuple[Int[Tensor, " rows"], Any]:
    """Draw the token behind `tokens` of each document; return them, and the keys and values up to `tokens`.

    Args:
        cache: the keys and values before `tokens`, as the call before returned them; None at the beginning.
        at: the numbers in [0, 1) that pick the tokens.

    Raises: CheckpointError for logits that are not finite.
    """
    position = 0 if cache is None else cache.get_seq_length()
    known = tokens.new_ones(len(tokens), position + 1)
    output = model(input_ids=tokens, attention_mask=known, past_key_values=cache, use_cache=True)
    if cache is None:
        from minitron.model.caches import without_copies

        without_copies(output.past_key_values)
    logits = output.logits[:, -1, : sampling.vocab].float()
    if not logits.isfinite().all():
        raise CheckpointError(
            f"the teacher's logits are not finite after {position + 1} tokens of its own text: its weights are "
            f"damaged, or too large for {model.dtype}"
        )
    chances = probabilities(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return draw(chances, at), output.past_key_values


def probabilities(
    logits: Float[Tensor, "rows vocab"], top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "rows vocab"]:
    """The probabilities of the `top_k` most likely tokens, and of these of the fewest that sum to `top_p`; else 0."""
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    found = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = found.sort(descending=True, stable=True)
        likelier = ordered.cumsum(-1) - ordered
        found = torch.zeros_like(found).scatter(-1, order, ordered.masked_fill(likelier >= top_p, 0))
    return found / found.sum(-1, keepdim=True)


def draw(chances: Float[Tensor, "rows vocab"], at: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The token of each row whose interval of the cumulated probabilities contains the number in [0, 1)."""
    cumulated = chances.double().cumsum(-1)
    points = at.to(chances.device).double()[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, points, right=True)[:, 0]


class _Goal:
    """The tokens that were sampled, counted and split as `prepare` does it, and the tokens that are wanted."""

    def __init__(self, config: DataConfig, tokenizer: Any, block_tokens: int):
        assert config.max_tokens is not None
        self.tokens = config.max_tokens
        self.config, self.tokenizer, self.block_tokens = config, tokenizer, block_tokens
        prefix, suffix, _ = delimiters(config.delimiter, tokenizer)
        self.num_delimiters = len(prefix) + len(suffix)
        self.train = self.heldout = self.drawn = self.documents = 0
        self.held_share = held = 0.0 if config.heldout else config.heldout_fraction
        self.train_share = 1 - held
        self.most = MOST_OF_EXPECTED * (self.tokens / self.train_share + (block_tokens / held if held else 0))

    @property
    def reached(self) -> bool:
        enough_held = self.config.heldout is not None or self.heldout >= self.block_tokens
        return (self.train >= self.tokens and enough_held) or self.drawn >= self.most

    @property
    def next_rows(self) -> int:
        """The documents of the next batch: as many as are expected to be missing, within bounds."""
        tokens = max(self.tokens - self.train, 0) / self.train_share
        if self.held_share:
            tokens = max(tokens, (self.block_tokens - self.heldout) / self.held_share)
        each = self.drawn / self.documents if self.documents else self.block_tokens - 1
        return min(self.config.sample_batch, max(LEAST_ROWS, math.ceil(tokens / each)))

    def progress(self, report: Callable[[int, int, str], None]) -> Callable[[int], None]:
        """The function that `sample_batch` tells the tokens drawn so far, and which reports the training tokens."""
        pace, done = Pace(), 1

        def drawn(of_batch: int) -> None:
            nonlocal done  # it never falls, though the training tokens of a batch are only known at its end
            done = max(done, min(self.train + round(of_batch * self.train_share), self.tokens))
            pace.report(self.drawn + of_batch, time.monotonic())
            speed = "" if pace.per_second is None else f", {pace.per_second:,.0f} a second"
            what = "tokens sampled" if self.train < self.tokens else "sampling goes on for text to hold out"
            report(done, self.tokens, what + speed)

        return drawn

    def count(self, document: SampledDocument) -> None:
        self.drawn, self.documents = self.drawn + document.tokens, self.documents + 1
        if not document.text.strip():
            return
        tokens = len(text_ids(self.tokenizer, document.text)) + self.num_delimiters
        if self.config.heldout is None and is_heldout(keyed(document.text), self.config.heldout_fraction):
            self.heldout += tokens
        else:
            self.train += tokens


def _decoded(ids: list[int], ends: Collection[int], tokenizer: Any) -> SampledDocument:
    ended = ids[-1] in ends
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = text.replace("\0", "")  # a token of most tokenizers, but no character of text
    # The length may have cut a character.
    return SampledDocument(text if ended else text.rstrip("\N{REPLACEMENT CHARACTER}"), len(ids), ended)


def _resume(path: Path, goal: _Goal) -> list[SampledDocument]:
    """Count the documents of the complete batches in the file; those of an incomplete one are removed."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        os.truncate(path, sum(map(len, lines)))
    try:
        found = [SampledDocument(**row) for _, row in read_rows(path, DataError)] if lines else []
    except (DataError, TypeError) as problem:
        raise DataError(
            f"{path}, the text sampled so far, is damaged ({problem}): delete it, and sampling begins anew"
        ) from None
    documents: list[SampledDocument] = []
    while not goal.reached and len(documents) + goal.next_rows <= len(found):
        batch = found[len(documents) : len(documents) + goal.next_rows]
        documents += batch
        for document in batch:
            goal.count(document)
    if lines:
        os.truncate(path, sum(map(len, lines[: len(documents)])))
    return documents
