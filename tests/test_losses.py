"""The chunked loss is the naive one: full logit matrices, autograd, float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from minitron.distill.losses import LOSSES, WITHOUT_TEACHER, chunked_loss, forward_kl
from minitron.model.logits import CHUNK_BYTES, LogitTransform, chunk_tokens, float32_logits, project

TOKENS, VOCAB, HIDDEN, TEACHER_HIDDEN = 23, 50, 12, 16
NAIVE = {
    "forward_kl": lambda student, teacher, targets: kl_divergence(
        Categorical(logits=teacher), Categorical(logits=student)
    ),
    "cross_entropy": lambda student, teacher, targets: -Categorical(logits=student).log_prob(targets),
}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (TOKENS, HIDDEN), (VOCAB, HIDDEN), (TOKENS, TEACHER_HIDDEN), (VOCAB, TEACHER_HIDDEN)
    hidden, head, teacher_hidden, teacher_head = (torch.randn(*size, generator=generator).to(dtype) for size in sizes)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden, head / HIDDEN**0.5, teacher_hidden, teacher_head / TEACHER_HIDDEN**0.5, targets


def chunked(name: str, parts: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss per token, and its gradients in the student's hidden states and head."""
    hidden, head, teacher_hidden, teacher_head, targets = parts
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    value = chunked_loss(LOSSES[name], hidden, head, teacher_hidden, teacher_head, targets, **options) / len(hidden)
    return value.detach(), *torch.autograd.grad(value, (hidden, head))


def naive(name: str, parts: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head, teacher_hidden, teacher_head = (part.to(dtype) for part in parts[:4])
    hidden.requires_grad_(), head.requires_grad_()
    value = NAIVE[name](hidden @ head.T, teacher_hidden @ teacher_head.T, parts[4]).mean()
    return value.detach(), *torch.autograd.grad(value, (hidden, head))


def test_every_loss_is_held_against_a_naive_one() -> None:
    assert NAIVE.keys() == LOSSES.keys()


@pytest.mark.parametrize("chunk", [1, 7, 1000, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_naive_loss(name: str, dtype: torch.dtype, chunk: int | None) -> None:
    parts = inputs(dtype)
    for got, expected in zip(chunked(name, parts, chunk=chunk), naive(name, parts), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_logits_are_divided_and_capped_as_the_family_does_it(name: str) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = inputs()
    got = chunked(name, inputs(), transforms=(LogitTransform(2.0, 0.5), LogitTransform(softcap=0.7)), chunk=7)
    hidden.requires_grad_(), head.requires_grad_()
    student, teacher = 0.5 * (hidden @ head.T / 2 / 0.5).tanh(), 0.7 * (teacher_hidden @ teacher_head.T / 0.7).tanh()
    value = NAIVE[name](student, teacher, targets).mean()
    expected = (value.detach(), *torch.autograd.grad(value, (hidden, head)))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_the_chunk_size_does_not_matter(name: str) -> None:
    parts = inputs(torch.float32)
    whole = chunked(name, parts, chunk=TOKENS)
    for chunk in (1, 2, 7, 22, 24):
        torch.testing.assert_close(chunked(name, parts, chunk=chunk), whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_predict_small_changes_of_the_value(name: str) -> None:
    hidden, head, *rest = inputs(torch.float32)
    _, grad_hidden, grad_head = chunked(name, (hidden, head, *rest))
    for step_hidden, step_head in ((torch.randn_like(hidden), 0 * head), (0 * hidden, torch.randn_like(head))):
        step = 1e-3 / (step_hidden.norm() + step_head.norm())
        up, down = (
            naive(name, (hidden + sign * step * step_hidden, head + sign * step * step_head, *rest))[0]
            for sign in (1, -1)
        )
        predicted = 2 * step * ((grad_hidden * step_hidden).sum() + (grad_head * step_head).sum())
        assert predicted.item() == pytest.approx((up - down).item(), rel=5e-3, abs=1e-8)


@pytest.mark.parametrize("name", sorted(WITHOUT_TEACHER))
def test_losses_without_a_teacher_need_none(name: str) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = inputs(torch.float32)
    alone = chunked_loss(LOSSES[name], hidden, head, None, None, targets)
    assert torch.equal(alone, chunked_loss(LOSSES[name], hidden, head, teacher_hidden, teacher_head, targets))


def test_kl_of_equal_models_is_zero_with_zero_gradients() -> None:
    hidden, head, *_, targets = inputs(torch.float32)
    value, grad_hidden, grad_head = chunked("forward_kl", (hidden, head, hidden, head, targets))
    assert value.item() == pytest.approx(0, abs=1e-7)
    assert grad_hidden.abs().max() < 1e-7 and grad_head.abs().max() < 1e-7


def test_forward_kl_is_that_of_torch_distributions() -> None:
    student, teacher = (3 * torch.randn(9, 40, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = kl_divergence(Categorical(logits=teacher), Categorical(logits=student))
    torch.testing.assert_close(forward_kl(student, teacher, torch.zeros(9, dtype=torch.int64)), expected)


def test_bfloat16_keeps_the_gradient_of_a_good_student() -> None:
    """At KL 0.03 plain bfloat16 logits are off by several percent."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(128, 64, generator=generator).bfloat16()
    head = (torch.randn(4096, 64, generator=generator) * 2 / 8).bfloat16()
    teacher_hidden = (hidden + 0.12 * torch.randn(hidden.shape, generator=generator)).bfloat16()
    parts = hidden, head, teacher_hidden, head, torch.zeros(128, dtype=torch.int64)
    value, exact, _ = naive("forward_kl", parts)
    assert 0.02 < value < 0.04

    def error(gradient: Tensor) -> float:
        return ((gradient.double() - exact).norm() / exact.norm()).item()

    float32_inputs = tuple(part.float() for part in parts[:4])
    assert error(chunked("forward_kl", (*float32_inputs, parts[4]), dtype=torch.bfloat16)[1]) < 0.01
    assert error(chunked("forward_kl", parts, dtype=torch.bfloat16)[1]) < 0.01
    assert error(naive("forward_kl", parts, torch.bfloat16)[1]) > 0.02


def test_gradients_come_in_the_dtype_of_the_inputs() -> None:
    _, grad_hidden, grad_head = chunked("forward_kl", inputs(torch.bfloat16), dtype=torch.bfloat16)
    assert grad_hidden.dtype == grad_head.dtype == torch.bfloat16


def test_float32_logits_restores_the_precision_even_after_an_error() -> None:
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    with pytest.raises(ZeroDivisionError), float32_logits(torch.bfloat16):
        assert project(torch.ones(2, 4).bfloat16(), torch.ones(3, 4).bfloat16()).dtype == torch.float32
        raise ZeroDivisionError
    assert [backend.fp32_precision for backend in backends] == before


@pytest.mark.parametrize("vocab", [320, 32_000, 131_072])
def test_a_chunk_fits_the_byte_budget_or_is_the_smallest(vocab: int) -> None:
    tokens = chunk_tokens(vocab)
    assert tokens == 16 or tokens * vocab * 4 * 7 <= CHUNK_BYTES < (tokens + 1) * vocab * 4 * 7
    assert chunk_tokens(vocab, budget_bytes=1) == 16
