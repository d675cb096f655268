"""What a distillation changes to fit the memory is settled once, is what the user could have given, and is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import small
from processes import forked

from minitron import api
from minitron.core.errors import RunError
from minitron.core.files import digest_files
from minitron.data.config import DataConfig
from minitron.distillation.config import DistillConfig
from minitron.distillation.layouts import Fit

SETTINGS: dict[str, Any] = {"tokens": 512, "batch_blocks": 4, "evaluate_blocks": 1, "optimizer": "adamw"}
BLOCK = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    small.teacher(path / "teacher", num_hidden_layers=4)
    small.teacher(path / "student", seed=1, num_hidden_layers=4)
    small.text(path / "text.jsonl")
    return path


def distilled(models: Path, out: Path, **settings: Any) -> api.Distilled:
    data = DataConfig(source=str(models / "text.jsonl"), block_tokens=BLOCK)
    config = DistillConfig(**(SETTINGS | settings))
    made = api.distill(models / "teacher", models / "student", data, config, out=out)
    assert made is not None
    return made


def weights(made: api.Distilled) -> str:
    return digest_files([made.out / "model.safetensors"], {})


@pytest.fixture(scope="module")
def asked(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """What a step takes as it is asked for."""
    fit = distilled(models, tmp_path_factory.mktemp("asked") / "out", fit=20_000_000).fit
    assert fit is not None and fit.asked is not None and fit.asked == fit.peak and not fit.changes
    return fit


def test_the_changed_settings_give_the_bits_of_the_same_settings_given(
    models: Path, asked: Fit, tmp_path: Path
) -> None:
    assert asked.asked is not None
    with pytest.warns(UserWarning, match="a step would take .* distill.micro_batch_tokens=.* it takes"):
        fitted = distilled(models, tmp_path / "fitted", fit=asked.asked - 1)
    fit = fitted.fit
    assert fit is not None and fit.peak is not None and fit.peak < asked.asked == fit.asked
    assert weights(fitted) == weights(distilled(models, tmp_path / "given", fit="off", **fit.changes))
    record = json.loads((tmp_path / "fitted" / "record.json").read_text())
    assert record["result"]["fit"] == fit.model_dump()
    assert fit.changes.items() <= record["config"]["distill"].items()


def test_far_more_memory_than_a_step_takes_is_seen_without_a_step(models: Path, tmp_path: Path) -> None:
    fit = distilled(models, tmp_path / "out").fit
    assert fit is not None and fit.asked is fit.peak is None and not fit.changes


def test_the_next_call_takes_what_was_settled(models: Path, asked: Fit, tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    work.mkdir()
    settled = Fit(memory=10**6, processes=1, asked=2 * 10**6, peak=10**6, changes={"activation_checkpointing": True})
    (work / "fit.json").write_text(settled.model_dump_json())
    with pytest.raises(RunError, match=r"fit\.json settled a step for 1000000 bytes, and distill.fit is 2000000 now"):
        distilled(models, tmp_path / "out", fit=2 * 10**6)
    assert distilled(models, tmp_path / "out").fit == settled


def test_what_fits_nowhere_is_refused_before_anything_is_made(models: Path, tmp_path: Path) -> None:
    least = r"may be taken; with .*distill.teacher=recorded.* it still takes .*distill.fit=off"
    with pytest.raises(RunError, match=least):
        distilled(models, tmp_path / "out", fit=1000)
    assert [*tmp_path.iterdir()] == []


def test_settings_of_the_users_own_stay_and_are_named_where_they_are_in_the_way(
    models: Path, asked: Fit, tmp_path: Path
) -> None:
    assert asked.asked is not None
    own = {"micro_batch_tokens": 4 * BLOCK, "activation_checkpointing": False, "weights": "float32"}
    with pytest.raises(RunError, match=r"Without distill.micro_batch_tokens.* would fit it into"):
        distilled(models, tmp_path / "out", fit=asked.asked // 2, teacher="online", **own)


def test_the_processes_of_a_job_plan_for_all_of_them(models: Path, asked: Fit, tmp_path: Path) -> None:
    assert asked.asked is not None
    words = ["distill", "--teacher", models / "teacher", "--student", models / "student"]
    words += ["--data", models / "text.jsonl", "--out", tmp_path / "out", "--set", f"distill.fit={asked.asked // 3}"]
    for key, value in (SETTINGS | {"block_tokens": BLOCK}).items():
        words += ["--set", f"{'data' if key == 'block_tokens' else 'distill'}.{key}={value}"]
    done = forked(2, "minitron", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fit = Fit(**json.loads((tmp_path / "out" / "record.json").read_text())["result"]["fit"])
    assert fit.processes == 2 and fit.changes and fit.peak is not None and fit.peak <= asked.asked // 3
