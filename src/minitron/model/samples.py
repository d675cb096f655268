"""Blocks of tokens as models read them, with the documents in a block kept apart where that is asked for."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Separator:
    """The token that documents are told apart by in a stream of tokens: it leads each document, or ends it."""

    token: int
    leads: bool


@dataclass(frozen=True)
class Samples:
    """Blocks of tokens that a streamed pass reads, one block a sample."""

    tokens: Int[Tensor, "samples tokens"]
    separator: Separator | None = None
    """Tells the documents of a sample apart; without one a sample is one document."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "Samples":
        return Samples(self.tokens[rows], self.separator)

    @property
    def block_tokens(self) -> int:
        return self.tokens.shape[1]

    def batch(self, rows: slice, device: torch.device) -> "Batch":
        return Batch(self.tokens[rows].to(device), self.separator)


@dataclass(frozen=True)
class Batch:
    """What one forward call reads: attention, positions and predictions are as if each document stood alone.

    Without a separator each block is one document. A document cut by the block boundary starts at the block.
    """

    tokens: Int[Tensor, "blocks tokens"]
    separator: Separator | None = None

    def split(self, size: int) -> "list[Batch]":
        """Batches of at most `size` blocks."""
        return [Batch(tokens, self.separator) for tokens in self.tokens.split(size)]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a model's forward.

        transformers keeps documents apart whose position ids begin anew, but only while there is neither an attention
        mask nor a cache: call the model with use_cache=False.
        """
        if self.separator is None:
            return {"input_ids": self.tokens}
        return {"input_ids": self.tokens, "position_ids": self.positions}

    @property
    def positions(self) -> Int[Tensor, "blocks tokens"]:
        """Of each token in its document."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        return places - torch.where(self._starts, places, 0).cummax(1).values

    @property
    def predicted(self) -> Bool[Tensor, "blocks tokens"]:
        """Which tokens are predicted: all of a document but its first, which nothing in it comes before."""
        return ~self._starts

    @property
    def num_predicted(self) -> int:
        if self.separator is None:
            return self.tokens.shape[0] * (self.tokens.shape[1] - 1)
        return int(self.predicted.sum())

    @property
    def targets(self) -> Int[Tensor, " predicted"]:
        """The tokens that are predicted."""
        return self._following(self.tokens[:, 1:])

    def predicting(self, states: Float[Tensor, "blocks tokens hidden"]) -> Float[Tensor, "predicted hidden"]:
        """The states that `targets` are predicted from."""
        return self._following(states[:, :-1])

    def _following(self, values: Tensor) -> Tensor:
        return values.flatten(0, 1) if self.separator is None else values[self.predicted[:, 1:]]

    @property
    def _starts(self) -> Bool[Tensor, "blocks tokens"]:
        starts = torch.zeros_like(self.tokens, dtype=torch.bool)
        starts[:, 0] = True
        if self.separator is not None:
            found = self.tokens == self.separator.token
            starts[:, 1:] |= found[:, 1:] if self.separator.leads else found[:, :-1]
        return starts
