"""Ranking feasible shapes at three levels. Pure: what costs time comes in as a function.

1. `predictor`: from the statistics alone, for every shape.
2. The loss right after the cut, of the best predicted ones.
3. Successive elimination: short distillation runs that go on, each time of the best quarter.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minitron.calibration.statistics import Statistics
from minitron.model.architecture import Shape
from minitron.pruning.importance import Scores
from minitron.shapes.space import Candidate, SearchConfig

# How often a path through the model meets the stream: embedding, q, k, v, o, output projection. Powers of 6 to 12 rank
# alike on the two models that were tried, and 3 (one read, one write, the output) far worse on one (docs/log).
STREAM_POWER = 6.0
# Of a repaired cut: what a lost share of the stream, of the layers' way, of neurons and of heads weighs, as powers.
# Every matrix misses what the stream lost, nothing makes up for a layer, and neurons and heads are half a layer each,
# of which the repair makes up for half (docs/log).
REPAIRED_POWERS = {"hidden": 4.0, "layers": 1.0, "ffn": 0.25, "heads": 0.25}

# Successive elimination: the share that each rung drops to, and how many times as long those train. Early losses tell
# bad shapes apart and mistake good ones: halving after each doubling dropped the best shape on one of six tables, these
# on none (docs/log).
KEPT, LONGER = 1 / 4, 8

LossAt = Callable[[Candidate, int], float]


@dataclass(frozen=True)
class Ranked:
    """A candidate and what is known of it.

    predicted: of `predictor`; no unit, lower is better, comparable within one search.
    losses: distillation step -> loss on the judging blocks, nats per token; step 0 is right after the cut.
    """

    candidate: Candidate
    predicted: float
    losses: Mapping[int, float]

    @property
    def step(self) -> int:
        """The last step that it was measured at; -1 without any."""
        return max(self.losses, default=-1)

    def to_dict(self) -> dict[str, Any]:
        losses = {str(step): loss for step, loss in self.losses.items()}
        return self.candidate.to_dict() | {"predicted": self.predicted, "losses": losses}


def rank(
    candidates: Sequence[Candidate],
    predict: Callable[[Shape], float],
    loss_at: LossAt | None,
    search: SearchConfig,
    *,
    steps: int = 0,
    drop: Callable[[Candidate], None] = lambda candidate: None,
) -> list[Ranked]:
    """All candidates, best first: those that came furthest, by their loss there, and the unmeasured by prediction.

    Args:
        loss_at: the loss of a candidate after so many distillation steps, asked for in the order of rising steps.
        steps: of the final distillation.
        drop: told of each candidate that was measured and will not go on.

    Paper: P1 distils every candidate alike (section 3, "Lightweight Neural Architecture Search"); here each level
    leaves fewer for the next, and the winner's steps are kept.
    """
    predicted = {each.name: predict(each.shape) for each in candidates}
    losses: dict[str, dict[int, float]] = {each.name: {} for each in candidates}

    def measure(some: Iterable[Candidate], step: int, keep: int) -> list[Candidate]:
        assert loss_at is not None
        entered = list(some)
        for each in entered:
            losses[each.name][step] = loss_at(each, step)
        order = sorted(entered, key=lambda each: losses[each.name][step])
        for each in order[keep:]:
            drop(each)
        return order[:keep]

    if search.level in ("cut", "distilled"):
        best = sorted(candidates, key=lambda each: predicted[each.name])[: search.cut_candidates]
        staying = measure(best, 0, search.distill_candidates if search.level == "distilled" else 0)
        if search.level == "distilled":
            for rung in rungs(len(staying), steps, search.first_rung):
                staying = measure(staying, rung.step, rung.keep)
    found = [Ranked(each, predicted[each.name], losses[each.name]) for each in candidates]
    return sorted(found, key=lambda one: (-one.step, one.losses.get(one.step, 0.0), one.predicted))


@dataclass(frozen=True)
class Rung:
    enter: int  # candidates that are trained up to the step
    step: int
    keep: int  # of them go on


def rungs(num_candidates: int, steps: int, first: float) -> list[Rung]:
    """Each rung keeps the best quarter and trains it eight times as long, until one candidate is left.

    Args:
        steps: of the whole training, which no rung exceeds.
        first: share of them before the first rung.

    Paper: as successive halving (Jamieson and Talwalkar 2016, section 3), with fewer and later decisions.
    """
    found, step = [], max(1, round(first * steps))
    while num_candidates > 1:
        keep = math.ceil(num_candidates * KEPT) if step < steps else 1
        found.append(Rung(num_candidates, min(step, steps), keep))
        num_candidates, step = keep, LONGER * step
    return found


def distilled_steps(found: Iterable[Ranked]) -> int:
    """Training steps that a search took, over all candidates."""
    return sum(max(0, one.step) for one in found)


def predictor(
    statistics: Statistics,
    scores: Scores,
    teacher: Shape,
    *,
    reads: Float[Tensor, "hidden hidden"] | None = None,
    stream_power: float = STREAM_POWER,
) -> Callable[[Shape], float]:
    """A function shape -> damage: minus the logarithm of the share of the teacher's signal that survives its cut.

    The residual stream turns from the embedding to the output; each layer's share of the way is the angle between its
    input and output, half of it from attention and half from the MLP. Of what a kept layer adds, there survives what
    passes the kept heads or neurons; and of everything what the narrower stream carries, as often as it is met. What
    survives of an activation is the share of its energy (sum of squares) in the units that the scores keep.

    A repaired cut keeps principal directions of the stream, and loses what the matrices read from the others. The
    shares of the stream, the layers' way, the neurons and the heads then count with REPAIRED_POWERS.

    Args:
        reads: of a repaired cut, `prune.residual.reading_moment`; the statistics hold the second moment.
        stream_power: how often the stream of a plain cut is met.
    """
    energy = statistics.column_squares()
    angles = statistics.cosine.clamp(-1, 1).arccos()
    way = angles / angles.sum()
    order = scores.layers.argsort(descending=True, stable=True)
    ffn = torch.stack([_curve(*row) for row in zip(scores.ffn, energy["mlp_out"], strict=True)])
    per_head = energy["attention_out"].unflatten(-1, (teacher.heads, teacher.head_dim)).sum(-1)

    @cache
    def heads(kept: int, kv_kept: int) -> Tensor:  # [layers]
        group, groups = kept // kv_kept, (teacher.kv_heads, teacher.group)
        in_groups = scores.heads.unflatten(-1, groups).argsort(dim=-1, descending=True, stable=True)[..., :group]
        in_group = per_head.unflatten(-1, groups).gather(-1, in_groups).sum(-1)
        best = scores.kv_heads.argsort(dim=-1, descending=True, stable=True)[:, :kv_kept]
        return in_group.gather(-1, best).sum(-1) / per_head.sum(-1)

    if reads is not None:
        read = _read_curve(reads, statistics)

        def damage_repaired(shape: Shape) -> float:
            layers = order[: shape.layers]
            going = way[layers].sum().item()
            passing = {"ffn": ffn[:, shape.ffn], "heads": heads(shape.heads, shape.kv_heads)}
            shares = {dim: (way * share)[layers].sum().item() / going for dim, share in passing.items()}
            shares |= {"hidden": read[shape.hidden].item(), "layers": going}
            return -sum(power * _log(shares[dim]) for dim, power in REPAIRED_POWERS.items())

        return damage_repaired
    hidden = _curve(scores.hidden, _shares(energy["attention_in"]).mean(0) + _shares(energy["mlp_in"]).mean(0))

    def damage(shape: Shape) -> float:
        through = (ffn[:, shape.ffn] + heads(shape.heads, shape.kv_heads)) / 2
        kept = (way * through)[order[: shape.layers]].sum().item()
        return -stream_power * _log(hidden[shape.hidden].item()) - _log(kept)

    return damage


def _log(share: float) -> float:
    return math.log(max(share, sys.float_info.min))


def _shares(energy: Float[Tensor, "rows units"]) -> Float[Tensor, "rows units"]:
    return energy / energy.sum(-1, keepdim=True)


def _read_curve(reads: Float[Tensor, "hidden hidden"], statistics: Statistics) -> Float[Tensor, " counts"]:
    """Share of what is read that is left when only the n leading directions are, for n = 0 ... all."""
    assert statistics.second_moment is not None
    directions = torch.linalg.eigh(
        statistics.second_moment.float()
    ).eigenvectors.double()  # ascending: first to go first
    seen = [directions.T @ matrix @ directions for matrix in (reads, statistics.covariance())]
    # Of the n directions that carry least, all pairs: two of them may be read together.
    lost = (seen[0] * seen[1]).cumsum(0).cumsum(1).diagonal()
    return 1 - torch.cat([lost.new_zeros(1), lost / lost[-1]]).flip(0)


def _curve(scores: Float[Tensor, " units"], energy: Float[Tensor, " units"]) -> Float[Tensor, " counts"]:
    """Share of the energy in the n highest-scored units, for n = 0 ... all."""
    ordered = energy[scores.argsort(descending=True, stable=True)]
    return torch.cat([ordered.new_zeros(1), ordered.cumsum(0) / ordered.sum()])
