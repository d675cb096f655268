"""Scores from sums are the formulas on the activations themselves."""

import json
import math
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from minitron.calibration.collect import measure_statistics, sample_sums
from minitron.calibration.statistics import SEQUENCE_AGGREGATES, Statistics
from minitron.core.errors import PlanError
from minitron.model.checkpoint import open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.pruning.cut import cut_tensor
from minitron.pruning.importance import CRITERIA, Scores, activation_scores, aggregate, magnitude_scores, random_scores
from minitron.pruning.plan import Plan

AGGREGATES = {
    "mean": lambda values: sum(values) / len(values),
    "l2": lambda values: math.sqrt(sum(value**2 for value in values)),
    "variance": lambda values: sum(value**2 for value in values) / len(values) - (sum(values) / len(values)) ** 2,
}
PAIRS = list(product(AGGREGATES, repeat=2))


def plain(samples: list[Tensor], sequence: str, batch: str) -> Tensor:
    """|a| of every channel, reduced over each sample's tokens, then over samples, number by number."""
    return torch.tensor(
        [
            AGGREGATES[batch]([AGGREGATES[sequence](sample[:, channel].abs().tolist()) for sample in samples])
            for channel in range(samples[0].shape[1])
        ],
        dtype=torch.float64,
    )


@pytest.fixture(scope="module")
def measured(llama: Path) -> tuple[Any, Statistics]:
    checkpoint = open_checkpoint(llama)
    return checkpoint.shape, measure_statistics(checkpoint, Samples(tiny.tokens(5, 9)), Pass(torch.float32, batch=2))


@pytest.mark.parametrize(("sequence", "batch"), PAIRS)
def test_aggregates_of_sums_are_the_formulas_on_activations(sequence: Any, batch: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(tokens, 6, generator=generator) for tokens in (5, 9, 3)]
    sums = sample_sums([sample.abs() for sample in samples]).sum(0)[None]
    torch.testing.assert_close(
        aggregate(sums, len(samples), sequence, batch)[0], plain(samples, sequence, batch), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("sequence", "batch"), PAIRS)
def test_scores_combine_channels_as_the_paper_says(measured: Any, sequence: Any, batch: Any) -> None:
    shape, statistics = measured
    scores = activation_scores(statistics, shape, sequence, batch)

    def channel(site: str, layer: int, index: int) -> float:
        total, squares = statistics.sums[site][layer, SEQUENCE_AGGREGATES.index(sequence), :, index].tolist()
        count = statistics.samples
        return {"mean": total / count, "l2": squares**0.5, "variance": squares / count - (total / count) ** 2}[batch]

    for layer in range(shape.layers):
        assert scores.layers[layer].item() == pytest.approx(1 - statistics.cosine[layer].item())
        for neuron in range(shape.ffn):
            assert scores.ffn[layer, neuron].item() == pytest.approx(channel("mlp_out", layer, neuron))
        for head in range(shape.heads):
            own = [channel("attention_out", layer, head * shape.head_dim + c) for c in range(shape.head_dim)]
            assert scores.heads[layer, head].item() == pytest.approx(math.hypot(*own))
        for kv_head in range(shape.kv_heads):
            group = scores.heads[layer, kv_head * shape.group : (kv_head + 1) * shape.group]
            assert scores.kv_heads[layer, kv_head].item() == pytest.approx(sum(group.tolist()))
    for hidden in range(shape.hidden):
        outputs = [channel(site, i, hidden) for i in range(shape.layers) for site in ("attention_in", "mlp_in")]
        assert scores.hidden[hidden].item() == pytest.approx(sum(outputs))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_have_one_number_per_unit(measured: Any, criterion: str) -> None:
    shape, statistics = measured
    scores = CRITERIA[criterion].score(statistics, shape)
    assert {field.name: tuple(getattr(scores, field.name).shape) for field in fields(Scores)} == {
        "layers": (shape.layers,),
        "hidden": (shape.hidden,),
        "ffn": (shape.layers, shape.ffn),
        "heads": (shape.layers, shape.heads),
        "kv_heads": (shape.layers, shape.kv_heads),
    }


@pytest.mark.parametrize("directory", tiny.FIRST.values(), indirect=True)
def test_the_magnitude_of_a_unit_is_the_norm_of_what_goes_with_it(directory: Path) -> None:
    """Without the unit, the squares of the layers' matrices sum to so much less."""
    checkpoint = open_checkpoint(directory)
    shape = checkpoint.shape
    scores = magnitude_scores(measure_statistics(checkpoint, Samples(tiny.tokens(1, 3)), Pass(torch.float32)), shape)
    every = {"layers": range(shape.layers), "hidden": range(shape.hidden), "ffn": range(shape.ffn)}
    every |= {"heads": range(shape.heads), "kv_heads": range(shape.kv_heads)}
    stored = tiny.tensors(directory)
    matrices = {name: t.double() for name, t in stored.items() if ".layers." in name and t.ndim == 2}
    total = sum(matrix.square().sum() for matrix in matrices.values())

    def without(dim: str, layer: int, unit: int) -> Tensor:
        kept = {name: [*units] for name, units in every.items()}
        kept[dim].remove(unit)
        if dim == "kv_heads":
            kept["heads"] = [head for head in kept["heads"] if head // shape.group != unit]
        plan = Plan(
            teacher=shape,
            student=replace(shape, **{name: len(units) for name, units in kept.items()}),
            layers=tuple(kept["layers"]),
            hidden=tuple(kept["hidden"]),
            **{name: (tuple(kept[name]),) * shape.layers for name in ("ffn", "heads", "kv_heads")},
        )
        specs = [s for s in checkpoint.specs() if s.name in matrices and (dim == "hidden" or s.layer == layer)]
        cut = sum(cut_tensor(matrices[s.name].float(), s, plan).double().square().sum() for s in specs)
        others = sum(matrices[name].square().sum() for name in matrices.keys() - {s.name for s in specs})
        return cut + others

    for dim, layer, unit in (("hidden", 0, 5), ("ffn", 2, 7), ("heads", 1, 3), ("kv_heads", 3, 2)):
        found = getattr(scores, dim)[unit] if dim == "hidden" else getattr(scores, dim)[layer, unit]
        assert found.item() == pytest.approx((total - without(dim, layer, unit)).sqrt().item(), rel=1e-4)


def test_random_scores_are_those_of_their_seed(measured: Any) -> None:
    shape, statistics = measured
    one, again, other = (random_scores(statistics, shape, seed=seed) for seed in (3, 3, 4))
    for dim in ("hidden", "ffn", "heads", "kv_heads"):
        assert torch.equal(getattr(one, dim), getattr(again, dim))
        assert not torch.equal(getattr(one, dim), getattr(other, dim))


def test_statistics_without_weights_say_what_a_criterion_lacks_and_how_to_get_it(measured: Any, tmp_path: Path) -> None:
    shape, statistics = measured
    replace(statistics, weight_squares={}).save(tmp_path)
    old = Statistics.load(tmp_path)
    with pytest.raises(PlanError, match=r"'magnitude' needs the norms of weights, .* again with `minitron calibrate`"):
        magnitude_scores(old, shape)
    assert torch.equal(activation_scores(old, shape).ffn, activation_scores(statistics, shape).ffn)


def test_save_and_load_round_trip(measured: Any, tmp_path: Path) -> None:
    shape, statistics = measured
    scores = activation_scores(statistics, shape, "mean", "l2")
    scores.layers[-1] = torch.inf  # of a layer that stays in any case
    scores.save(tmp_path)
    for field in fields(Scores):
        assert torch.equal(getattr(Scores.load(tmp_path, shape), field.name), getattr(scores, field.name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows | {"hidden": rows["hidden"][:-1]}, "hidden has not a score for each of the model's units"),
        (lambda rows: rows | {"ffn": rows["ffn"][:-1]}, "ffn has not a score for each of the model's units"),
        (lambda rows: rows | {"heads": None}, r"is not scores of units: heads: .*valid list \(got None\)"),
        (lambda rows: rows | {"hidden": [math.nan]}, r"is not scores of units: hidden.0: .*\(got nan\)"),
        (lambda rows: [rows], "is not scores of units"),
    ],
)
def test_damaged_scores_are_named(measured: Any, tmp_path: Path, change: Any, message: str) -> None:
    shape, statistics = measured
    activation_scores(statistics, shape).save(tmp_path)
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(PlanError, match=rf"scores.json.*{message}.*; remove .* to score again"):
        Scores.load(tmp_path, shape)
