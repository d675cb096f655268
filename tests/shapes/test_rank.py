"""A search ranks by what it knows, spends tokens where it says, and its winner is found again by an exhaustive one."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_space import search

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import Statistics
from minitron.core.errors import PlanError
from minitron.model.architecture import Shape
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.pruning.importance import Scores, activation_scores
from minitron.pruning.plan import choose
from minitron.pruning.repair.residual_basis import reading_moment
from minitron.shapes.rank import (
    COSTS,
    OF_FEW_LAYERS,
    OF_HALVING,
    POWER,
    EliminationRound,
    distilled_steps,
    elimination_rounds,
    predictor,
    rank,
)
from minitron.shapes.space import Candidate, SearchConfig

STEPS = 64
DISTILLED = SearchConfig(level="distilled", cut_candidates=12, distill_candidates=8)


def candidates() -> list[Candidate]:
    return search("50%", window=0.2, dims={"layers": "2-4", "ffn": "8-40/4", "heads": "4,8"})


class Truth:
    """Losses that fall with the steps and never change their order: the quality plus 1 / (1 + step)."""

    def __init__(self, quality: Callable[[Candidate], float]):
        self.quality = quality
        self.asked: list[tuple[str, int]] = []
        self.dropped: list[str] = []

    def loss_at(self, candidate: Candidate, step: int) -> float:
        assert candidate.name not in self.dropped
        self.asked.append((candidate.name, step))
        return self.quality(candidate) + 1 / (1 + step)

    def drop(self, candidate: Candidate) -> None:
        self.dropped.append(candidate.name)


def predicted(shape: Shape) -> float:
    return shape.ffn % 7 + shape.layers / 10


def test_a_prediction_alone_orders_all_candidates() -> None:
    found = rank(candidates(), predicted, None, SearchConfig(level="predicted"))
    assert [one.predicted for one in found] == sorted(predicted(each.shape) for each in candidates())
    assert len(found) == len(candidates()) > DISTILLED.cut_candidates and not any(one.losses for one in found)


def test_the_best_predicted_are_measured_after_the_cut_and_the_best_of_these_win() -> None:
    truth = Truth(lambda each: each.costs.total)
    found = rank(candidates(), predicted, truth.loss_at, SearchConfig(level="cut", cut_candidates=5))
    best = sorted(candidates(), key=lambda each: predicted(each.shape))[:5]
    assert Counter(truth.asked) == Counter((each.name, 0) for each in best)
    assert [one.candidate for one in found[:5]] == sorted(best, key=lambda each: each.costs.total)
    assert {one.step for one in found[5:]} == {-1}


def test_elimination_finds_the_best_where_the_order_never_changes_and_spends_what_the_rungs_say() -> None:
    truth = Truth(lambda each: each.costs.total)
    found = rank(candidates(), predicted, truth.loss_at, DISTILLED, steps=STEPS, drop=truth.drop)
    measured = sorted(candidates(), key=lambda each: predicted(each.shape))[:12]
    assert found[0].candidate == min(measured, key=lambda each: each.costs.total)
    asked = Counter(step for _, step in truth.asked)
    assert asked == {0: 12, 4: 8, 32: 2}
    assert distilled_steps(found) == 6 * 4 + 2 * 32
    assert len(truth.dropped) == 11 and found[0].candidate.name not in truth.dropped
    assert [one.step for one in found[:13]] == [32, 32, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0, -1]
    for step in (0, 4, 32):
        losses = [one.losses[step] for one in found if one.step == step]
        assert losses == sorted(losses)


@pytest.mark.parametrize(
    ("num_candidates", "steps", "first", "expected"),
    [
        (16, 64, 1 / 16, [(16, 4, 4), (4, 32, 1)]),
        (5, 100, 0.1, [(5, 10, 2), (2, 80, 1)]),
        (8, 10, 0.5, [(8, 5, 2), (2, 10, 1)]),
        (65, 100, 0.01, [(65, 1, 17), (17, 8, 5), (5, 64, 2), (2, 100, 1)]),
        (4, 64, 0.25, [(4, 16, 1)]),
        (1, 64, 0.5, []),
    ],
)
def test_rounds_keep_a_quarter_and_train_it_eight_times_as_long_within_the_training(
    num_candidates: int, steps: int, first: float, expected: list[tuple[int, int, int]]
) -> None:
    found = elimination_rounds(num_candidates, steps, first)
    assert found == [EliminationRound(*one) for one in expected]


@pytest.fixture(scope="module")
def teacher(llama: Path) -> tuple[Checkpoint, Statistics, Scores]:
    checkpoint = open_checkpoint(llama)
    statistics = measure_statistics(checkpoint, Samples(tiny.tokens(6, 24)), Pass(torch.float32), second_moment=True)
    return checkpoint, statistics, activation_scores(statistics, checkpoint.shape, "mean", "l2")


SIZES: list[dict[str, int]] = [
    {},
    {"ffn": 9, "layers": 3},
    {"heads": 4},
    {"kv_heads": 2, "heads": 2, "layers": 1},
    {"ffn": 0, "heads": 4},
]


@pytest.mark.parametrize("repaired", [(), ("ffn", "heads", "layers")])
def test_the_damage_is_what_the_dropped_units_wrote_and_what_the_dropped_channels_held(
    teacher: tuple[Checkpoint, Statistics, Scores], repaired: tuple[str, ...]
) -> None:
    """A plain loop over the units that the plan drops; a repaired cut drops those that write least."""
    checkpoint, statistics, scores = teacher
    shape, written = checkpoint.shape, statistics.written
    by = replace(scores, ffn=written["ffn"], heads=written["heads"], kv_heads=written["heads"].view(4, 4, 2).sum(-1))
    damage = predictor(statistics, scores, shape, repaired=repaired)
    for sizes in SIZES:
        student = replace(shape, **({"hidden": 24} | sizes))
        plan = choose(by if repaired else scores, shape, replace(student, ffn=max(1, student.ffn)))
        lost = dict.fromkeys(COSTS, 0.0)
        for site in ("attention_in", "mlp_in"):
            for row in statistics.sums[site][:, 1, 1]:
                kept = sum(row[channel].item() for channel in plan.hidden)
                lost["hidden"] += (1 - kept / row.sum().item()) / (2 * shape.layers)
        for layer in range(shape.layers):
            if layer not in plan.layers:
                lost["layers"] += written["layers"][layer].item()
                continue
            index = plan.layers.index(layer)
            kept_ffn = plan.ffn[index] if student.ffn else ()
            lost["ffn"] += sum(written["ffn"][layer, unit].item() for unit in {*range(shape.ffn)} - {*kept_ffn})
            for head in {*range(shape.heads)} - {*plan.heads[index]}:
                dim = "heads" if head // shape.group in plan.kv_heads[index] else "kv_heads"
                lost[dim] += written["heads"][layer, head].item()
        # Whole groups are repaired with the heads.
        cost = {dim: pair[dim.removeprefix("kv_") not in repaired] for dim, pair in COSTS.items()}
        cost["layers"] *= 1 + OF_FEW_LAYERS / shape.layers
        expected = sum(cost[dim] * share**POWER for dim, share in lost.items())
        factor = 1 + OF_HALVING * (5 + (8 if student.ffn == 9 else 0))  # 24 is 3 * 8, 9 is odd, 0 a multiple of 256
        assert damage(student) == pytest.approx(expected * factor, rel=1e-6, abs=1e-9)
    assert damage(shape) == pytest.approx(0, abs=1e-9)


def test_sizes_in_multiples_of_256_count_as_no_more_damage(teacher: tuple[Checkpoint, Statistics, Scores]) -> None:
    checkpoint, statistics, scores = teacher
    larger = replace(checkpoint.shape, hidden=512)
    wide = replace(statistics, sums={site: sums.repeat(1, 1, 1, 16) for site, sums in statistics.sums.items()})
    damage = predictor(wide, replace(scores, hidden=torch.ones(512, dtype=torch.float64)), larger)
    sizes = (256, 128, 64, 96)
    plain = {hidden: damage(replace(larger, hidden=hidden)) / (1 - hidden / 512) ** POWER for hidden in sizes}
    assert plain[128] / plain[256] == pytest.approx(1 + OF_HALVING)
    assert plain[64] / plain[256] == pytest.approx(1 + 2 * OF_HALVING)
    assert plain[96] / plain[256] == pytest.approx(1 + 3 * OF_HALVING)


def test_of_a_repaired_cut_matrices_read_what_the_leading_directions_leave(
    teacher: tuple[Checkpoint, Statistics, Scores],
) -> None:
    """For states drawn with the stream's moments, the variance of each matrix's output that is lost."""
    checkpoint, statistics, scores = teacher
    shape, moment, mean = checkpoint.shape, statistics.second_moment, statistics.mean
    assert moment is not None and mean is not None
    trailing = torch.linalg.svd(moment).U[:, 24:]
    root = torch.linalg.cholesky(moment - mean.outer(mean))
    states = root @ torch.linalg.qr(torch.randn(shape.hidden, shape.hidden, dtype=torch.float64)).Q
    lost = []
    for layer in range(shape.layers):
        for norm, names in (
            ("input_layernorm", "self_attn.{}_proj q k v"),
            ("post_attention_layernorm", "mlp.{}_proj gate up"),
        ):
            gain = checkpoint.read(f"model.layers.{layer}.{norm}.weight").double()
            pattern, *kinds = names.split()
            for kind in kinds:
                weight = checkpoint.read(f"model.layers.{layer}.{pattern.format(kind)}.weight").double() * gain
                outputs = [(weight @ part).square().sum() for part in (trailing @ trailing.T @ states, states)]
                lost.append((outputs[0] / outputs[1]).item())
    reads = reading_moment(checkpoint, statistics)
    damage = predictor(statistics, scores, shape, repaired=("hidden",), reads=reads)
    expected = COSTS["hidden"][0] * (sum(lost) / len(lost)) ** POWER * (1 + 5 * OF_HALVING)
    assert damage(replace(shape, hidden=24)) == pytest.approx(expected, rel=1e-4)
    assert damage(shape) == pytest.approx(0, abs=1e-9)
    with pytest.raises(PlanError, match="hold no second moment"):
        reading_moment(checkpoint, replace(statistics, second_moment=None))


def test_a_smaller_student_is_never_predicted_to_be_better(teacher: tuple[Checkpoint, Statistics, Scores]) -> None:
    checkpoint, statistics, scores = teacher
    shape, damage = checkpoint.shape, predictor(statistics, scores, checkpoint.shape)
    for dim, smaller in (("layers", 3), ("hidden", 24), ("ffn", 30), ("heads", 4)):
        once = replace(shape, **{dim: smaller})
        assert damage(once) > damage(shape)
        assert damage(replace(once, ffn=20)) > damage(once)


def test_statistics_of_an_older_version_are_to_be_collected_again(
    teacher: tuple[Checkpoint, Statistics, Scores],
) -> None:
    checkpoint, statistics, scores = teacher
    with pytest.raises(PlanError, match="older version; collect them again with `minitron calibrate`"):
        predictor(replace(statistics, written={}), scores, checkpoint.shape)
