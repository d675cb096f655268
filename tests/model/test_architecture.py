"""The table predicts what transformers builds: names, shapes, counts, cache."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import published
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.core.errors import CheckpointError, PlanError
from minitron.model.architecture import Shape, kv_cache_bytes, with_sizes
from minitron.model.checkpoint import open_checkpoint
from minitron.model.families import FAMILIES


def test_every_family_has_a_tiny_model() -> None:
    assert FAMILIES.keys() == {family for family, _ in tiny.VARIANTS.values()}


def test_predicted_tensors_are_those_that_transformers_builds(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    model = tiny.model(directory)
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
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


@pytest.mark.parametrize("model", published.MODELS.values(), ids=published.MODELS)
def test_published_models_have_the_published_counts(model: published.Published) -> None:
    table = FAMILIES[model.config["model_type"]]
    counted = table.count(table.shape(model.config), model.config)
    assert (counted.total, counted.non_embedding) == (model.total, model.non_embedding)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config))
    assert sum(parameter.numel() for parameter in built.parameters()) == model.total


def test_cache_bytes_are_those_that_transformers_keeps(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    with torch.no_grad():
        cache = tiny.model(directory)(input_ids=tiny.tokens(1, 3), use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(checkpoint.shape, bytes_per_value=4) * 3 == real
    assert kv_cache_bytes(checkpoint.shape) * 2 == kv_cache_bytes(checkpoint.shape, bytes_per_value=4)


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    for family in FAMILIES:
        table, theirs = FAMILIES[family], AutoConfig.for_model(family)
        conditions = {line.partition("?")[2].lstrip("!") for line in table.tensors.values()} - {""}
        for key in conditions:
            assert table.defaults.get(key, False) == getattr(theirs, key, False), key
        assert not table.logits_softcap or table.defaults.get(table.logits_softcap) == getattr(
            theirs, table.logits_softcap
        )
        left_out = {"num_key_value_heads", "head_dim"}
        config = {name: size for name, size in tiny.SIZES.items() if name not in left_out} | {"num_attention_heads": 32}
        config |= {"hidden_size": 2048, "pad_token_id": 0}
        theirs = AutoConfig.for_model(family, **config)
        shape = table.shape(config)
        assert shape.kv_heads == (theirs.num_key_value_heads or 32)
        assert shape.head_dim == getattr(theirs, "head_dim", 2048 // 32)
        assert table.shape(config | {"num_key_value_heads": None}).kv_heads == 32


def test_a_shape_goes_into_a_config_and_comes_back() -> None:
    for family in FAMILIES:
        head_dim = 8 if FAMILIES[family].heads_fill_hidden else 10
        shape = Shape(2, 48, 20, 6, 3, head_dim, 99)
        config = {name: size for name, size in tiny.SIZES.items() if name in FAMILIES[family].config_keys.values()}
        config |= {"rope_theta": 7.0}
        before = dict(config)
        new = FAMILIES[family].config_for(config, shape, [0, 3])
        assert FAMILIES[family].shape(new) == shape
        assert new["rope_theta"] == 7.0 and config == before


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


def test_a_hidden_size_that_the_family_cannot_have_is_no_candidate() -> None:
    six = with_sizes(SHAPE, heads=6, kv_heads=3)
    assert FAMILIES["llama"].with_hidden(six, 32) is None
    assert FAMILIES["llama"].with_hidden(six, 24) == with_sizes(six, hidden=24)
    assert FAMILIES["mistral"].with_hidden(six, 32) == six


@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads"), [(32, 8, 4), (24, 6, 3), (16, 4, 4), (20, 5, None), (4, 1, 1), (18, None, None)]
)
def test_heads_go_with_hidden_where_a_config_has_no_head_dim(
    hidden: int, heads: int | None, kv_heads: int | None
) -> None:
    table = FAMILIES["qwen2"]
    shape = table.with_hidden(SHAPE, hidden)
    if kv_heads is None or heads is None:
        assert shape is None
    else:
        assert shape == with_sizes(SHAPE, hidden=hidden, heads=heads, kv_heads=kv_heads)
        table.require_valid(shape)


@pytest.mark.parametrize("family", ["qwen2", "phi3", "smollm3", "olmo2", "granite"])
def test_fewer_heads_at_one_head_dim_are_refused_where_a_config_has_no_head_dim(family: str) -> None:
    with pytest.raises(
        PlanError, match=rf"hidden=32 needs heads=8 of head_dim=4, not heads=4: the config of a {family}"
    ):
        FAMILIES[family].require_valid(with_sizes(SHAPE, heads=4))
    with pytest.raises(CheckpointError, match="8 heads of 6 do not make hidden_size 32"):
        FAMILIES[family].shape(tiny.SIZES | {"head_dim": 6})


def test_an_unknown_dim_is_named() -> None:
    with pytest.raises(PlanError, match="unknown dim 'width' in a shape; dims are layers, hidden"):
        with_sizes(SHAPE, width=3)


def test_a_shape_prints_its_sizes() -> None:
    assert str(SHAPE) == "layers=4 hidden=32 ffn=40 heads=8 kv_heads=4 head_dim=4 vocab=320"
