"""Scores from sums are the formulas on the activations themselves."""

import math
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from minitron.model.checkpoint import open_checkpoint
from minitron.prune.calibrate import SEQUENCE_AGGREGATES, Statistics, calibrate, sample_sums
from minitron.prune.importance import CRITERIA, Scores, activation_scores, aggregate

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
    return checkpoint.shape, calibrate(checkpoint, tiny.tokens(5, 9), dtype=torch.float32, batch=2)


@pytest.mark.parametrize(("sequence", "batch"), PAIRS)
def test_aggregates_of_sums_are_the_formulas_on_activations(sequence: Any, batch: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(tokens, 6, generator=generator) for tokens in (5, 9, 3)]
    sums = torch.stack([sample_sums(sample) for sample in samples]).sum(0)[None]
    torch.testing.assert_close(
        aggregate(sums, len(samples), sequence, batch)[0], plain(samples, sequence, batch), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("sequence", "batch"), PAIRS)
def test_scores_combine_channels_as_the_paper_says(measured: Any, sequence: Any, batch: Any) -> None:
    shape, statistics = measured
    scores = CRITERIA["activation"](statistics, shape, sequence, batch)

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


def test_scores_have_one_number_per_unit(measured: Any) -> None:
    shape, statistics = measured
    scores = activation_scores(statistics, shape, "mean", "l2")
    assert {field.name: tuple(getattr(scores, field.name).shape) for field in fields(Scores)} == {
        "layers": (shape.layers,),
        "hidden": (shape.hidden,),
        "ffn": (shape.layers, shape.ffn),
        "heads": (shape.layers, shape.heads),
        "kv_heads": (shape.layers, shape.kv_heads),
    }


def test_save_and_load_round_trip(measured: Any, tmp_path: Path) -> None:
    shape, statistics = measured
    scores = activation_scores(statistics, shape, "mean", "l2")
    scores.save(tmp_path)
    for field in fields(Scores):
        assert torch.equal(getattr(Scores.load(tmp_path), field.name), getattr(scores, field.name))
