"""The losses of a token between student and teacher, most of them in nats.

A new loss takes a function, a row of LOSSES, and a row of the tests.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitron.core.config import choice


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
    options: fields of Objective that `of` also takes, by their names.
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
    """Return the names of the losses that read one of these kinds."""
    return [name for name, loss in LOSSES.items() if loss.reads in kinds]
