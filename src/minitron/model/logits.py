"""Logits in float32, a chunk of tokens at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minitron.model.families import FAMILIES

CHUNK_BYTES = 256 << 20
# Logit-sized float32 tensors alive at once in a chunk: both models' logits and log-probabilities, the gradient, and two
# in between.
TEMPORARIES = 7


def chunk_tokens(vocab: int, temporaries: int = TEMPORARIES, *, budget_bytes: int = CHUNK_BYTES) -> int:
    """Tokens of which so many float32 tensors of logits fit the budget."""
    return max(16, budget_bytes // (vocab * 4 * temporaries))


def usual_chunk(head: Float[Tensor, "vocab hidden"], temporaries: int = TEMPORARIES) -> int:
    """Tokens whose logits take as much as a head of float32 that is there anyhow, or 256 MiB if that is more.

    Each chunk reads the head, and where there are gradients adds to its own, which with few tokens costs more than
    the products do.
    """
    return chunk_tokens(len(head), temporaries, budget_bytes=max(CHUNK_BYTES, head.numel() * 4))


@contextmanager
def matmul_precision(dtype: torch.dtype) -> Iterator[None]:
    """Inside, float32 matrix products may round their *inputs* to `dtype`; sums and results stay float32.

    Logits rounded to bfloat16 spoil the KL gradient just where a good student lives: its relative error grows from 1%
    at KL 3 to 40% at KL 0.001. With float32 results it stays at 0.2% everywhere, at bfloat16's speed.
    """
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend, fast in zip(backends, ("bf16", "tf32"), strict=True):
        backend.fp32_precision = fast if dtype == torch.bfloat16 else "ieee"
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


@dataclass(frozen=True)
class LogitTransform:
    """What a family does to the output projection's result: divide it (Granite), then cap it softly (Gemma 2)."""

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
    """Logits of many tokens, of which some are made at a time."""

    hidden: Float[Tensor, "tokens hidden"]
    head: Float[Tensor, "vocab hidden"]
    transform: LogitTransform = LogitTransform()

    def rows(self, rows: slice) -> Float[Tensor, "some vocab"]:
        return self.transform(project(self.hidden[rows], self.head))


def project(
    hidden: Float[Tensor, "tokens hidden"], head: Float[Tensor, "vocab hidden"]
) -> Float[Tensor, "tokens vocab"]:
    """Logits in float32, before any `LogitTransform`."""
    return hidden.float() @ head.float().T
