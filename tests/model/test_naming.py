"""A model's name is its own, wherever it lies."""

from pathlib import Path

import pytest

from minitron.model.naming import MOST_BYTES, model_name, run_name

HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("me/tiny", "tiny"),
        ("gpt2", "gpt2"),
        ("models/tiny/", "tiny"),
        ("./models/../models/tiny", "tiny"),
        (f"/cache/hub/models--me--tiny/snapshots/{HASH}", "tiny"),
        (f"/cache/hub/models--me--tiny/snapshots/{HASH}/", "tiny"),
        (f"/cache/hub/models--gpt2/snapshots/{HASH}", "gpt2"),
        ("/data/my model (v2)", "my-model-v2"),
        ("/data/Llama-3.1-8B_it", "Llama-3.1-8B_it"),
        ("/data/模型", "模型"),
        ("/data/.hidden", "hidden"),
        ("/data/--out", "out"),
        ("/data/a:b*c?d", "a-b-c-d"),
        ("/", "model"),
        ("tiny.gguf", "tiny"),
        ("tiny.Q4_1.gguf", "tiny"),
        ("gemma-3-270m-q4_k_m.gguf", "gemma-3-270m"),
        ("Tiny-8B-IQ2_XXS-00001-of-00002.gguf", "Tiny-8B"),
        ("Tiny-BF16.gguf", "Tiny"),
        ("Tiny-3Q.gguf", "Tiny-3Q"),
        ("Q8_0.gguf", "Q8_0"),
        ("tiny.Q4_1", "tiny.Q4_1"),
    ],
)
def test_a_name_is_the_last_part_that_names_the_model(model: str, name: str) -> None:
    assert model_name(model) == name


def test_here_is_called_by_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path / "tiny")
    assert model_name(".") == model_name("") == "tiny" and model_name("..") == model_name(tmp_path)


def test_a_runs_student_is_called_as_the_run_calls_its_files(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: me/tiny\nprune: {target: 50%}\n")
    assert run_name("me/tiny", "50%") == model_name(tmp_path / "student") == "tiny-50pct"
    assert model_name(tmp_path / "pruned") == "tiny-50pct-pruned"
    assert model_name(tmp_path / "corrected") == "tiny-corrected"
    assert run_name("me/tiny", None) == "tiny-small"
    for other in ("[", "- a list", "model: 5", "model: a\nprune: 3"):
        (tmp_path / "recipe.yaml").write_text(other)
        assert model_name(tmp_path / "student") == "student"


def test_a_name_leaves_room_for_what_is_put_behind_it() -> None:
    assert len(model_name("/data/" + "模" * 200).encode()) <= MOST_BYTES
