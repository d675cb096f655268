"""Losses per token, in nats, and the chunked head + loss that never holds a full [tokens, vocab] matrix."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitron.model.logits import LogitTransform, chunk_tokens, float32_logits, project

# (student logits, teacher logits, targets) -> loss of each token. Without a teacher its logits are the student's.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward_kl(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
) -> Float[Tensor, " tokens"]:
    """KL(teacher || student) of each token, in nats. `targets` are not used.

    Paper: P1, "Retraining"; alone and at temperature 1 it is the best loss in both papers.
    """
    log_p = teacher_logits.log_softmax(-1)
    log_q = student_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def cross_entropy(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
) -> Float[Tensor, " tokens"]:
    """Ordinary language-model loss of each token, in nats. `teacher_logits` are not used."""
    return torch.nn.functional.cross_entropy(student_logits, targets, reduction="none")


LOSSES: dict[str, Loss] = {"forward_kl": forward_kl, "cross_entropy": cross_entropy}
WITHOUT_TEACHER = {"cross_entropy"}


def chunked_loss(
    loss: Loss,
    hidden: Float[Tensor, "tokens hidden"],
    head: Float[Tensor, "vocab hidden"],
    teacher_hidden: Float[Tensor, "tokens teacher_hidden"] | None,
    teacher_head: Float[Tensor, "vocab teacher_hidden"] | None,
    targets: Int[Tensor, " tokens"],
    *,
    transforms: tuple[LogitTransform, LogitTransform] = (LogitTransform(), LogitTransform()),
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Sum of a loss over tokens, from the last hidden states of student and teacher; differentiable in the student's.

    Logits of both models exist for `chunk` tokens at a time, and gradients are taken on the way, so backward only
    scales them.

    Args:
        transforms: what student and teacher do to their logits after the projection.
        dtype: bfloat16 lets products round their inputs to it; logits are float32 in any case.
        chunk: tokens at a time; default `chunk_tokens`.
    """
    chunk = chunk or chunk_tokens(len(head))
    return _ChunkedLoss.apply(loss, hidden, head, teacher_hidden, teacher_head, targets, transforms, dtype, chunk)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: Loss,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        targets: Tensor,
        transforms: tuple[LogitTransform, LogitTransform],
        dtype: torch.dtype,
        chunk: int,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float64)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        head_32 = head.detach().float()
        teacher_head_32 = None if teacher_head is None else teacher_head.detach().float()
        with float32_logits(dtype):
            for rows in (slice(start, start + chunk) for start in range(0, len(hidden), chunk)):
                piece = hidden[rows].detach().float()
                with torch.enable_grad():
                    projected = project(piece, head_32).requires_grad_()
                    logits = transforms[0](projected)
                    if teacher_hidden is None or teacher_head_32 is None:
                        reference = logits.detach()
                    else:
                        reference = transforms[1](project(teacher_hidden[rows].detach(), teacher_head_32))
                    value = loss(logits, reference, targets[rows]).sum()
                    (slope,) = torch.autograd.grad(value, projected)
                total += value.detach()
                grad_hidden[rows] = slope @ head_32
                grad_head.addmm_(slope.T, piece)
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_head.to(head.dtype))
        return total.float()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return None, grad_hidden * scale, grad_head * scale, None, None, None, None, None, None
