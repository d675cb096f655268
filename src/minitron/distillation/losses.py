"""Losses per token, in nats, and the chunked head + loss that never holds a full [tokens, vocab] matrix.

To add one: a function, a row of LOSSES, and a row of the tests.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import unwrap
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitron.core.config import choice
from minitron.core.numerics import matmul_precision
from minitron.model.logits import TEMPORARIES, LazyLogits, LogitTransform, project, usual_chunk

# Least logarithm of the probability that a list of the likeliest tokens leaves for all others: what float32 rounds to
# nothing would else be infinitely unlikely.
LEAST_TAIL = -80.0
# Logit-sized float32 tensors alive at once in a chunk on a CPU, where softmaxes work on a few rows at a time: both
# models' logits, the gradient in bfloat16, and about as much as products copy.
CPU_TEMPORARIES = 5
HEAD_PART_BYTES = 32 << 20
PART_BYTES = 512 << 10  # of one core's logits that are worked on together: a few such fit its cache


def forward_kl(
    log_p: Float[Tensor, "tokens outcomes"], log_q: Float[Tensor, "tokens outcomes"]
) -> Float[Tensor, " tokens"]:
    """KL(teacher || student) of each token, from log-probabilities of the teacher and the student.

    Paper: P1, "Retraining"; alone and at temperature 1 it is the best loss in both papers.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(
    log_p: Float[Tensor, "tokens outcomes"], log_q: Float[Tensor, "tokens outcomes"]
) -> Float[Tensor, " tokens"]:
    """KL(student || teacher) of each token."""
    return forward_kl(log_q, log_p)


def jensen_shannon(
    log_p: Float[Tensor, "tokens outcomes"], log_q: Float[Tensor, "tokens outcomes"], beta: float
) -> Float[Tensor, " tokens"]:
    """beta KL(p || m) + (1 - beta) KL(q || m) of each token, with m = beta p + (1 - beta) q, p the teacher's.

    Divided by beta it tends to the forward KL as beta goes to 0, and by 1 - beta to the reverse KL as it goes to 1.

    Paper: Agarwal et al. 2024, section 2.
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def mse(student: Float[Tensor, "tokens vocab"], teacher: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """Mean squared difference of the logits of each token; no unit."""
    return (student - teacher).square().mean(-1)


def cosine(student: Float[Tensor, "tokens vocab"], teacher: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """1 - cosine of the logits of each token; no unit."""
    return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)


def cross_entropy(student: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """-log of the probability that the student gives each token of the text."""
    return torch.nn.functional.cross_entropy(student, targets, reduction="none")


@dataclass(frozen=True)
class Loss:
    """A row of LOSSES.

    of: the loss of each token, from what the row reads.
    title: how the report and the model card name the loss.
    reads: the two arguments of `of`. `distributions`: log-probabilities of the teacher and the student, at the
        objective's temperature, of all tokens or of the teacher's likeliest; `logits`: all of the student's and the
        teacher's; `text`: the student's logits and the tokens of the text.
    options: fields of Objective that `of` takes besides, by their names.
    """

    of: Callable[..., Tensor]
    title: str
    doc: str
    reads: Literal["distributions", "logits", "text"]
    options: tuple[str, ...] = ()


LOSSES: dict[str, Loss] = {
    "forward_kl": Loss(
        forward_kl, "forward KL", "KL(teacher, student), which alone is the papers' choice", "distributions"
    ),
    "reverse_kl": Loss(reverse_kl, "reverse KL", "KL(student, teacher)", "distributions"),
    "jensen_shannon": Loss(
        jensen_shannon,
        "Jensen-Shannon",
        "the divergence of both from a mixture of the two, see `jensen_shannon_beta`",
        "distributions",
        options=("beta",),
    ),
    "mse": Loss(mse, "squared difference of logits", "the squared difference of the logits", "logits"),
    "cosine": Loss(cosine, "cosine of logits", "1 - the cosine between the logits", "logits"),
    "cross_entropy": Loss(
        cross_entropy, "cross-entropy", "-log of the probability of the text, which asks no teacher", "text"
    ),
}
LossName = Annotated[str, choice(LOSSES)]


def losses_that_read(*kinds: Literal["distributions", "logits", "text"]) -> list[str]:
    """The names of the losses that read one of these."""
    return [name for name, loss in LOSSES.items() if loss.reads in kinds]


@dataclass(frozen=True)
class TopK:
    """The tokens that a teacher finds likeliest, and how likely it finds all the others together."""

    ids: Int[Tensor, "tokens k"]
    log_probs: Float[Tensor, "tokens k"]
    tail: Float[Tensor, " tokens"]  # logarithm of the others' probability

    @classmethod
    def of(cls, logits: Float[Tensor, "tokens vocab"], k: int) -> "TopK":
        log_p = logits.log_softmax(-1)
        top = log_p.topk(min(k, logits.shape[-1]), dim=-1)
        rest = log_p.scatter(-1, top.indices, -math.inf).logsumexp(-1).clamp_min(LEAST_TAIL)
        return cls(top.indices, top.values, rest)

    def rows(self, rows: slice) -> "TopK":
        return TopK(self.ids[rows], self.log_probs[rows], self.tail[rows])


@dataclass(frozen=True)
class Objective:
    """What a student is trained for: a weighted sum of losses.

    Losses against the teacher's distribution are taken of softmax(logits / temperature), times temperature squared,
    which keeps gradients comparable across temperatures (Hinton et al. 2015, section 2). Losses that read logits or
    the text know no temperature.

    top_k: of the teacher's distribution only the k likeliest tokens, and the rest as one outcome more. What is lost is
        how the rest is spread: the divergence is a lower bound of that of the whole vocabulary, equal at k = vocab, and
        leaves the student free within the rest.
    tail: without it the rest is forgotten, and both distributions are scaled up to 1 over the k tokens. This is no
        bound: it is 0 for any student that has the proportions among them right, whatever it gives to the rest.
    compiled: take the forward KL of a whole vocabulary, and its gradient, with torch.compile.
    """

    terms: Mapping[str, float] = field(default_factory=lambda: {"forward_kl": 1.0})
    temperature: float = 1.0
    beta: float = 0.5
    top_k: int | None = None
    tail: bool = True
    compiled: bool = False

    @property
    def needs_teacher(self) -> bool:
        return bool(self.reads - {"text"})

    @property
    def reads(self) -> set[str]:
        """The kinds of what its losses read."""
        return {LOSSES[name].reads for name in self.terms}

    def __call__(
        self,
        student: Float[Tensor, "tokens vocab"],
        teacher: Float[Tensor, "tokens vocab"] | TopK | None,
        targets: Int[Tensor, " tokens"],
    ) -> Float[Tensor, " tokens"]:
        """The loss of each token, from logits, or what is known of the teacher's."""
        found = []
        distributions = None
        for name, weight in self.terms.items():
            loss = LOSSES[name]
            options = {option: getattr(self, option) for option in loss.options}
            match loss.reads:
                case "text":
                    value = loss.of(student, targets, **options)
                case "logits":
                    assert isinstance(teacher, Tensor), f"{name} needs all of the teacher's logits"
                    value = loss.of(student, teacher, **options)
                case "distributions":
                    distributions = distributions or self._distributions(student, teacher)
                    value = self.temperature**2 * loss.of(*distributions, **options)
            found.append(weight * value)
        return torch.stack(found).sum(0) if len(found) > 1 else found[0]

    def with_slope(
        self,
        student: Float[Tensor, "tokens vocab"],
        teacher: Float[Tensor, "tokens vocab"] | TopK | None,
        targets: Int[Tensor, " tokens"],
        transform: LogitTransform,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens vocab"]]:
        """The sum over tokens, of logits that are yet to be transformed, and its gradient in them."""
        plain = self.terms == {"forward_kl": 1.0} and self.top_k is None and transform == LogitTransform()
        if plain and isinstance(teacher, Tensor):
            of_kl = _compiled_forward_kl() if self.compiled else _forward_kl_with_slope
            return of_kl(student, teacher, self.temperature)
        with torch.enable_grad():
            student = student.detach().requires_grad_()
            value = self(transform(student), teacher, targets).sum()
            (slope,) = torch.autograd.grad(value, student)
        return value.detach(), slope

    def _distributions(self, student: Tensor, teacher: Tensor | TopK | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the teacher and the student, of tokens or of the k likeliest and the rest."""
        assert teacher is not None, "the loss needs a teacher"
        log_q = (student / self.temperature).log_softmax(-1)
        if isinstance(teacher, Tensor):
            if self.top_k is None:
                return (teacher / self.temperature).log_softmax(-1), log_q
            teacher = TopK.of(teacher / self.temperature, self.top_k)
        log_p, top_q = teacher.log_probs, log_q.gather(-1, teacher.ids)
        if not self.tail:
            return log_p.log_softmax(-1), top_q.log_softmax(-1)
        if top_q.shape[-1] == log_q.shape[-1]:
            return log_p, top_q
        rest = log_q.scatter(-1, teacher.ids, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([log_p, teacher.tail[:, None]], -1), torch.cat([top_q, rest], -1)


def _forward_kl_with_slope(
    student: Float[Tensor, "tokens vocab"], teacher: Float[Tensor, "tokens vocab"], temperature: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens vocab"]]:
    """What autograd would give, in fewer passes over memory: the gradient of a token's KL in its logits is q - p."""
    log_q = torch.log_softmax(student / temperature if temperature != 1 else student, -1)
    log_p = torch.log_softmax(teacher / temperature if temperature != 1 else teacher, -1)
    p = log_p.exp()
    value = torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
    return value * temperature**2, log_q.exp_().sub_(p).mul_(temperature)


@cache
def _compiled_forward_kl() -> Callable[..., tuple[Tensor, Tensor]]:
    # Without what may check the types of its arguments.
    return torch.compile(unwrap(_forward_kl_with_slope), dynamic=True)


def chunked_loss(
    objective: Objective,
    student: LazyLogits,
    teacher: LazyLogits | TopK | None,
    targets: Int[Tensor, " tokens"],
    *,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Sum of an objective over tokens; differentiable in the student's hidden states and output projection.

    Logits of both models exist for `chunk` tokens at a time, and gradients are taken on the way, so backward only
    scales them.

    Args:
        dtype: bfloat16 lets products round their inputs to it; logits are float32 in any case.
        chunk: tokens at a time; default `usual_chunk`.
    """
    chunk = chunk or usual_chunk(student.head, CPU_TEMPORARIES if student.head.is_cpu else TEMPORARIES)
    return _ChunkedLoss.apply(
        objective, student.hidden, student.head, student.transform, teacher, targets, dtype, chunk
    )


def _parts(logits: Float[Tensor, "tokens vocab"]) -> Iterator[slice]:
    """Rows that are worked on together: on a CPU as many as its caches hold, elsewhere all."""
    tokens, vocab = logits.shape
    if not logits.is_cpu:
        return _slices(tokens, tokens)
    return _slices(tokens, torch.get_num_threads() * max(1, PART_BYTES // (vocab * logits.itemsize)))


def _vocab_parts(head: Float[Tensor, "vocab hidden"]) -> Iterator[slice]:
    """Rows of a head whose gradients make one tensor beside all of it."""
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
    """The sum of an objective, and its gradient in logits that are yet to be transformed, in `dtype`.

    In float32 the gradient takes the logits' place.
    """
    slopes = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    total = logits.new_zeros((), dtype=torch.float64)
    for part in _parts(logits):
        known = teacher.rows(part) if isinstance(teacher, TopK) else None if teacher is None else teacher[part]
        value, slopes[part] = objective.with_slope(logits[part], known, targets[part], transform)
        total += value
    return total, slopes


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        objective: Objective,
        hidden: Tensor,
        head: Tensor,
        transform: LogitTransform,
        teacher: LazyLogits | TopK | None,
        targets: Tensor,
        dtype: torch.dtype,
        chunk: int,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float64)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        head_32 = head.detach().float()
        # Gradients may be rounded where logits may not: products of bfloat16 with results of bfloat16 are the fastest.
        head_low, hidden_low = head_32.to(dtype), hidden.detach().to(dtype)
        if isinstance(teacher, LazyLogits):
            # The head in float32 once, not once a chunk.
            teacher = LazyLogits(teacher.hidden.detach(), teacher.head.detach().float(), teacher.transform)
        with matmul_precision(dtype):
            for rows in _slices(len(hidden), chunk):
                known = None if teacher is None else teacher.rows(rows)
                logits = project(hidden[rows].detach(), head_32)
                value, slopes = _with_slopes(objective, logits, known, targets[rows], transform, dtype)
                del logits, known  # nothing of a chunk may be there still when the next one is made
                total += value
                grad_hidden[rows] = slopes @ head_low
                for tokens_of in _vocab_parts(grad_head):
                    grad_head[tokens_of] += slopes[:, tokens_of].T @ hidden_low[rows]
                del slopes
        # Not saved by autograd, so that backward can scale them where they lie: a head's gradient is large.
        ctx.gradients = grad_hidden.to(hidden.dtype), grad_head.to(head.dtype)
        return total.float()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients, "the gradients of a chunked loss are there for one backward pass"
        (grad_hidden, grad_head), ctx.gradients = ctx.gradients, None
        return None, grad_hidden.mul_(scale), grad_head.mul_(scale), None, None, None, None, None
