"""Runs that score layers by a pass of their own, and that cut in steps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch

from minitron.calibration.collect import measure_statistics
from minitron.core.errors import RunError
from minitron.model.checkpoint import open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.model.tokenizer import load_tokenizer
from minitron.pipeline.run import run
from minitron.pruning.config import PruneConfig
from minitron.pruning.cut import cut
from minitron.pruning.depth import by_loss, contiguous_blocks, leave_one_out
from minitron.pruning.plan import Plan, choose
from minitron.pruning.steps import Scoring, layers_need_a_pass, refine, score_layers, score_units
from minitron.pruning.target import step_shapes
from minitron.recipe import build_recipe

QUESTIONS = [{"ctx": "the rain in", "endings": ["the plain", "a boat"], "label": number % 2} for number in range(5)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return path


def scoring(teacher: Path, **config: Any) -> Scoring:
    pass_ = Pass(torch.float32, batch=3)
    return Scoring(PruneConfig(**config), Samples(tiny.tokens(6, 10)), pass_, load_tokenizer(teacher))


def test_layers_are_scored_by_the_criterion_that_is_asked_for(teacher: Path, task: Path) -> None:
    checkpoint = open_checkpoint(teacher)
    student = tiny.plan(checkpoint.shape, layers=2).student
    statistics = measure_statistics(checkpoint, Samples(tiny.tokens(6, 10)), Pass(torch.float32, batch=3))
    units = score_units(statistics, checkpoint.shape, PruneConfig())
    measure = by_loss(checkpoint, Samples(tiny.tokens(6, 10)[:4]), Pass(torch.float32, batch=3))
    expected = {
        "block_influence": 1 - statistics.cosine,
        "loss": leave_one_out(measure, 4),
        "contiguous": contiguous_blocks(measure, 4, 2),
    }
    for criterion, layers in expected.items():
        asked = scoring(teacher, layer_criterion=criterion, layer_samples=4)
        assert torch.equal(score_layers(checkpoint, units, student, asked).layers, layers)
    asked = scoring(teacher, layer_criterion="task", layer_task=str(task), layer_samples=4)
    found = score_layers(checkpoint, units, student, asked)
    assert ((found.layers * 4) % 1 == 0).all()  # shares of the first four questions
    assert torch.equal(found.ffn, units.ffn)


def test_no_pass_is_made_where_no_layer_is_chosen_by_score(teacher: Path) -> None:
    shape = open_checkpoint(teacher).shape
    fewer = tiny.plan(shape, layers=2).student
    assert layers_need_a_pass(PruneConfig(layer_criterion="loss"), shape, fewer)
    assert not layers_need_a_pass(PruneConfig(layer_criterion="loss"), shape, shape)
    assert not layers_need_a_pass(PruneConfig(layer_criterion="loss", drop_layers="1-2"), shape, fewer)
    assert not layers_need_a_pass(PruneConfig(), shape, fewer)


def test_every_step_is_chosen_by_scores_of_what_is_left(teacher: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(teacher)
    student = tiny.plan(checkpoint.shape, layers=2, hidden=16, ffn=12).student
    asked = scoring(teacher, layer_criterion="loss")
    shapes = step_shapes(checkpoint.architecture, checkpoint.shape, student, 3)
    assert len(shapes) == 3

    def step(path: Path, shape: Any) -> Any:
        left = open_checkpoint(path)
        statistics = measure_statistics(left, asked.calibration, Pass(torch.float32, batch=3))
        scores = score_layers(left, score_units(statistics, left.shape, asked.config), shape, asked)
        return choose(scores, left.shape, shape)

    plan = refine(
        checkpoint, step(teacher, shapes[0]), shapes[1:], replace(asked, pass_=replace(asked.pass_, scratch=tmp_path))
    )
    path = teacher
    for number, shape in enumerate(shapes):
        out = tmp_path / str(number)
        out.mkdir()
        cut(open_checkpoint(path), step(path, shape), out)
        path = out
    (tmp_path / "at once").mkdir()
    cut(checkpoint, plan, tmp_path / "at once")
    expected = tiny.tensors(path)
    for name, tensor in tiny.tensors(tmp_path / "at once").items():
        assert torch.equal(tensor, expected[name]), name
    assert {file.name for file in tmp_path.iterdir()} == {"0", "1", "2", "at once"}


def test_a_run_in_steps_with_layers_by_a_task_plans_for_the_teacher_itself(
    teacher: Path, task: Path, tmp_path: Path
) -> None:
    raw = {
        "model": str(teacher),
        "data": {"source": str(small.text(tmp_path / "text.jsonl")), "heldout_fraction": 0.2, "block_tokens": 16},
        "calibrate": {"samples": 8},
        "prune": {
            "shape": {"layers": 2, "ffn": 20},
            "criterion": "magnitude",
            "layer_criterion": "task",
            "layer_task": str(task),
            "iterations": 2,
        },
        "repair": {"steps": []},
        "distill": {"tokens": 128, "batch_blocks": 4},
        "evaluate": {"blocks": 4, "prompts": ["the"], "new_tokens": 2, "speed": False},
    }
    run(build_recipe(raw), tmp_path / "out")
    plan = Plan.load(tmp_path / "out" / "plan" / "plan.json")
    assert plan.teacher == open_checkpoint(teacher).shape
    assert (plan.student.layers, plan.student.ffn) == (2, 20)
    assert not list((tmp_path / "out" / "plan").glob("step-*"))
    questions = task.read_text()
    task.write_text(questions.replace("a boat", "the boat"))
    with pytest.raises(RunError, match=r"scores was made from other inputs; changed: task\."):
        run(build_recipe(raw), tmp_path / "out")
    task.write_text(questions)
    raw["prune"]["iterations"] = 1
    with pytest.raises(RunError, match=r"made from other inputs; changed: .*iterations"):
        run(build_recipe(raw), tmp_path / "out")
