"""Feasible shapes are ranked at three levels; measurements come in as a function.

1. `predictor` ranks every shape by the statistics alone.
2. The best of these are cut, and ranked by their loss.
3. Successive elimination distils them for a while, and goes on with the best quarter each time.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from minitron.calibration.statistics import Statistics
from minitron.core.errors import PlanError
from minitron.model.architecture import Shape
from minitron.model.describe import K_BLOCK
from minitron.pruning.importance import Scores
from minitron.shapes.space import Candidate, Machine, SearchConfig

# What it costs to lose a share of the residual stream's energy, in nats of KL to the teacher right after the cut: of
# what dropped layers, query heads, whole groups of heads and neurons write to the stream, and of what all matrices read
# from it (docs/log). The first numbers are of cuts whose repair makes up for the dim, the second of plain ones.
COSTS = {"layers": (1.7, 4.0), "hidden": (22.0, 22.0), "ffn": (2.1, 4.0), "heads": (1.7, 2.7), "kv_heads": (3.5, 4.0)}
POWER = 1.2  # of the share: what is dropped first is dispensable, and a second dim is cheaper than more of the first
OF_FEW_LAYERS = 4  # layers cost 1 + OF_FEW_LAYERS / their number times as much: of few, each does what no other can
# Sizes in multiples of K_BLOCK suit kernels and GGUF's blocks: each halving of the multiple counts as so much more
# damage.
OF_HALVING = 0.01

# Successive elimination: the share that each round keeps, and how many times as long those train. Early losses tell bad
# shapes apart and mistake good ones: halving after each doubling dropped the best shape on one of six tables, these on
# none (docs/log).
KEPT, LONGER = 1 / 4, 8

LossAt = Callable[[Candidate, int], float]


@dataclass(frozen=True)
class Ranked:
    """A candidate with its prediction and the losses that were measured.

    predicted: the damage that `predictor` gives, about the KL to the teacher right after the cut, in nats per token.
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
    repaired: Collection[str] = (),
    reads: Float[Tensor, "hidden hidden"] | None = None,
) -> Callable[[Shape], float]:
    """Make a function shape -> the damage of a cut to it, an estimate of the KL to the teacher right after the cut.

    The damages of the dims add up. Of the layers that stay, it is what the dropped neurons, heads and groups of heads
    wrote to the residual stream, as a share of its energy; of the others, what they wrote in all; of the stream, the
    share of the matrices' inputs that is gone. Each share to the POWER counts with its COSTS, which fit measured cuts
    of four models (docs/log). Sizes that are no multiples of 256 count as a little more.

    Args:
        repaired: the dims whose cut a repair makes up for: the neurons and heads that write least are dropped, else
            those of the lowest scores.
        reads: where the stream keeps its leading directions, `reading_moment` of the teacher; the statistics then hold
            the second moment. Else it keeps the channels of the highest scores.

    Raises: PlanError if the statistics are of an older version, which did not collect what units write.
    """
    written = statistics.written
    if not written:
        raise PlanError(
            "the shape of the student is predicted from what units write to the residual stream, and the statistics "
            "lack that: they were collected by an older version; collect them again with `minitron calibrate`"
        )
    with_heads = {"kv_heads"} if "heads" in repaired else set()
    cost = {dim: pair[dim not in with_heads.union(repaired)] for dim, pair in COSTS.items()}
    cost["layers"] *= 1 + OF_FEW_LAYERS / teacher.layers
    order = scores.layers.argsort(descending=True, stable=True)
    dropped = written["layers"][order].flip(0).cumsum(0).flip(0)
    lost_layers = [*dropped.tolist(), 0.0]  # by the number of layers that stay
    by_score = written["ffn"] if "ffn" in repaired else scores.ffn
    # [layers that stay, neurons that stay]
    lost_ffn = _sums(torch.stack([_lost(*row) for row in zip(by_score, written["ffn"], strict=True)])[order])
    if reads is not None:
        lost_stream = _lost_reads(reads, statistics)
    else:
        energy = statistics.column_squares()
        read = _shares(energy["attention_in"]).mean(0) + _shares(energy["mlp_in"]).mean(0)
        lost_stream = _lost(scores.hidden, read / 2)

    @cache
    def lost_heads(kept: int, kv_kept: int) -> tuple[list[float], list[float]]:
        """What heads of the groups that stay wrote, and dropped groups, by the number of layers that stay."""
        group, groups = kept // kv_kept, (teacher.kv_heads, teacher.group)
        rank_of = written["heads"] if "heads" in repaired else scores.heads
        rank_of_kv = rank_of.unflatten(-1, groups).sum(-1) if "heads" in repaired else scores.kv_heads
        by_group = written["heads"].unflatten(-1, groups)
        in_groups = rank_of.unflatten(-1, groups).argsort(dim=-1, descending=True, stable=True)[..., :group]
        of_heads = by_group.sum(-1) - by_group.gather(-1, in_groups).sum(-1)
        best = rank_of_kv.argsort(dim=-1, descending=True, stable=True)[:, :kv_kept]
        of_groups = by_group.sum((-1, -2)) - by_group.sum(-1).gather(-1, best).sum(-1)
        rows = of_heads.gather(-1, best).sum(-1), of_groups
        heads, kv_heads = ([0.0, *row[order].cumsum(0).tolist()] for row in rows)
        return heads, kv_heads

    def damage(shape: Shape) -> float:
        of_heads, of_groups = lost_heads(shape.heads, shape.kv_heads)
        lost = {
            "layers": lost_layers[shape.layers],
            "hidden": lost_stream[shape.hidden].item(),
            "ffn": lost_ffn[shape.layers, shape.ffn].item(),
            "heads": of_heads[shape.layers],
            "kv_heads": of_groups[shape.layers],
        }
        return _handling(teacher, shape) * sum(cost[dim] * max(0.0, share) ** POWER for dim, share in lost.items())

    return damage


def _handling(teacher: Shape, shape: Shape) -> float:
    """Return a factor of the damage by the multiples that the cut sizes are: 1 for multiples of 256."""
    cut = [size for dim in ("hidden", "ffn") if (size := getattr(shape, dim)) != getattr(teacher, dim)]
    return 1 + OF_HALVING * sum(math.log2(K_BLOCK / math.gcd(K_BLOCK, size)) for size in cut)


def _shares(energy: Float[Tensor, "rows units"]) -> Float[Tensor, "rows units"]:
    return energy / energy.sum(-1, keepdim=True)


def _lost_reads(reads: Float[Tensor, "hidden hidden"], statistics: Statistics) -> Float[Tensor, " counts"]:
    """Return the share of the read signal that is lost if n leading directions stay, for n = 0 ... all."""
    assert statistics.second_moment is not None
    directions = torch.linalg.eigh(
        statistics.second_moment.float()
    ).eigenvectors.double()  # ascending: first to go first
    seen = [directions.T @ matrix @ directions for matrix in (reads, statistics.covariance())]
    # Of the n directions that carry least, all pairs: two of them may be read together.
    lost = (seen[0] * seen[1]).cumsum(0).cumsum(1).diagonal()
    return torch.cat([lost.new_zeros(1), lost / lost[-1]]).flip(0)


def _lost(scores: Float[Tensor, " units"], energy: Float[Tensor, " units"]) -> Float[Tensor, " counts"]:
    """Return the energy that is lost if the n highest-scored units stay, for n = 0 ... all."""
    ascending = energy[scores.argsort(descending=True, stable=True)].flip(0)
    return torch.cat([ascending.new_zeros(1), ascending.cumsum(0)]).flip(0)


def _sums(rows: Float[Tensor, "layers counts"]) -> Float[Tensor, "more counts"]:
    """Return the sums of the first n rows, for n = 0 ... all."""
    return torch.cat([rows.new_zeros(1, rows.shape[1]), rows.cumsum(0)])
