"""Loss, KL and agreement, summed over predicted tokens: the accumulator of every engine that measures a model."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from minitron.model.samples import Batch


class QualitySums:
    """Sums in float64 over predicted tokens, of a model and of its distance to a reference where there is one."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)  # nats, nats of the reference, KL, agreeing tokens
        self.tokens = 0

    def add(self, tokens: int, nats: float, *, reference_nats: float = 0.0, kl: float = 0.0, agreeing: int = 0) -> None:
        """Add the sums over some predicted tokens."""
        self._sums += torch.tensor([nats, reference_nats, kl, agreeing], dtype=torch.float64)
        self.tokens += tokens

    def add_logits(
        self, found: Float[Tensor, "tokens vocab"], reference: Float[Tensor, "tokens rows"] | None, of: Batch
    ) -> None:
        """Add one block, of which the logits of both models behind each token are known.

        Vocabularies that differ by rows of padding are compared on the rows that both have.
        """
        targets = of.targets[:, None]
        found = of.predicting(found[None])
        nats = -found.log_softmax(-1).gather(1, targets).sum().item()
        if reference is None:
            return self.add(len(targets), nats)
        both = min(found.shape[1], reference.shape[1])
        reference = of.predicting(reference[None])
        reference_nats = -reference.log_softmax(-1).gather(1, targets).sum().item()
        p, q = reference[:, :both].log_softmax(-1), found[:, :both].log_softmax(-1)
        kl, agreeing = divergence(p, q).sum().item(), int((p.argmax(-1) == q.argmax(-1)).sum())
        self.add(len(targets), nats, reference_nats=reference_nats, kl=kl, agreeing=agreeing)

    def __iadd__(self, other: "QualitySums") -> "QualitySums":
        self._sums += other._sums
        self.tokens += other.tokens
        return self

    @property
    def nats(self) -> float:
        """The mean loss."""
        return self._mean(0)

    @property
    def reference_nats(self) -> float:
        """The mean loss of the reference."""
        return self._mean(1)

    @property
    def kl(self) -> float:
        """The mean of KL(reference || model)."""
        return self._mean(2)

    @property
    def top1(self) -> float:
        """The share of tokens for which both models find the same token likeliest."""
        return self._mean(3)

    def bits_per_byte(self, text_bytes: int) -> float | None:
        """The loss over the bytes of the text; None where they are not known."""
        return self.nats * self.tokens / math.log(2) / text_bytes if text_bytes else None

    def _mean(self, index: int) -> float:
        return (self._sums[index] / self.tokens).item()


def divergence(p: Float[Tensor, "tokens vocab"], q: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """KL(p || q) of each token, in nats, of log probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def perplexity_of(nats: float) -> float:
    """The exponential of a loss; infinite where that is beyond what a float holds."""
    return math.exp(nats) if nats < 700 else math.inf
