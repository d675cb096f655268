"""Minutes become tokens once, before anything else; from there on they are those tokens."""

import json
from pathlib import Path

import pytest
import small

from minitron import api
from minitron.core.errors import MinitronError, RunError
from minitron.core.files import digest_files
from minitron.data.config import DataConfig
from minitron.distillation.config import DistillConfig
from minitron.distillation.layouts import Budget
from minitron.distillation.schedule import ModelSize, resolve
from minitron.model.checkpoint import open_checkpoint
from minitron.pipeline.asked import Asked, TrainingSeconds
from minitron.pipeline.budget import most_tokens
from minitron.pipeline.probe import WEIGHTS_RMS, Modelled
from minitron.recipe import build_recipe

SETTINGS = {"batch_blocks": 4, "evaluate_blocks": 1, "intermediate": "off", "optimizer": "adamw"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    small.teacher(path / "teacher")
    small.teacher(path / "student", seed=1)
    small.text(path / "text.jsonl")
    return path


def distilled(models: Path, out: Path, **length: float) -> api.Distilled:
    data = DataConfig(source=str(models / "text.jsonl"), block_tokens=16)
    config = DistillConfig(**SETTINGS, **length)  # type: ignore[arg-type]
    made = api.distill(models / "teacher", models / "student", data, config, out=out)
    assert made is not None
    return made


def weights(made: api.Distilled) -> str:
    return digest_files([made.out / "model.safetensors"], {})


def test_a_student_of_minutes_has_the_bits_of_one_of_their_tokens(models: Path, tmp_path: Path) -> None:
    timed = distilled(models, tmp_path / "timed", minutes=0.02)
    assert timed.budget is not None and timed.budget.minutes == 0.02
    assert timed.budget.tokens == round(timed.budget.tokens_per_second * 1.2)
    assert abs(timed.training.tokens - timed.budget.tokens) < 4 * 16
    assert weights(timed) == weights(distilled(models, tmp_path / "counted", tokens=timed.budget.tokens))
    record = json.loads((tmp_path / "timed" / "record.json").read_text())
    assert record["result"]["budget"]["tokens"] == record["config"]["distill"]["tokens"] == timed.budget.tokens


def test_tokens_that_were_settled_are_taken_and_other_minutes_refused(models: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    work.mkdir()
    settled = Budget(minutes=3.0, tokens_per_second=1.0, tokens=192)
    (work / "budget.json").write_text(settled.model_dump_json())
    with pytest.raises(RunError, match=r"budget.json settled 3 minutes as 192 tokens, and distill.minutes is 4 now"):
        distilled(models, tmp_path / "out", minutes=4.0)
    made = distilled(models, tmp_path / "out", minutes=3.0)
    assert made.budget == settled and made.training.tokens == 192
    assert str(settled) == "3 minutes at a measured 1 tokens/s: 192 tokens"


def test_minutes_and_tokens_together_are_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(MinitronError, match=r"distill.tokens=64 and distill.minutes=1 both say how long"):
        distilled(models, tmp_path / "out", minutes=1.0, tokens=64)
    assert not (tmp_path / "out.work").exists()


def asked(models: Path, minutes: float) -> Asked:
    recipe = build_recipe({"model": "m", "prune": {}, "distill": SETTINGS | {"minutes": minutes}})
    teacher, student = (Modelled.of(open_checkpoint(models / name)) for name in ("teacher", "student"))
    return Asked(recipe, teacher, student, 16, None, ("student",), trainings_only=True)


@pytest.mark.parametrize("minutes", [0.5, 7.0, 600.0])
def test_the_tokens_are_the_most_that_fit_the_minutes(models: Path, minutes: float) -> None:
    parts = TrainingSeconds(start=3.0, token=1e-3, update=0.02, evaluation_block=0.5, save=0.7)
    tokens = most_tokens(asked(models, minutes), parts)

    def seconds(count: int) -> float:
        """The seconds by a walk through the steps."""
        size = ModelSize(open_checkpoint(models / "teacher").shape, WEIGHTS_RMS)
        config = resolve(DistillConfig(**SETTINGS, tokens=count), size, size, block_tokens=16, train_tokens=count)
        assert config.evaluate_steps and config.checkpoint_steps
        total, steps = parts.start, max(1, round(count / 64))
        for step in range(1, steps + 1):
            total += parts.update + 64 * parts.token
            total += parts.evaluation_block if step % config.evaluate_steps == 0 or step == steps else 0
            total += parts.save if step % config.checkpoint_steps == 0 or step == steps else 0
        return total

    assert seconds(tokens) <= 60 * minutes < seconds(round(tokens * 1.01) + 128)


def test_minutes_without_time_for_a_step_are_refused(models: Path) -> None:
    slow = TrainingSeconds(start=30.0, token=1.0, update=0.0, evaluation_block=0.0, save=0.0)
    with pytest.raises(MinitronError, match=r"distill.minutes=0.5 is too short: .* take about 94 s here; raise it"):
        most_tokens(asked(models, 0.5), slow)
