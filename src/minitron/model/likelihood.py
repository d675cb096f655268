"""The likelihoods of given tokens under a streamed model, from its states after the last layer."""

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
    """Tokens to score, in order of their samples: the sample, the position before the token, and the token's id."""

    sample: Int[Tensor, " scored"]
    position: Int[Tensor, " scored"]
    token: Int[Tensor, " scored"]


@torch.no_grad()
def score_tokens(
    stream: Stream, branches: Sequence[Tensor], scored: Scored
) -> tuple[Float[Tensor, "branches scored"], Bool[Tensor, "branches scored"]]:
    """The log-likelihood of each token in nats, and whether it is the most likely token of the vocabulary.

    The output projection is read some rows at a time: the logits of a part of the vocabulary are added to each token's
    running logsumexp, so neither the whole projection nor a whole row of logits is ever in memory.

    Args:
        branches: sets of states after the last layer, which are overwritten by the states after the final norm.
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
                for part, hidden in _scored_states(stream, states, scored, chunk):
                    logits = transform(project(hidden, piece))
                    sums[branch, part] = torch.logaddexp(sums[branch, part], logits.logsumexp(-1))
                    best[branch, part] = torch.maximum(best[branch, part], logits.amax(-1))
                    column = targets[part] - first
                    here = (column >= 0) & (column < len(piece))
                    mine = logits.gather(1, column.clamp(0, len(piece) - 1)[:, None])[:, 0]
                    own[branch, part] = torch.where(here, mine, own[branch, part])
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
    """The states from which the scored tokens are predicted, in chunks, each with its slice of all scored tokens."""
    for rows, batch in stream.batches(states):
        first, last = torch.searchsorted(scored.sample, torch.tensor([rows.start, rows.stop])).tolist()
        for start in range(first, last, chunk):
            part = slice(start, min(start + chunk, last))
            samples = (scored.sample[part] - rows.start).to(batch.device)
            yield part, batch[samples, scored.position[part].to(batch.device)]
