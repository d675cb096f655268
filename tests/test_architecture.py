"""The table predicts what transformers builds: names, shapes, counts, cache."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.errors import CheckpointError, PlanError
from minitron.model.architecture import Shape, kv_cache_bytes, with_sizes
from minitron.model.checkpoint import open_checkpoint
from minitron.model.families import FAMILIES

# Name -> family, shape, total and non-embedding parameters as published (untied embeddings).
PUBLISHED = {
    "Llama-3.1-8B": ("llama", Shape(32, 4096, 14336, 32, 8, 128, 128256), 8_030_261_248, 6_979_588_096),
    "Llama-3.1-Minitron-4B-Width": ("llama", Shape(32, 3072, 9216, 32, 8, 128, 128256), 4_512_746_496, 3_724_741_632),
    "Llama-3.1-Minitron-4B-Depth": ("llama", Shape(16, 4096, 14336, 32, 8, 128, 128256), 4_540_469_248, 3_489_796_096),
    "Mistral-NeMo-12B": ("mistral", Shape(40, 5120, 14336, 32, 8, 128, 131072), 12_247_782_400, 10_905_605_120),
    "Mistral-NeMo-Minitron-8B": ("mistral", Shape(40, 4096, 11520, 32, 8, 128, 131072), 8_414_105_600, 7_340_363_776),
}


def test_every_family_has_a_tiny_model() -> None:
    assert FAMILIES.keys() == {family for family, _ in tiny.VARIANTS.values()} == tiny.CLASSES.keys()


def test_predicted_tensors_are_those_that_transformers_builds(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    built = {name: tuple(tensor.shape) for name, tensor in tiny.model(directory).state_dict().items()}
    if checkpoint.config["tie_word_embeddings"]:
        assert built.pop("lm_head.weight") == built["model.embed_tokens.weight"]
    assert {spec.name: spec.shape(checkpoint.shape) for spec in checkpoint.specs()} == built


def test_counted_parameters_are_the_real_ones_part_by_part(directory: Path) -> None:
    real = dict.fromkeys(("embedding", "attention", "mlp", "norm"), 0)
    for name, parameter in tiny.model(directory).named_parameters():
        part = "norm" if "norm" in name else "attention" if "attn" in name else "mlp" if "mlp" in name else "embedding"
        real[part] += parameter.numel()
    counted = open_checkpoint(directory).parameters
    assert asdict(counted) == {"total": sum(real.values()), **real}
    assert counted.non_embedding == counted.total - real["embedding"]


@pytest.mark.parametrize(("family", "shape", "total", "non_embedding"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_have_the_published_counts(family: str, shape: Shape, total: int, non_embedding: int) -> None:
    counted = FAMILIES[family].count(shape, {"tie_word_embeddings": False})
    assert (counted.total, counted.non_embedding) == (total, non_embedding)


@pytest.mark.parametrize(("family", "shape", "total"), [row[:3] for row in PUBLISHED.values()], ids=PUBLISHED)
def test_transformers_builds_published_models_with_the_published_counts(family: str, shape: Shape, total: int) -> None:
    config = FAMILIES[family].config_for({"model_type": family, "tie_word_embeddings": False}, shape, [])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert sum(parameter.numel() for parameter in model.parameters()) == total


def test_cache_bytes_are_those_that_transformers_keeps(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    with torch.no_grad():
        cache = tiny.model(directory)(input_ids=tiny.tokens(1, 3), use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(checkpoint.shape, bytes_per_value=4) * 3 == real
    assert kv_cache_bytes(checkpoint.shape) * 2 == kv_cache_bytes(checkpoint.shape, bytes_per_value=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_a_config_leaves_out_have_transformers_defaults(family: str) -> None:
    config = {name: size for name, size in tiny.SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    config["model_type"] = family
    if family == "llama":  # MistralConfig's own default is 8 kv heads, and so is the tiny model's head count
        assert AutoConfig.for_model(**config).num_key_value_heads == 8
    shape = FAMILIES[family].shape(config)
    assert (shape.kv_heads, shape.head_dim, shape.group) == (8, AutoConfig.for_model(**config).head_dim, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_goes_into_a_config_and_comes_back(family: str) -> None:
    shape = Shape(2, 48, 20, 6, 3, 10, 99)
    config = {**tiny.SIZES, "rope_theta": 7.0}
    new = FAMILIES[family].config_for(config, shape, [0, 3])
    assert FAMILIES[family].shape(new) == shape
    assert new["rope_theta"] == 7.0 and config == {**tiny.SIZES, "rope_theta": 7.0}


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"intermediate_size": None}, "config.json: intermediate_size is None; it must be a positive integer"),
    "text": ({"hidden_size": "32"}, "hidden_size is '32'"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "groups": ({"num_key_value_heads": 3}, "8 heads cannot share 3 kv_heads equally"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_impossible_sizes_in_a_config_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        FAMILIES["llama"].shape(tiny.SIZES | changes)


SHAPE = Shape(4, 32, 40, 8, 4, 4, 320)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ffn": 0}, "ffn=0: every size must be positive"),
        ({"kv_heads": 3}, "heads=8 is no multiple of kv_heads=3"),
        ({"hidden": 36}, "hidden=36 is no multiple of heads=8, and transformers refuses such llama models"),
    ],
)
def test_a_shape_that_no_llama_can_have_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        FAMILIES["llama"].require_valid(with_sizes(SHAPE, **sizes))


def test_mistral_takes_a_hidden_size_that_is_no_multiple_of_heads() -> None:
    FAMILIES["mistral"].require_valid(with_sizes(SHAPE, hidden=36))
    assert FAMILIES["mistral"].hidden_step(with_sizes(SHAPE, heads=6), 16) == 16
    assert FAMILIES["llama"].hidden_step(with_sizes(SHAPE, heads=6), 16) == 48


def test_an_unknown_dim_is_named() -> None:
    with pytest.raises(PlanError, match="unknown dim 'width' in a shape; dims are layers, hidden"):
        with_sizes(SHAPE, width=3)


def test_a_shape_prints_its_sizes() -> None:
    assert str(SHAPE) == "layers=4 hidden=32 ffn=40 heads=8 kv_heads=4 head_dim=4 vocab=320"
