"""What every family's users may get wrong, and the whole way from teacher to student for each family."""

import json
import re
import shutil
from pathlib import Path

import pytest
import small
import tiny
from transformers import AutoModelForCausalLM

from minitron.core.errors import CheckpointError, UnsupportedArchitecture
from minitron.model.checkpoint import open_checkpoint
from minitron.model.families import FAMILIES
from minitron.pipeline.run import run
from minitron.recipe import build_recipe


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.checkpoint(tiny.FIRST[request.param], tmp_path / "model")


def change_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_ffn_size_that_disagrees_with_the_tensors_is_named(model: Path) -> None:
    change_config(model, intermediate_size=48)
    message = (
        r"tensor model.layers.0.mlp.\w+.weight is \[\d+, \d+\], but by config.json it must be \[\d+, \d+\]: "
        r"axis \d is (ffn\+)?ffn, by config.json's intermediate_size=48"
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model)


@pytest.mark.parametrize("model", ["llama", "nemotron", "phi3"], indirect=True)
def test_a_vocabulary_that_disagrees_with_the_tensors_is_named(model: Path) -> None:
    change_config(model, vocab_size=321)
    message = r"tensor model.embed_tokens.weight is \[320, (\d+)\], .* must be \[321, \1\]: axis 0 is vocab, by .*=321"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model)


def test_key_value_heads_that_disagree_with_the_tensors_are_named(model: Path) -> None:
    change_config(model, num_key_value_heads=2)
    message = r"tensor model.layers.0.self_attn.\w+.\w+ is .*: axis 0 is \S*kv_heads\*head_dim\S*, by .*value_heads=2"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model)


@pytest.mark.parametrize("model", ["llama", "nemotron", "phi3"], indirect=True)
@pytest.mark.parametrize(
    ("layers", "message"), [(5, "are missing in .*, first model.layers.4"), (3, "not part of the")]
)
def test_a_layer_count_that_disagrees_with_the_tensors_is_named(model: Path, layers: int, message: str) -> None:
    change_config(model, num_hidden_layers=layers)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4"])
def test_quantized_weights_are_named_as_what_they_are(llama: Path, tmp_path: Path, method: str) -> None:
    shutil.copytree(llama, tmp_path / "model")
    change_config(tmp_path / "model", quantization_config={"quant_method": method})
    message = rf"holds quantized weights \(.*{method}.*\); cut the original model in 16 or 32 bits and quantize after"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("model_type", "guess"), [("lama", "llama"), ("qwen3_moe", "qwen3"), ("phi-3", "phi3"), ("olmo", "olmo2")]
)
def test_a_relative_of_a_known_family_is_guessed(llama: Path, tmp_path: Path, model_type: str, guess: str) -> None:
    shutil.copytree(llama, tmp_path / "model")
    change_config(tmp_path / "model", model_type=model_type)
    with pytest.raises(UnsupportedArchitecture, match=rf"{re.escape(model_type)}.*did you mean '{guess}'"):
        open_checkpoint(tmp_path / "model")


def test_a_model_with_other_parts_than_text_is_named(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    change_config(tmp_path / "model", model_type="gemma3", text_config={"model_type": "gemma3_text"})
    with pytest.raises(CheckpointError, match="'gemma3' is more than a language model; its text part is a gemma3_text"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("family", ["gemma2"])
def test_a_whole_run_makes_a_student_of_the_same_family(family: str, tmp_path: Path) -> None:
    teacher = small.teacher(tmp_path / "teacher", tiny.FIRST[family], hidden_size=64, head_dim=8)
    recipe = {
        "model": str(teacher),
        "data": {"source": str(small.text(tmp_path / "text.jsonl", 40)), "block_tokens": 16},
        "calibrate": {"samples": 8},
        "prune": {"target": "60%"},
        "distill": {"tokens": 512, "batch_blocks": 4},
        "evaluate": {"blocks": 4, "new_tokens": 4, "prompts": ["the rain"], "speed": False},
    }
    records = run(build_recipe(recipe), tmp_path / "run")
    rows = {row: records.evaluations[row] for row in ("teacher", "pruned", "student")}
    assert rows["student"].family == family and (rows["student"].kl_to_teacher or 0) > 0
    loaded, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student", output_loading_info=True)
    assert not any(notes.values())
    assert sum(parameter.numel() for parameter in loaded.parameters()) == rows["student"].parameters.total
