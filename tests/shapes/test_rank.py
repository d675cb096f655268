"""A search ranks by what it knows, spends tokens where it says, and its winner is found again by an exhaustive one."""

import math
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
from minitron.model.checkpoint import open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.pruning.importance import Scores, activation_scores
from minitron.pruning.plan import choose
from minitron.pruning.repair.residual_basis import reading_moment
from minitron.shapes.rank import (
    REPAIRED_POWERS,
    STREAM_POWER,
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
def teacher(llama: Path) -> tuple[Shape, Statistics, Scores]:
    checkpoint = open_checkpoint(llama)
    statistics = measure_statistics(checkpoint, Samples(tiny.tokens(6, 24)), Pass(torch.float32))
    return checkpoint.shape, statistics, activation_scores(statistics, checkpoint.shape, "mean", "l2")


def test_the_damage_is_that_of_the_plans_own_units(teacher: tuple[Shape, Statistics, Scores]) -> None:
    """The curves give what adding up the energy of each kept unit of the plan gives."""
    shape, statistics, scores = teacher
    damage = predictor(statistics, scores, shape)
    squares = {site: sums[:, 1, 1] for site, sums in statistics.sums.items()}
    angles = statistics.cosine.arccos()
    for sizes in ({}, {"hidden": 20}, {"ffn": 9, "layers": 3}, {"heads": 4}, {"kv_heads": 2, "heads": 2, "hidden": 8}):
        student = replace(shape, **sizes)
        plan = choose(scores, shape, student)
        stream, survives = 0.0, 0.0
        for site in ("attention_in", "mlp_in"):
            for row in squares[site]:
                stream += sum(row[list(plan.hidden)]).item() / row.sum().item() / (2 * shape.layers)
        for index, layer in enumerate(plan.layers):
            mlp = sum(squares["mlp_out"][layer][list(plan.ffn[index])]) / squares["mlp_out"][layer].sum()
            row = squares["attention_out"][layer].view(shape.heads, -1).sum(1)
            attention = sum(row[list(plan.heads[index])]) / row.sum()
            survives += (angles[layer] / angles.sum() * (mlp + attention) / 2).item()
        expected = -torch.tensor(stream**STREAM_POWER * survives, dtype=torch.float64).log().item()
        assert damage(student) == pytest.approx(expected, abs=1e-9)
    assert damage(shape) == pytest.approx(0, abs=1e-9)


def test_of_a_repaired_cut_matrices_read_what_the_leading_directions_leave(llama: Path) -> None:
    """For states drawn with the stream's moments, the variance of each matrix's output that is left."""
    checkpoint = open_checkpoint(llama)
    statistics = measure_statistics(checkpoint, Samples(tiny.tokens(6, 24)), Pass(torch.float32), second_moment=True)
    scores, shape = activation_scores(statistics, checkpoint.shape), checkpoint.shape
    moment, mean = statistics.second_moment, statistics.mean
    assert moment is not None and mean is not None
    trailing = torch.linalg.svd(moment).U[:, 20:]
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
    left = 1 - sum(lost) / len(lost)
    reads = reading_moment(checkpoint, statistics)
    damage = predictor(statistics, scores, shape, reads=reads)
    assert damage(replace(shape, hidden=20)) == pytest.approx(-REPAIRED_POWERS["hidden"] * math.log(left), rel=1e-4)
    assert damage(shape) == pytest.approx(0, abs=1e-9)
    with pytest.raises(PlanError, match="hold no second moment"):
        reading_moment(checkpoint, replace(statistics, second_moment=None))


def test_of_a_repaired_cut_units_and_layers_weigh_by_their_powers(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    statistics = measure_statistics(checkpoint, Samples(tiny.tokens(6, 24)), Pass(torch.float32), second_moment=True)
    scores, shape = activation_scores(statistics, checkpoint.shape), checkpoint.shape
    damage = predictor(statistics, scores, shape, reads=reading_moment(checkpoint, statistics))
    way = statistics.cosine.arccos() / statistics.cosine.arccos().sum()
    student = replace(shape, ffn=9, layers=3, heads=4)
    plan = choose(scores, shape, student)
    squares = {site: sums[:, 1, 1] for site, sums in statistics.sums.items()}
    survives = {"ffn": 0.0, "heads": 0.0, "layers": way[list(plan.layers)].sum().item()}
    for index, layer in enumerate(plan.layers):
        share = way[layer].item() / survives["layers"]
        mlp, attention = squares["mlp_out"][layer], squares["attention_out"][layer].view(shape.heads, -1).sum(1)
        survives["ffn"] += share * (mlp[list(plan.ffn[index])].sum() / mlp.sum()).item()
        survives["heads"] += share * (attention[list(plan.heads[index])].sum() / attention.sum()).item()
    expected = -sum(REPAIRED_POWERS[dim] * math.log(left) for dim, left in survives.items())
    assert damage(student) == pytest.approx(expected, rel=1e-9)


def test_a_smaller_student_is_never_predicted_to_be_better(teacher: tuple[Shape, Statistics, Scores]) -> None:
    shape, statistics, scores = teacher
    damage = predictor(statistics, scores, shape)
    for dim, smaller in (("layers", 3), ("hidden", 24), ("ffn", 30), ("heads", 4)):
        once = replace(shape, **{dim: smaller})
        assert damage(once) > damage(shape)
        assert damage(replace(once, ffn=20, layers=2)) > damage(once)
