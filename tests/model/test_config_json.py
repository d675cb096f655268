"""A config.json has one meaning, for all families: what it leaves out, what is null, and what contradicts itself."""

import json
import random
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from directories import change_config
from streaming import CLOSE, streamed
from transformers import AutoConfig

from minitron.core.errors import CheckpointError, MinitronError, UnsupportedArchitecture
from minitron.gguf.model_config import rope
from minitron.model.architecture import ROPE_KINDS
from minitron.model.checkpoint import load_model, open_checkpoint
from minitron.model.config_json import CONFIG_RULES, read_config, settled
from minitron.model.families import FAMILIES
from minitron.model.hub import empty_model, transformers_config

NULL_IS_A_VALUE = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads"}
WRONG = ("64", 64.5, True, [64], {}, -1, 1e301, 10**400, float("nan"), float("inf"), "false", "")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def config_of(family: str) -> dict[str, Any]:
    """A complete config.json, every key that transformers would write."""
    options = {
        key: value for key, value in (tiny.SIZES | tiny.VARIANTS[tiny.FIRST[family]][1]).items() if key != "dtype"
    }
    return json.loads(AutoConfig.for_model(family, **options).to_json_string(use_diff=False))


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of it, of which nothing is null."""
    made = transformers_config(settled(config)).to_dict()
    return {key: value for key, value in made.items() if value is not None}


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "model")


def test_a_key_that_is_null_is_one_that_is_missing() -> None:
    for family in FAMILIES:
        config = config_of(family)
        for key in CONFIG_RULES.keys() - NULL_IS_A_VALUE:
            answers = []
            for changed in (config | {key: None}, {own: value for own, value in config.items() if own != key}):
                try:
                    answers.append(facts(changed))
                except CheckpointError as error:
                    answers.append(str(error))
            assert answers[0] == answers[1], key


def test_where_null_has_a_meaning_in_transformers_it_keeps_it() -> None:
    for family in FAMILIES:
        theirs = type(AutoConfig.for_model(family))
        for field in fields(theirs):
            if field.name in CONFIG_RULES and field.default is not None and "None" in str(field.type):
                assert CONFIG_RULES[field.name].null or field.name == "attention_dropout", field.name


def test_a_value_of_a_wrong_kind_is_one_line_with_its_key_and_rule() -> None:
    for family in FAMILIES:
        config = config_of(family)
        for key, rule in CONFIG_RULES.items():
            for value in WRONG:
                if rule.holds(value):
                    continue
                with pytest.raises(CheckpointError) as raised:
                    settled(config | {key: value})
                message = str(raised.value)
                assert message.startswith(f"config.json: {key} is ") and rule.text in message and "\n" not in message


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_of_any_key_ends_in_anything_but_a_model_or_an_error_of_ours(family: str) -> None:
    config, draw = config_of(family), random.Random(family)
    for key in sorted(config.keys() - {"model_type"}):
        for value in draw.sample((*WRONG, 3, 0.5, ["full_attention"], {"a": 1}), 1):
            try:
                empty_model(settled(config | {key: value}), torch.float32)
            except MinitronError as error:
                assert "\n" not in str(error) and len(str(error)) < 600


def test_a_config_error_names_the_file(model: Path) -> None:
    for changes, message in (
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a positive integer of at most 2147483647"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"layer_types": ["full_attention"]}, "layer_types is a list of 1; .* one entry for each of the 4 layers"),
        (
            {"layer_types": ["linear_attention"] * 4},
            "layer_types holds 'linear_attention'; its entries must be full_attention or",
        ),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a finite number from 0"),
    ):
        before = (model / "config.json").read_text()
        change_config(model, **changes)
        with pytest.raises(CheckpointError, match=f"{model}/config.json: {message}"):
            open_checkpoint(model)
        (model / "config.json").write_text(before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model_type": "llama", "vocab_size": 1' + b"0" * 5000 + b"}", "no JSON that can be read"),
        (b"\xff\xfe{}", "not UTF-8 text"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "says 'hidden_size' twice"),
    ],
)
def test_a_file_that_is_no_json_is_one_line(model: Path, content: bytes, message: str) -> None:
    (model / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json.*{message}"):
        read_config(model)


def test_a_byte_order_mark_is_no_content(model: Path) -> None:
    before = read_config(model)
    (model / "config.json").write_bytes(b"\xef\xbb\xbf" + (model / "config.json").read_bytes())
    assert read_config(model) == before


def test_a_model_type_of_the_checkpoints_own_code_is_an_unknown_family(model: Path) -> None:
    change_config(model, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (model / "own.py").write_text("raise SystemExit('run')")
    for read in (open_checkpoint, load_model):
        with pytest.raises(UnsupportedArchitecture, match="model_type 'own' is not supported"):
            read(model)


def test_windows_without_a_size_and_padding_without_a_row_are_refused() -> None:
    with pytest.raises(CheckpointError, match="sliding_window is null, but by layer_types some layers have one"):
        transformers_config(settled(config_of("gemma2") | {"sliding_window": None}))
    with pytest.raises(CheckpointError, match="pad_token_id is 320, beyond the vocabulary of 320"):
        transformers_config(settled(config_of("llama") | {"pad_token_id": 320}))


# --- rotary positions ------------------------------------------------------------------------------------------------


def rope_model(path: Path, variant: str, **changes: Any) -> Path:
    """A model of default positions whose config says others; rope_parameters goes where rope_scaling comes."""
    tiny.checkpoint(variant, path)
    config = json.loads((path / "config.json").read_text())
    table = config.pop("rope_parameters")
    config["rope_theta"] = table.get("full_attention", table)["rope_theta"]
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def factors(length: int = 2) -> dict[str, Any]:
    return {"short_factor": [1.0, 1.5][:length], "long_factor": [2.0, 4.0][:length]}


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear by its old key": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "null beside its old key": ("llama", {"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}}),
    "both keys alike": ("llama", {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2}}),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}),
    "yarn": ("qwen2", {"rope_scaling": {"type": "yarn", **{k: v for k, v in YARN.items() if k != "rope_type"}}}),
    "su": ("phi3", {"rope_scaling": {"type": "su"} | factors(), "original_max_position_embeddings": 16}),
    "yarn of phi3": ("phi3", {"rope_scaling": {"type": "yarn"} | factors(), "original_max_position_embeddings": 16}),
    "longrope": (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 16} | factors(),
            "original_max_position_embeddings": None,
        },
    ),
    "linear of gemma3": ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
}


@pytest.mark.parametrize(("variant", "changes"), ROPES.values(), ids=ROPES)
def test_rotary_positions_are_the_same_in_memory_and_streamed(
    tmp_path: Path, variant: str, changes: dict[str, Any]
) -> None:
    path = rope_model(tmp_path / "model", variant, **changes)
    tokens = tiny.tokens(3, 24)  # beyond the context from which they are stretched
    with torch.no_grad():
        states = load_model(path).model(input_ids=tokens, use_cache=False).last_hidden_state
        plain = tiny.model(tiny.checkpoint(variant, tmp_path / "plain")).model(input_ids=tokens, use_cache=False)
    torch.testing.assert_close(streamed(path, tokens, batch=2)[-1], states, **CLOSE)
    assert not torch.allclose(states, plain.last_hidden_state, atol=1e-3)


def test_old_names_of_rotary_positions_are_one_model_for_everyone(tmp_path: Path) -> None:
    tokens, found = tiny.tokens(2, 24), []
    for kind in ("su", "yarn", "longrope"):
        scaling = {"type": kind} | factors()
        path = rope_model(tmp_path / kind, "phi3", rope_scaling=scaling, original_max_position_embeddings=16)
        checkpoint = open_checkpoint(path)
        assert checkpoint.config["rope_scaling"]["type"] == "longrope"
        keys, tensors, _ = rope(checkpoint, transformers_config(checkpoint.config))
        assert keys["rope.scaling.original_context_length"] == 16 and len(tensors) == 2
        found.append(tiny.logits(load_model(path), tokens))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown": (
        "llama",
        {"rope_scaling": {"type": "su", "factor": 2.0}},
        "type 'su', which a llama model cannot have; Available: default, dynamic, linear, llama3, longrope, yarn",
    ),
    "misspelt": ("qwen2", {"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "did you mean 'yarn'"),
    "of images": ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "type 'mrope', which a qwen2"),
    "of another family": ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear', which a phi3 model"),
    "two types": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 2.0}},
        "of rope_type 'linear' and of type 'dynamic', two spellings of one key",
    ),
    "no factor": ("llama", {"rope_scaling": {"type": "linear"}}, "of type 'linear' and has no factor"),
    "no lists": ("phi3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'longrope' and has no short_factor"),
    "factor of text": ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor is '2'"),
    "lists too short": ("phi3", {"rope_scaling": {"type": "su"} | factors(1)}, "has 1 numbers; heads of 4 take 2"),
    "a list": ("llama", {"rope_scaling": ["linear", 2.0]}, "rope_scaling is .* it must be an object"),
    "two rules": (
        "llama",
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "rope_scaling is .*yarn.* and rope_parameters is .*default.*, two rules for the same rotary positions",
    ),
    "two bases": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        "rope_parameters.rope_theta is 500000.0 and rope_theta is 10000.0, though both say the same thing",
    ),
    "one for each kind": (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        "has one rule for full_attention layers, where a llama model has one for all",
    ),
    "one for all": ("gemma3", {"rope_parameters": {"rope_theta": 5e5}}, "holds rope_theta; in a gemma3_text model"),
}


@pytest.mark.parametrize(("variant", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_rotary_positions_with_two_meanings_or_none_are_refused(
    tmp_path: Path, variant: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        open_checkpoint(rope_model(tmp_path / "model", variant, **changes))


def test_the_same_rule_said_twice_is_one_rule(tmp_path: Path) -> None:
    path = rope_model(tmp_path / "model", "qwen2", rope_scaling=YARN, rope_parameters=YARN | {"rope_theta": 10000.0})
    assert "rope_scaling" not in open_checkpoint(path).config
    assert transformers_config(open_checkpoint(path).config).rope_parameters == YARN | {"rope_theta": 10000.0}


def test_every_kind_of_rotary_positions_is_one_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_KINDS) - {"default"} <= set(ROPE_INIT_FUNCTIONS)
