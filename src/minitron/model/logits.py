"""Logits in float32, a chunk of tokens at a time."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from minitron.model.families import FAMILIES

LOGIT_CHUNK_BYTES = 256 << 20
# Float32 tensors of the size of the logits that exist at once in a chunk: logits and log-probabilities of both models,
# the gradient, and two intermediate results.
TEMPORARIES = 7


def chunk_tokens(vocab: int, temporaries: int = TEMPORARIES, *, budget_bytes: int = LOGIT_CHUNK_BYTES) -> int:
    """The number of tokens for which so many float32 tensors of logits fit the budget."""
    return max(16, budget_bytes // (vocab * 4 * temporaries))


def usual_chunk(head: Float[Tensor, "vocab hidden"], temporaries: int = TEMPORARIES) -> int:
    """The number of tokens whose logits take as much memory as the head in float32, or 256 MiB if that is more.

    Each chunk reads the head and, in training, adds to its gradient, which with few tokens costs more time than the
    products.
    """
    return chunk_tokens(len(head), temporaries, budget_bytes=max(LOGIT_CHUNK_BYTES, head.numel() * 4))


@dataclass(frozen=True)
class LogitTransform:
    """The function from the output projection to logits: a divisor (Granite), then a soft cap (Gemma 2)."""

    divisor: float = 1.0
    softcap: float | None = None

    def __call__(self, projected: Tensor) -> Tensor:
        logits = projected if self.divisor == 1.0 else projected / self.divisor
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


def logit_transform(model: Any) -> LogitTransform:
    """The transform of a loaded model, from its config."""
    family = FAMILIES[model.config.model_type]
    divisor = getattr(model.config, family.logits_divisor) if family.logits_divisor else 1.0
    softcap = getattr(model.config, family.logits_softcap) if family.logits_softcap else None
    return LogitTransform(divisor, softcap)


@dataclass(frozen=True)
class LazyLogits:
    """The logits of many tokens, computed some tokens at a time."""

    hidden: Float[Tensor, "tokens hidden"]
    head: Float[Tensor, "vocab hidden"]
    transform: LogitTransform = LogitTransform()

    def rows(self, rows: slice) -> Float[Tensor, "some vocab"]:
        return self.transform(project(self.hidden[rows], self.head))


def project(
    hidden: Float[Tensor, "tokens hidden"], head: Float[Tensor, "vocab hidden"]
) -> Float[Tensor, "tokens vocab"]:
    """The output projection in float32, before any `LogitTransform`."""
    return hidden.float() @ head.float().T
