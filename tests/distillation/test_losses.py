"""The chunked loss is the naive one: full logit matrices, autograd, float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from minitron.core.numerics import matmul_precision
from minitron.distillation.chunked import chunked_loss
from minitron.distillation.losses import LOSSES, forward_kl, losses_that_read
from minitron.distillation.objective import Objective, TopK
from minitron.model.logits import LOGIT_CHUNK_BYTES, LazyLogits, LogitTransform, chunk_tokens, project, usual_chunk

TOKENS, VOCAB, HIDDEN, TEACHER_HIDDEN = 23, 50, 12, 16
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def naive_jensen_shannon(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    p, q = Categorical(logits=teacher), Categorical(logits=student)
    mixture = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
    return beta * kl_divergence(p, mixture) + (1 - beta) * kl_divergence(q, mixture)


# Loss of each token from student logits, teacher logits and targets.
NAIVE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda student, teacher, _: kl_divergence(Categorical(logits=teacher), Categorical(logits=student)),
    "reverse_kl": lambda student, teacher, _: kl_divergence(Categorical(logits=student), Categorical(logits=teacher)),
    "jensen_shannon": lambda student, teacher, _: naive_jensen_shannon(student, teacher),
    "mse": lambda student, teacher, _: (student - teacher).pow(2).sum(-1) / VOCAB,
    "cosine": lambda one, two, _: 1 - (one * two).sum(-1) / (one.norm(dim=-1) * two.norm(dim=-1)),
    "cross_entropy": lambda student, _, targets: -Categorical(logits=student).log_prob(targets),
}


def inputs(dtype: torch.dtype = torch.float64) -> Parts:
    generator = torch.Generator().manual_seed(0)
    sizes = (TOKENS, HIDDEN), (VOCAB, HIDDEN), (TOKENS, TEACHER_HIDDEN), (VOCAB, TEACHER_HIDDEN)
    hidden, head, teacher_hidden, teacher_head = (torch.randn(*size, generator=generator).to(dtype) for size in sizes)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden, head / HIDDEN**0.5, teacher_hidden, teacher_head / TEACHER_HIDDEN**0.5, targets


def chunked(
    objective: Objective | str,
    parts: Parts,
    *,
    transforms: tuple[LogitTransform, LogitTransform] = (LogitTransform(), LogitTransform()),
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss per token, and its gradients in the student's hidden states and head."""
    objective = Objective({objective: 1.0}) if isinstance(objective, str) else objective
    hidden, head = parts[0].clone().requires_grad_(), parts[1].clone().requires_grad_()
    teacher = LazyLogits(parts[2], parts[3], transforms[1])
    value = chunked_loss(objective, LazyLogits(hidden, head, transforms[0]), teacher, parts[4], **options) / len(hidden)
    return value.detach(), *torch.autograd.grad(value, (hidden, head))


def naive(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | str, parts: Parts, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head, teacher_hidden, teacher_head = (part.to(dtype) for part in parts[:4])
    hidden.requires_grad_(), head.requires_grad_()
    loss = NAIVE[loss] if isinstance(loss, str) else loss
    value = loss(hidden @ head.T, teacher_hidden @ teacher_head.T, parts[4]).mean()
    return value.detach(), *torch.autograd.grad(value, (hidden, head))


def assert_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-7)


def test_every_loss_is_held_against_a_naive_one() -> None:
    assert NAIVE.keys() == LOSSES.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAIVE)
def test_value_and_gradients_are_those_of_the_naive_loss(name: str, dtype: torch.dtype) -> None:
    parts = inputs(dtype)
    expected = naive(name, parts)
    for chunk in (1, 7, 1000, None):
        assert_equal(chunked(name, parts, chunk=chunk), expected)


@pytest.mark.parametrize("name", NAIVE)
def test_logits_are_divided_and_capped_as_the_family_does_it(name: str) -> None:
    got = chunked(name, inputs(), transforms=(LogitTransform(2.0, 0.5), LogitTransform(softcap=0.7)), chunk=7)

    def capped(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return NAIVE[name](0.5 * (student / 2 / 0.5).tanh(), 0.7 * (teacher / 0.7).tanh(), targets)

    assert_equal(got, naive(capped, inputs()))


@pytest.mark.parametrize("name", NAIVE)
def test_the_chunk_size_does_not_matter(name: str) -> None:
    parts = inputs(torch.float32)
    whole = chunked(name, parts, chunk=TOKENS)
    for chunk in (1, 2, 7, 22, 24):
        torch.testing.assert_close(chunked(name, parts, chunk=chunk), whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAIVE)
def test_gradients_predict_small_changes_of_the_value(name: str) -> None:
    hidden, head, *rest = inputs(torch.float32)
    _, grad_hidden, grad_head = chunked(name, (hidden, head, *rest))
    generator = torch.Generator().manual_seed(1)
    along_hidden, along_head = (torch.randn(part.shape, generator=generator) for part in (hidden, head))
    for step_hidden, step_head in ((along_hidden, 0 * head), (0 * hidden, along_head)):
        step = 1e-3 / (step_hidden.norm() + step_head.norm())
        up, down = (
            naive(name, (hidden + sign * step * step_hidden, head + sign * step * step_head, *rest))[0]
            for sign in (1, -1)
        )
        predicted = 2 * step * ((grad_hidden * step_hidden).sum() + (grad_head * step_head).sum())
        assert predicted.item() == pytest.approx((up - down).item(), rel=5e-3, abs=1e-8)


def test_cross_entropy_needs_no_teacher() -> None:
    hidden, head, teacher_hidden, teacher_head, targets = inputs(torch.float32)
    objective, student = Objective({"cross_entropy": 1.0}), LazyLogits(hidden, head)
    alone = chunked_loss(objective, student, None, targets)
    assert torch.equal(alone, chunked_loss(objective, student, LazyLogits(teacher_hidden, teacher_head), targets))
    assert not objective.needs_teacher
    assert Objective().needs_teacher and Objective({"cross_entropy": 1.0, "mse": 1.0}).needs_teacher


@pytest.mark.parametrize("name", losses_that_read("distributions", "logits"))
def test_the_loss_of_equal_models_is_zero_with_zero_gradients(name: str) -> None:
    hidden, head, *_, targets = inputs(torch.float32)
    value, grad_hidden, grad_head = chunked(name, (hidden, head, hidden, head, targets))
    assert value.item() == pytest.approx(0, abs=2e-7)
    assert grad_hidden.abs().max() < 1e-7 and grad_head.abs().max() < 1e-7


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("name", losses_that_read("distributions"))
def test_a_temperature_is_that_of_both_models_and_its_square_is_in_the_loss(name: str, temperature: float) -> None:
    def cooled(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return temperature**2 * NAIVE[name](student / temperature, teacher / temperature, targets)

    assert_equal(chunked(Objective({name: 1.0}, temperature=temperature), inputs(), chunk=7), naive(cooled, inputs()))


def test_a_mixture_is_the_weighted_sum_of_its_losses() -> None:
    weights = {"forward_kl": 1.0, "cosine": 0.3, "cross_entropy": 0.2, "reverse_kl": 0.5}

    def mixed(*logits: Tensor) -> Tensor:
        return sum((weight * NAIVE[name](*logits) for name, weight in weights.items()), torch.zeros(TOKENS))

    assert_equal(chunked(Objective(weights), inputs(), chunk=7), naive(mixed, inputs()))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_has_its_beta(beta: float) -> None:
    objective = Objective({"jensen_shannon": 1.0}, beta=beta)
    assert_equal(
        chunked(objective, inputs()), naive(lambda one, two, _: naive_jensen_shannon(one, two, beta), inputs())
    )


def test_jensen_shannon_tends_to_the_two_divergences() -> None:
    student, teacher, targets = torch.randn(9, 40).double(), torch.randn(9, 40).double(), torch.zeros(9).long()
    for beta, scale, name in ((1e-6, 1e6, "forward_kl"), (1 - 1e-6, 1e6, "reverse_kl")):
        value = scale * Objective({"jensen_shannon": 1.0}, beta=beta)(student, teacher, targets)
        torch.testing.assert_close(value, NAIVE[name](student, teacher, targets), rtol=1e-3, atol=1e-6)


def buckets(student: Tensor, teacher: Tensor, k: int) -> tuple[Categorical, Categorical]:
    """The teacher's k likeliest tokens and one outcome for the rest, of teacher and student."""
    top = teacher.argsort(-1, descending=True)[:, :k]
    joined = []
    for probs in (teacher.softmax(-1), student.softmax(-1)):
        likeliest = probs.gather(-1, top)
        joined.append(Categorical(probs=torch.cat([likeliest, (1 - likeliest.sum(-1, keepdim=True)).clamp_min(0)], -1)))
    return joined[0], joined[1]


@pytest.mark.parametrize("k", [1, 5, 49])
def test_top_k_is_the_divergence_of_the_likeliest_and_the_rest(k: int) -> None:
    expected = naive(lambda student, teacher, _: kl_divergence(*buckets(student, teacher, k)), inputs())
    assert_equal(chunked(Objective(top_k=k), inputs(), chunk=7), expected)


@pytest.mark.parametrize("name", losses_that_read("distributions"))
def test_top_k_with_the_rest_is_a_lower_bound_and_equal_at_the_whole_vocabulary(name: str) -> None:
    student, teacher = (3 * torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    targets = torch.zeros(200, dtype=torch.int64)
    whole = Objective({name: 1.0})(student, teacher, targets)
    before = torch.zeros(200)
    for k in (1, 2, 8, 30, 49, VOCAB, 2 * VOCAB):
        found = Objective({name: 1.0}, top_k=k)(student, teacher, targets)
        assert (found <= whole + 1e-5).all() and (found >= before - 1e-5).all()
        before = found
    torch.testing.assert_close(before, whole, rtol=1e-5, atol=1e-6)


def test_renormalised_top_k_does_not_see_the_rest() -> None:
    teacher = torch.randn(5, VOCAB)
    lavish = teacher.clone()
    lavish.scatter_add_(1, teacher.topk(40, largest=False).indices, torch.full((5, 40), 4.0))
    targets = torch.zeros(5, dtype=torch.int64)
    assert Objective(top_k=10, tail=False)(lavish, teacher, targets).abs().max() < 1e-5
    assert Objective(top_k=10)(lavish, teacher, targets).min() > 0.5
    likeliest = Objective(top_k=VOCAB, tail=False)(lavish, teacher, targets)
    torch.testing.assert_close(likeliest, Objective()(lavish, teacher, targets), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [3, VOCAB])
def test_what_is_kept_of_a_teacher_gives_the_loss_of_its_logits(k: int) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = inputs(torch.float32)
    kept = TopK.of(teacher_hidden @ teacher_head.T / 2.0, k)
    objective = Objective(temperature=2.0, top_k=k)
    student = LazyLogits(hidden.requires_grad_(), head)
    ours, theirs = (
        torch.autograd.grad(chunked_loss(objective, student, teacher, targets, chunk=7), hidden)[0]
        for teacher in (kept, LazyLogits(teacher_hidden, teacher_head))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_sure_teacher_gives_finite_losses_and_gradients() -> None:
    """All of the probability on one token, as far as float32 can tell."""
    teacher = torch.zeros(2, VOCAB)
    teacher[:, 3] = 200.0
    student = torch.randn(2, VOCAB).requires_grad_()
    for name in losses_that_read("distributions"):
        for k in (1, 5, None):
            value = Objective({name: 1.0}, top_k=k)(student, teacher, torch.zeros(2, dtype=torch.int64)).sum()
            assert value.isfinite() and torch.autograd.grad(value, student)[0].isfinite().all()


def test_forward_kl_is_that_of_torch_distributions() -> None:
    student, teacher = (3 * torch.randn(9, 40, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = kl_divergence(Categorical(logits=teacher), Categorical(logits=student))
    torch.testing.assert_close(forward_kl(teacher.log_softmax(-1), student.log_softmax(-1)), expected)


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
    with pytest.raises(ZeroDivisionError), matmul_precision(torch.bfloat16):
        assert project(torch.ones(2, 4).bfloat16(), torch.ones(3, 4).bfloat16()).dtype == torch.float32
        raise ZeroDivisionError
    assert [backend.fp32_precision for backend in backends] == before


@pytest.mark.parametrize("vocab", [320, 32_000, 131_072])
def test_a_chunk_fits_the_byte_budget_or_is_the_smallest(vocab: int) -> None:
    tokens = chunk_tokens(vocab)
    assert tokens == 16 or tokens * vocab * 4 * 7 <= LOGIT_CHUNK_BYTES < (tokens + 1) * vocab * 4 * 7
    assert chunk_tokens(vocab, budget_bytes=1) == 16


def test_the_logits_of_a_chunk_take_as_much_as_a_large_head() -> None:
    assert usual_chunk(torch.empty(32_000, 64, device="meta")) == chunk_tokens(32_000)
    head = torch.empty(128_256, 4096, device="meta")
    assert usual_chunk(head, 4) == 4096 // 4 and usual_chunk(head, 7) == 4096 // 7
