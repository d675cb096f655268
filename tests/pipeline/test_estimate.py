"""What a dry run promises: published shapes and counts from config.json alone, and costs by plain arithmetic."""

import json
from pathlib import Path
from typing import Any

import pytest
from published import MODELS, RECIPES, Published

from minitron.core.errors import CheckpointError, RecipeError
from minitron.model.checkpoint import open_config
from minitron.pipeline.estimate import Gpus, estimate
from minitron.recipe import SHIPPED, find_recipe, load_recipe


def dry_run(name: str, teacher: Published, at: Path, **options: Any) -> dict[str, Any]:
    return estimate(load_recipe(find_recipe(name), [f"model={teacher.write(at)}"]), **options).to_dict()


def test_every_shipped_recipe_is_held_against_a_published_model() -> None:
    assert {file.stem for file in SHIPPED.glob("*.yaml")} == RECIPES.keys() | {"demo"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_makes_the_published_shape_with_the_published_counts(name: str, tmp_path: Path) -> None:
    teacher, student = (MODELS[model] for model in RECIPES[name])
    facts = dry_run(name, teacher, tmp_path)
    published = open_config(student.write(tmp_path / "student"))
    assert facts["student"]["shape"] == vars(published.shape)
    for model, wanted in (("teacher", teacher), ("student", student)):
        counted = facts[model]["parameters"]
        assert (counted["total"], counted["non_embedding"]) == (wanted.total, wanted.non_embedding)
        assert (facts[model]["dtype"], facts[model]["weight_bytes"]) == ("bfloat16", 2 * wanted.total)


def test_costs_are_plain_arithmetic(tmp_path: Path) -> None:
    facts = dry_run("llama-3.1-8b-to-4b-width", MODELS["Llama-3.1-8B"], tmp_path, gpus=Gpus(8, 100.0, 0.5))
    context, tokens = 8192, 94_000_000_000
    # Every matrix costs two operations per parameter and token (norms count in, they are small); each query attends
    # to half of the context on average, in two products of heads * head_dim.
    attention = 32 * 2 * 2 * (32 * 128) * context / 2
    forward = 2 * (6_979_588_096 + 128256 * 4096) + attention
    step = 3 * (2 * (3_724_741_632 + 128256 * 3072) + attention)
    assert facts["teacher_forward_flops_per_token"] == forward and facts["student_step_flops_per_token"] == step
    assert facts["calibration_tokens"] == 1024 * context
    assert facts["calibration_flops"] == 1024 * context * forward
    assert facts["distill_flops"] == tokens * (forward + step)
    assert facts["training_bytes"] == 16 * 4_512_746_496 + 2 * 8_030_261_248
    assert facts["gpus"]["seconds"] == pytest.approx(tokens * (forward + step) / (8 * 100e12 * 0.5))
    assert facts["gpus"]["bytes_per_gpu"] == facts["training_bytes"] / 8
    cache = facts["student"]["kv_cache_bytes_per_token"]
    assert cache == 2 * 2 * 32 * 8 * 128  # key and value, 2 bytes each, of 8 heads of 128 in 32 layers
    assert facts["here"]["seconds"] == pytest.approx(facts["distill_flops"] / facts["here"]["flops_per_second"])


def test_activation_checkpointing_repeats_a_forward_pass(tmp_path: Path) -> None:
    teacher = MODELS["Llama-3.1-8B"].write(tmp_path)
    plain, repeated = (
        estimate(
            load_recipe(
                find_recipe("llama-3.1-8b-to-4b-width"),
                [f"model={teacher}", f"distill.activation_checkpointing={json.dumps(asked)}"],
            )
        )
        for asked in (False, True)
    )
    assert 3 * repeated.student_step_flops_per_token == 4 * plain.student_step_flops_per_token


def test_axes_of_gradients_are_counted_and_divided(tmp_path: Path) -> None:
    sets = [f"model={MODELS['Llama-3.1-8B'].write(tmp_path)}", "data.source=builtin", "distill.optimizer=soap"]
    facts = estimate(load_recipe(find_recipe("llama-3.1-8b-to-4b-width"), sets), Gpus(8, 1.0, 1.0)).to_dict()
    # Two matrices of float32 for each side of at most 4096: q and o have 3072 and 4096, k and v 3072 and 1024, gate, up
    # and down 3072 beside 9216.
    axes = 32 * 2 * 4 * (2 * (3072**2 + 4096**2) + 2 * (3072**2 + 1024**2) + 3 * 3072**2)
    held = 16 * 4_512_746_496 + 2 * 8_030_261_248 + axes
    assert facts["training_bytes"] == held and facts["gpus"]["bytes_per_gpu"] == held / 8


def test_a_corrected_teacher_costs_its_own_steps_and_moments(tmp_path: Path) -> None:
    teacher = MODELS["Llama-3.1-8B"].write(tmp_path)
    found = {}
    for kind in ("null", "before", "parallel"):
        sets = [f"model={teacher}", "data.source=builtin", f"distill.correction={kind}"]
        sets += ["distill.correction_tokens=1_000_000_000"] * (kind != "null")
        found[kind] = estimate(load_recipe(find_recipe("llama-3.1-8b-to-4b-width"), sets), Gpus(1, 1.0, 1.0)).to_dict()
    forward = found["null"]["teacher_forward_flops_per_token"]
    small, large = 4_512_746_496, 8_030_261_248
    for kind, passes, memory in (
        ("null", 0, 16 * small + 2 * large),
        ("before", 3, max(16 * small + 2 * large, 16 * large)),
        ("parallel", 2, 16 * small + 16 * large),
    ):
        facts = found[kind]
        assert facts["correction_flops"] == passes * 1e9 * forward and facts["training_bytes"] == memory
        assert facts["gpus"]["seconds"] * 1e12 == pytest.approx(facts["distill_flops"] + facts["correction_flops"])


@pytest.mark.parametrize(("weights", "bytes_"), [("bfloat16_kahan", 10), ("bfloat16_stochastic", 8)])
def test_training_in_bfloat16_takes_fewer_bytes(weights: str, bytes_: int, tmp_path: Path) -> None:
    teacher = MODELS["Llama-3.1-8B"].write(tmp_path)
    changes = [f"model={teacher}", f"distill.weights={weights}"]
    facts = estimate(load_recipe(find_recipe("llama-3.1-8b-to-4b-width"), changes)).to_dict()
    assert facts["training_bytes"] == bytes_ * 4_512_746_496 + 2 * 8_030_261_248


def test_without_a_token_count_there_is_no_time(tmp_path: Path) -> None:
    teacher = MODELS["Llama-3.1-8B"].write(tmp_path)
    recipe = load_recipe(
        find_recipe("llama-3.1-8b-to-4b-depth"), [f"model={teacher}", "distill.tokens=null", "data.source=builtin"]
    )
    facts = estimate(recipe, Gpus(1)).to_dict()
    assert facts["distill_flops"] is facts["here"]["seconds"] is facts["gpus"]["seconds"] is None


def test_a_recipe_that_is_nowhere_lists_those_that_ship() -> None:
    message = r"no recipe file llama-3.1-8b-to-4b-with,.* did you mean 'llama-3.1-8b-to-4b-width'"
    with pytest.raises(RecipeError, match=message):
        find_recipe("llama-3.1-8b-to-4b-with")


def test_a_file_goes_before_a_shipped_recipe_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("mistral-nemo-12b-to-8b") == SHIPPED / "mistral-nemo-12b-to-8b.yaml"
    Path("mistral-nemo-12b-to-8b").write_text("model: mine")
    assert find_recipe("mistral-nemo-12b-to-8b") == Path("mistral-nemo-12b-to-8b")


def test_a_dtype_that_is_no_weights_format_is_named(tmp_path: Path) -> None:
    model = MODELS["Minitron-4B"]
    message = r"config.json: dtype is 'int8'; supported are bfloat16, float16, float32"
    with pytest.raises(CheckpointError, match=message):
        open_config(Published(model.config | {"torch_dtype": "int8"}, 0, 0).write(tmp_path))
