"""The objective of a training: a weighted sum of losses, against all of a teacher's logits or its likeliest ones."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import unwrap

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitron.distillation.losses import LOSSES
from minitron.model.logits import LazyLogits, LogitTransform

# Least logarithm of the probability that a list of the likeliest tokens leaves for all others: what float32 rounds to
# nothing would else be infinitely unlikely.
LEAST_TAIL = -80.0


@dataclass(frozen=True)
class TopK:
    """A teacher's k likeliest next tokens with their probabilities, and the probability of all others together."""

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
class TeacherOutput:
    """A teacher's outputs for a batch.

    logits: of every token that another is predicted from.
    hidden_states: of all tokens, after the layers that were asked for: 0 is the embedding's output, n that of the nth.
    """

    logits: LazyLogits | TopK
    hidden_states: Mapping[int, Float[Tensor, "blocks tokens hidden"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """A student is trained for an objective, a weighted sum of losses.

    Losses between distributions are taken of softmax(logits / temperature), times temperature squared, which keeps
    gradients comparable across temperatures (Hinton et al. 2015, section 2). Losses that read logits or the text have
    no temperature.

    top_k: the number of the teacher's likeliest tokens that are compared one by one; all others are one more outcome.
        The divergence is then a lower bound of the divergence over the whole vocabulary, equal at k = vocab, and leaves
        the student free to spread the rest.
    tail: False leaves the rest out, and scales both distributions up to 1 over the k tokens. The loss is then no bound:
        it is 0 for any student with the right proportions among the k tokens, whatever it gives to the rest.
    compiled: compute the forward KL of a whole vocabulary, and its gradient, with torch.compile.
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
        """The kinds of input that its losses read, see `Loss.reads`."""
        return {LOSSES[name].reads for name in self.terms}

    def __call__(
        self,
        student: Float[Tensor, "tokens vocab"],
        teacher: Float[Tensor, "tokens vocab"] | TopK | None,
        targets: Int[Tensor, " tokens"],
    ) -> Float[Tensor, " tokens"]:
        """Return the loss of each token."""
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
        """Return the sum over tokens and its gradient in the student's logits.

        Args:
            student: logits before `transform`.
        """
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
        """Return log-probabilities of teacher and student: of all tokens, or of the k likeliest and the rest."""
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
    """Compute autograd's result in fewer passes over memory: the gradient of a token's KL in its logits is q - p."""
    log_q = torch.log_softmax(student / temperature if temperature != 1 else student, -1)
    log_p = torch.log_softmax(teacher / temperature if temperature != 1 else teacher, -1)
    p = log_p.exp()
    value = torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
    return value * temperature**2, log_q.exp_().sub_(p).mul_(temperature)


@cache
def _compiled_forward_kl() -> Callable[..., tuple[Tensor, Tensor]]:
    # Without what may check the types of its arguments.
    return torch.compile(unwrap(_forward_kl_with_slope), dynamic=True)
