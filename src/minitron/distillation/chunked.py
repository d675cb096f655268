"""The output projection and the loss together, some tokens at a time: no matrix of [tokens, vocab] ever exists."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitron.core.device import on_cpu
from minitron.core.numerics import matmul_precision
from minitron.distillation.objective import Objective, TopK
from minitron.model.logits import TEMPORARIES, LazyLogits, LogitTransform, project, usual_chunk

# Logit-sized float32 tensors alive at once in a chunk on a CPU, where softmaxes work on a few rows at a time: both
# models' logits, the gradient in bfloat16, and about as much as products copy.
CPU_TEMPORARIES = 5


HEAD_PART_BYTES = 32 << 20


PART_BYTES = 512 << 10  # of one core's logits that are worked on together: a few such fit its cache


def chunked_loss(
    objective: Objective,
    student: LazyLogits,
    teacher: LazyLogits | TopK | None,
    targets: Int[Tensor, " tokens"],
    *,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Return the sum of an objective over tokens, differentiable in the student's hidden states and output projection.

    Logits of both models exist for `chunk` tokens at a time. Gradients are taken on the way, so backward only scales
    them.

    Args:
        dtype: bfloat16 lets products round their inputs to it; logits are float32 in any case.
        chunk: tokens at a time; default `usual_chunk`.
    """
    chunk = chunk or usual_chunk(student.head, CPU_TEMPORARIES if on_cpu(student.head) else TEMPORARIES)
    task = _Task(objective, student.transform, teacher, dtype, chunk, torch.is_grad_enabled())
    return _ChunkedLoss.apply(student.hidden, student.head, targets, task)


def _parts(logits: Float[Tensor, "tokens vocab"]) -> Iterator[slice]:
    """Divide the rows into parts that are worked on together: on a CPU as many as its caches hold, elsewhere all."""
    tokens, vocab = logits.shape
    if not on_cpu(logits):
        return _slices(tokens, tokens)
    return _slices(tokens, torch.get_num_threads() * max(1, PART_BYTES // (vocab * logits.itemsize)))


def _vocab_parts(head: Float[Tensor, "vocab hidden"]) -> Iterator[slice]:
    """Divide a head's rows into parts, so that the temporary gradient of a part is small beside the head's own."""
    return _slices(len(head), max(1, HEAD_PART_BYTES // (head.shape[1] * head.itemsize)))


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, count, step))


def _with_slopes(
    objective: Objective,
    logits: Float[Tensor, "tokens vocab"],
    teacher: Float[Tensor, "tokens vocab"] | TopK | None,
    targets: Int[Tensor, " tokens"],
    transform: LogitTransform,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens vocab"]]:
    """Return the sum of an objective, and its gradient in the logits before `transform`, in `dtype`.

    In float32 the gradient overwrites the logits.
    """
    slopes = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    total = logits.new_zeros((), dtype=torch.float64)
    for part in _parts(logits):
        known = teacher.rows(part) if isinstance(teacher, TopK) else None if teacher is None else teacher[part]
        value, slopes[part] = objective.with_slope(logits[part], known, targets[part], transform)
        total += value
    return total, slopes


@dataclass(frozen=True)
class _Task:
    """The arguments of a chunked loss in which it is not differentiable, and whether its gradients are wanted."""

    objective: Objective
    transform: LogitTransform
    teacher: LazyLogits | TopK | None
    dtype: torch.dtype
    chunk: int
    differentiate: bool


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, task: _Task) -> Tensor:
        teacher, dtype = task.teacher, task.dtype
        total = hidden.new_zeros((), dtype=torch.float64)
        head_32 = head.detach().float()
        if task.differentiate:
            grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
            grad_head = torch.zeros_like(head, dtype=torch.float32)
            # Gradients may be rounded where logits may not: products of bfloat16 with results of bfloat16 are fastest.
            head_low, hidden_low = head_32.to(dtype), hidden.detach().to(dtype)
        if isinstance(teacher, LazyLogits):
            # The head in float32 once, not once a chunk.
            teacher = LazyLogits(teacher.hidden.detach(), teacher.head.detach().float(), teacher.transform)
        with matmul_precision(dtype):
            for rows in _slices(len(hidden), task.chunk):
                known = None if teacher is None else teacher.rows(rows)
                logits = project(hidden[rows].detach(), head_32)
                value, slopes = _with_slopes(task.objective, logits, known, targets[rows], task.transform, dtype)
                del logits, known  # nothing of a chunk may be there still when the next one is made
                total += value
                if task.differentiate:
                    grad_hidden[rows] = slopes @ head_low
                    for tokens_of in _vocab_parts(grad_head):
                        grad_head[tokens_of] += slopes[:, tokens_of].T @ hidden_low[rows]
                del slopes
        if task.differentiate:
            # Not saved by autograd, so that backward can scale them where they lie: a head's gradient is large.
            ctx.gradients = grad_hidden.to(hidden.dtype), grad_head.to(head.dtype)
        return total.float()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients, "the gradients of a chunked loss are there for one backward pass"
        (grad_hidden, grad_head), ctx.gradients = ctx.gradients, None
        return grad_hidden.mul_(scale), grad_head.mul_(scale), None, None
