"""What a timed dry run promises: every stage of the run, with seconds that its work was timed for."""

import json
from pathlib import Path

import pytest
import small

from minitron.calibration.statistics import CalibrateConfig, usual_samples
from minitron.data.config import DataConfig
from minitron.model.architecture import Shape
from minitron.model.checkpoint import open_checkpoint
from minitron.pipeline.estimate import estimate
from minitron.pipeline.probe import Modelled, ProbeSize, make_probe, probe_sizes
from minitron.pipeline.stage_seconds import ESTIMATES
from minitron.pipeline.stages import PIPELINE
from minitron.pipeline.time_text import measure_text
from minitron.recipe import Recipe, build_recipe
from minitron.report.exporters import EXPORTERS


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("dry")
    raw = {
        "model": str(small.teacher(path / "teacher")),
        "data": {"source": str(small.text(path / "text.jsonl")), "block_tokens": 16},
        "calibrate": {"samples": 8},
        "prune": {"target": "60%"},
        "distill": {"tokens": 512, "evaluate_blocks": 4},
        "evaluate": {"blocks": 4, "new_tokens": 4, "speed": False},
    }
    return build_recipe(raw)


def test_every_stage_of_a_run_has_an_estimate() -> None:
    assert [*PIPELINE, *EXPORTERS, "report"] == [*ESTIMATES]


def test_a_timed_estimate_names_the_stages_of_the_run_and_adds_them_up(recipe: Recipe) -> None:
    found = estimate(recipe, timed=True)
    assert all(stage.seconds is not None and stage.seconds >= 0 and stage.why for stage in found.stages)
    assert found.seconds == sum(stage.seconds or 0 for stage in found.stages)
    (student,) = (stage for stage in found.stages if stage.name == "student")
    assert found.here.seconds == student.seconds and found.flops is not None
    assert found.here.flops_per_second == pytest.approx(found.flops / found.here.seconds)
    wanted = [name for name, stage in PIPELINE.items() if stage.wanted(recipe)]
    assert [*wanted, "report"] == [stage.name for stage in found.stages]
    rows = found.to_dict()["stages"]
    assert isinstance(rows, list) and rows[0].keys() == {"name", "seconds", "why"}


def test_text_of_a_single_document_is_measured_whole(recipe: Recipe, tmp_path: Path) -> None:
    teacher, text = open_checkpoint(Path(recipe.model)), tmp_path / "long.jsonl"
    document = "one word after another, " * 6000
    text.write_text(json.dumps({"text": document}) + "\n")
    heldout = small.text(tmp_path / "heldout.jsonl")
    found = measure_text(DataConfig(source=str(text), heldout=str(heldout), delimiter="none"), teacher, None)
    ids = teacher.tokenizer(document)["input_ids"]
    assert found.train_tokens == pytest.approx(len(ids), rel=0.01)
    assert found.heldout_tokens and found.seconds


def test_a_probe_has_layers_of_the_real_sizes(recipe: Recipe, tmp_path: Path) -> None:
    teacher = Modelled.of(open_checkpoint(Path(recipe.model)))
    assert probe_sizes(teacher, teacher) == [ProbeSize(teacher.shape.layers, teacher.shape.layers, teacher.shape.vocab)]
    made = make_probe(teacher, teacher, ProbeSize(1, 1, 64), 16, tmp_path)
    assert made.teacher.shape == Shape(**(vars(teacher.shape) | {"layers": 1, "vocab": 64}))
    assert made.corpus.train.tokens.max() < 64


def test_a_large_model_has_two_probes_of_one_layer_and_a_part_of_the_vocabulary(tmp_path: Path) -> None:
    from published import MODELS

    from minitron.model.checkpoint import open_config

    teacher = Modelled.of(open_config(MODELS["Llama-3.1-8B"].write(tmp_path)))
    first, second = probe_sizes(teacher, teacher)
    assert first.layers == second.layers == 1 and second.vocab < first.vocab < teacher.shape.vocab / 8


def test_the_default_samples_follow_from_the_sizes_alone() -> None:
    wide = Shape(layers=30, hidden=576, ffn=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152)
    samples = usual_samples(wide, 512)
    assert 512 * (samples - 1) < 32 * 1536 <= 512 * samples
    assert usual_samples(wide, 8) == 1024  # the papers'
    assert CalibrateConfig().for_model(wide, 512).samples == samples
    assert CalibrateConfig(samples=3).for_model(wide, 512).samples == 3
