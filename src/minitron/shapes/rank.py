"""Feasible shapes are ranked at three levels; measurements come in as a function.

1. `predictor` ranks every shape by the statistics alone.
2. The best of these are cut, and ranked by their loss.
3. Successive elimination distils them for a while, and goes on with the best quarter each time.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from minitron.calibration.statistics import Statistics
from minitron.model.architecture import Shape
from minitron.pruning.importance import Scores
from minitron.shapes.space import Candidate, Machine, SearchConfig

# How often a path through the model meets the stream: embedding, q, k, v, o, output projection. Powers of 6 to 12 rank
# alike on the two models that were tried, and 3 (one read, one write, the output) far worse on one (docs/log).
STREAM_POWER = 6.0
# Of a repaired cut: what a lost share of the stream, of the layers' way, of neurons and of heads weighs, as powers.
# Every matrix misses what the stream lost, nothing makes up for a layer, and neurons and heads are half a layer each,
# of which the repair makes up for half (docs/log).
REPAIRED_POWERS = {"hidden": 4.0, "layers": 1.0, "ffn": 0.25, "heads": 0.25}

# Successive elimination: the share that each round keeps, and how many times as long those train. Early losses tell bad
# shapes apart and mistake good ones: halving after each doubling dropped the best shape on one of six tables, these on
# none (docs/log).
KEPT, LONGER = 1 / 4, 8

LossAt = Callable[[Candidate, int], float]


@dataclass(frozen=True)
class Ranked:
    """A candidate with its prediction and the losses that were measured.

    predicted: the damage that `predictor` gives; no unit, lower is better, comparable within one search.
    losses: distillation step -> loss on the judging blocks, nats per token; step 0 is right after the cut.
    """

    candidate: Candidate
    predicted: float
    losses: Mapping[int, float]

    @property
    def step(self) -> int:
        """The last step at which it was measured; -1 if it was not."""
        return max(self.losses, default=-1)

    def to_dict(self) -> dict[str, object]:
        """The candidate as candidates.json holds it."""
        losses = {str(step): loss for step, loss in self.losses.items()}
        return self.candidate.to_dict() | {"predicted": self.predicted, "losses": losses}


@dataclass(frozen=True)
class Ranking:
    """All shapes within the budgets, best first, and the conditions that they were ranked under.

    level: how far the search looked, as in `search.level`.
    machine, context_tokens, batch: the machine and the load that cache and times are computed for.
    step_tokens: tokens of a training step; 0 where nothing was trained.
    """

    level: str
    machine: Machine
    context_tokens: int
    batch: int
    step_tokens: int
    candidates: Sequence[Ranked]

    def to_dict(self) -> dict[str, object]:
        """The ranking as search/candidates.json holds it."""
        candidates = [one.to_dict() for one in self.candidates]
        return vars(self) | {"machine": asdict(self.machine), "candidates": candidates}


def rank(
    candidates: Sequence[Candidate],
    predict: Callable[[Shape], float],
    loss_at: LossAt | None,
    search: SearchConfig,
    *,
    steps: int = 0,
    drop: Callable[[Candidate], None] = lambda candidate: None,
) -> list[Ranked]:
    """Rank all candidates, best first: measured ones by their last step and its loss, the others by prediction.

    Args:
        loss_at: returns the loss of a candidate after so many distillation steps; steps only rise.
        steps: the number of steps of the final distillation.
        drop: is called with each candidate that was measured and goes no further.

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
            for rnd in elimination_rounds(len(staying), steps, search.first_rung):
                staying = measure(staying, rnd.step, rnd.keep)
    found = [Ranked(each, predicted[each.name], losses[each.name]) for each in candidates]
    return sorted(found, key=lambda one: (-one.step, one.losses.get(one.step, 0.0), one.predicted))


@dataclass(frozen=True)
class EliminationRound:
    """A round of successive elimination: `enter` candidates are trained up to `step`, and the best `keep` go on."""

    enter: int
    step: int
    keep: int


def elimination_rounds(num_candidates: int, steps: int, first: float) -> list[EliminationRound]:
    """Plan the rounds: each keeps the best quarter and trains it eight times as long, until one candidate is left.

    Args:
        steps: the steps of the whole training, which no round exceeds.
        first: the share of them in the first round.

    Paper: as successive halving (Jamieson and Talwalkar 2016, section 3), with fewer and later decisions.
    """
    found, step = [], max(1, round(first * steps))
    while num_candidates > 1:
        keep = math.ceil(num_candidates * KEPT) if step < steps else 1
        found.append(EliminationRound(num_candidates, min(step, steps), keep))
        num_candidates, step = keep, LONGER * step
    return found


def distilled_steps(found: Iterable[Ranked]) -> int:
    """Return the training steps that a search took, over all candidates."""
    return sum(max(0, one.step) for one in found)


def predictor(
    statistics: Statistics,
    scores: Scores,
    teacher: Shape,
    *,
    reads: Float[Tensor, "hidden hidden"] | None = None,
    stream_power: float = STREAM_POWER,
) -> Callable[[Shape], float]:
    """Make a function shape -> damage: minus the logarithm of the share of the teacher's signal that survives the cut.

    The residual stream turns from the embedding to the output; each layer's share of the way is the angle between its
    input and output, half of it from attention and half from the MLP. Of what a kept layer adds, there survives what
    passes the kept heads or neurons; and of everything what the narrower stream carries, as often as it is met. What
    survives of an activation is the share of its energy (sum of squares) in the units that the scores keep.

    A repaired cut keeps principal directions of the stream, and loses what the matrices read from the others. The
    shares of the stream, the layers' way, the neurons and the heads then count with REPAIRED_POWERS.

    Args:
        reads: for a repaired cut, `reading_moment` of the teacher; the statistics then hold the second moment.
        stream_power: how often a plain cut meets the stream.
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
    """Return the share of the read signal that n leading directions keep, for n = 0 ... all."""
    assert statistics.second_moment is not None
    directions = torch.linalg.eigh(
        statistics.second_moment.float()
    ).eigenvectors.double()  # ascending: first to go first
    seen = [directions.T @ matrix @ directions for matrix in (reads, statistics.covariance())]
    # Of the n directions that carry least, all pairs: two of them may be read together.
    lost = (seen[0] * seen[1]).cumsum(0).cumsum(1).diagonal()
    return 1 - torch.cat([lost.new_zeros(1), lost / lost[-1]]).flip(0)


def _curve(scores: Float[Tensor, " units"], energy: Float[Tensor, " units"]) -> Float[Tensor, " counts"]:
    """Return the share of the energy in the n highest-scored units, for n = 0 ... all."""
    ordered = energy[scores.argsort(descending=True, stable=True)]
    return torch.cat([ordered.new_zeros(1), ordered.cumsum(0) / ordered.sum()])
