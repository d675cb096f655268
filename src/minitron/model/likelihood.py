"""How likely a streamed model finds given tokens, from its states after the last layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitron.core.errors import CheckpointError
from minitron.core.numerics import matmul_precision
from minitron.model.logits import chunk_tokens, logit_transform, project
from minitron.model.stream import Stream


@dataclass(frozen=True)
class Scored:
    """Tokens to score: each one's sample, the place in it of the token before, and its id. In order of the samples."""

    sample: Int[Tensor, " scored"]
    place: Int[Tensor, " scored"]
    token: Int[Tensor, " scored"]


@torch.no_grad()
def score_tokens(
    stream: Stream, branches: Sequence[Tensor], scored: Scored
) -> tuple[Float[Tensor, "branches scored"], Bool[Tensor, "branches scored"]]:
    """The log-likelihood of each token in nats, and whether it is the likeliest of the vocabulary.

    The output projection is read a run of rows at a time: logits of a part of the vocabulary are folded into each
    token's running logsumexp, so neither the projection nor a whole row of logits is ever in memory.

    Args:
        branches: sets of states after the last layer; they become those after the final norm.
    """
    with stream.final_norm() as norm:
        for states in branches:
            for rows, before in stream.batches(states):
                states[rows] = norm(before)
    _require_in_vocabulary(stream, scored)
    targets = scored.token.to(stream.device)
    running = torch.full((3, len(branches), len(targets)), -torch.inf, device=stream.device)
    sums, best, own = running
    transform = logit_transform(stream.model)
    for first, piece in stream.head_pieces():
        chunk = chunk_tokens(len(piece))
        with matmul_precision(stream.dtype):
            for branch, states in enumerate(branches):
                for places, hidden in _scored_states(stream, states, scored, chunk):
                    logits = transform(project(hidden, piece))
                    sums[branch, places] = torch.logaddexp(sums[branch, places], logits.logsumexp(-1))
                    best[branch, places] = torch.maximum(best[branch, places], logits.amax(-1))
                    column = targets[places] - first
                    here = (column >= 0) & (column < len(piece))
                    mine = logits.gather(1, column.clamp(0, len(piece) - 1)[:, None])[:, 0]
                    own[branch, places] = torch.where(here, mine, own[branch, places])
    return (own - sums).cpu().double(), (own == best).cpu()


def _require_in_vocabulary(stream: Stream, scored: Scored) -> None:
    checkpoint = stream.checkpoint
    wrong = scored.token[(scored.token < 0) | (scored.token >= checkpoint.shape.vocab)]
    if len(wrong):
        raise CheckpointError(
            f"{checkpoint.path}: token {int(wrong[0])} is to be scored, and the model's vocabulary has "
            f"{checkpoint.shape.vocab}: the tokens are of another tokenizer"
        )


def _scored_states(
    stream: Stream, states: Tensor, scored: Scored, chunk: int
) -> Iterator[tuple[slice, Float[Tensor, "chunk hidden"]]]:
    """The states that the scored tokens are predicted from, in chunks, each with its place among all of them."""
    for rows, batch in stream.batches(states):
        first, last = torch.searchsorted(scored.sample, torch.tensor([rows.start, rows.stop])).tolist()
        for start in range(first, last, chunk):
            places = slice(start, min(start + chunk, last))
            own = (scored.sample[places] - rows.start).to(batch.device)
            yield places, batch[own, scored.place[places].to(batch.device)]
