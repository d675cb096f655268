"""Blocks of tokens as models read them, in which documents may be kept apart."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Separator:
    """The token that separates documents in a stream of tokens: it begins each document, or ends it."""

    token: int
    leads: bool


@dataclass(frozen=True)
class Samples:
    """The blocks of tokens that a streamed pass reads; each block is a sample."""

    tokens: Int[Tensor, "samples tokens"]
    separator: Separator | None = None
    """Separates the documents of a sample; without it, a sample is one document."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "Samples":
        return Samples(self.tokens[rows], self.separator)

    @property
    def block_tokens(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Batch:
    """The input of a forward call, in which attention, positions and predictions stay within each document.

    Without a separator each block is one document. A document that crosses a block boundary begins anew there.
    """

    tokens: Int[Tensor, "blocks tokens"]
    separator: Separator | None = None

    def split(self, size: int) -> "list[Batch]":
        """Split into batches of at most `size` blocks."""
        return [Batch(tokens, self.separator) for tokens in self.tokens.split(size)]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a model's forward.

        transformers keeps documents apart where position ids begin anew, but only without an attention mask and a
        cache: call the model with use_cache=False.
        """
        if self.separator is None:
            return {"input_ids": self.tokens}
        return {"input_ids": self.tokens, "position_ids": self.positions}

    @property
    def positions(self) -> Int[Tensor, "blocks tokens"]:
        """The position of each token in its document."""
        in_block = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        return in_block - torch.where(self._starts, in_block, 0).cummax(1).values

    @property
    def predicted(self) -> Bool[Tensor, "blocks tokens"]:
        """Which tokens are predicted: all tokens of a document except the first."""
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
        """The states from which `targets` are predicted."""
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
