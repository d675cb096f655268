"""Every row of a table has its words, and a row that is added works from the recipe to the report and the card."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import small
import tiny
import torch
from pydantic import TypeAdapter
from torch import Tensor

from minitron.core.config import Section, WordedRow, choice, choices_of
from minitron.core.files import write_json
from minitron.core.layouts import FileName, Layout
from minitron.core.run_layout import STAGES
from minitron.core.typed_files import FileKind
from minitron.distillation.config import DistillConfig
from minitron.distillation.losses import LOSSES
from minitron.distillation.objective import Objective
from minitron.distillation.optim import OPTIMIZERS, OptimizerRow
from minitron.model.architecture import PRUNABLE
from minitron.model.checkpoint import open_checkpoint
from minitron.model.families import FAMILIES
from minitron.model.families.llama import MISTRAL
from minitron.pipeline.run import run
from minitron.pipeline.stages import PIPELINE, Run, Stage
from minitron.pruning.config import PruneConfig
from minitron.pruning.depth import LAYER_CRITERIA, Measure, leave_one_out
from minitron.pruning.importance import CRITERIA, Scores
from minitron.pruning.plan import Plan
from minitron.pruning.repair import BEST, REPAIRS, Repair, RepairConfig
from minitron.recipe import Recipe, build_recipe
from minitron.report import html
from minitron.report.exporters import EXPORTERS, Export, Exporter
from minitron.report.hub import planned_uploads
from minitron.report.records import read_run

TABLES: dict[str, Mapping[str, Any]] = {
    "distill.loss": LOSSES,
    "distill.optimizer": OPTIMIZERS,
    "prune.criterion": CRITERIA,
    "prune.layer_criterion": LAYER_CRITERIA,
    "repair.steps": REPAIRS,
}
# Fields of rows that are words.
WORDS = {"doc", "title", "text", "meaning", "unit"}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe of a short run."""
    path = tmp_path_factory.mktemp("tables")
    (path / "teacher").mkdir()
    return {
        "model": str(small.teacher(path / "teacher")),
        "data": {"source": str(small.text(path / "text.jsonl")), "block_tokens": 16},
        "calibrate": {"samples": 4},
        "prune": {"shape": {"layers": 3, "ffn": 16}},
        "repair": {"steps": []},
        "distill": {"tokens": 128, "batch_blocks": 4, "evaluate_blocks": 2},
        "evaluate": {"blocks": 2, "prompts": [], "speed": False},
    }


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_row_has_its_words(table: Mapping[str, Any]) -> None:
    for name, row in table.items():
        assert isinstance(row, WordedRow), name
        words = {field.name: getattr(row, field.name) for field in fields(row) if field.name in WORDS}
        assert words["doc"] and not words["doc"].endswith("."), name
        assert all(text.strip() == text and text for text in words.values()), name


@pytest.mark.parametrize(("place", "table"), TABLES.items(), ids=TABLES)
def test_the_reference_of_the_recipe_has_the_words_of_every_row(place: str, table: Mapping[str, Any]) -> None:
    section, key = place.split(".")
    field = Recipe.model_fields[section].annotation.model_fields[key]  # type: ignore[union-attr]
    assert [found.table for found in choices_of(field)] == [table]
    for name, row in table.items():
        assert f"`{name}`: {row.doc}" in (field.description or "")


def test_options_of_rows_are_keys_of_what_they_are_read_from() -> None:
    assert {name for row in CRITERIA.values() for name in row.options} <= PruneConfig.model_fields.keys()
    assert {name for row in LOSSES.values() for name in row.options} <= {field.name for field in fields(Objective)}


def test_a_repair_names_only_dims_and_steps_that_there_are() -> None:
    for step, repair in REPAIRS.items():
        assert {*repair.dims, *repair.chooses, *repair.ranks} <= set(PRUNABLE)
        assert {repair.excludes, repair.without_choice} - {None} <= REPAIRS.keys() - {step}
        if repair.excludes is not None:
            assert REPAIRS[repair.excludes].excludes == step
    assert set(BEST) < REPAIRS.keys()


FEW = {"a": LOSSES["mse"], "b": LOSSES["cosine"]}


class Few(Section):
    loss: Annotated[str, choice(FEW)]
    """A loss."""


def test_a_value_that_is_no_row_is_named_with_all_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ("c", 1, None, ["a"]):
        with pytest.raises(ValueError, match="Input should be 'a' or 'b'"):
            Few(loss=bad)
    monkeypatch.setitem(FEW, "c", LOSSES["mse"])
    assert Few(loss="c").loss == "c"
    description = "A loss. `a`: the squared difference of the logits; `b`: 1 - the cosine between the logits."
    assert Few.model_fields["loss"].description == description


def published(raw: dict[str, Any], out: Path, **sections: dict[str, Any]) -> tuple[str, str]:
    """The report and the card of a run whose sections are changed."""
    changed = raw | {name: raw[name] | section for name, section in sections.items()}
    run(build_recipe(changed), out)
    return (out / "report.html").read_text(), (out / "student" / "README.md").read_text()


def test_a_family_that_is_added_works_to_report_and_card(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model type of transformers that has no table is given one."""
    assert "seed_oss" not in FAMILIES
    monkeypatch.setitem(FAMILIES, "seed_oss", replace(MISTRAL, name="seed_oss", gguf=None))
    monkeypatch.setitem(tiny.VARIANTS, "seed_oss", ("seed_oss", {"attention_bias": False}))
    (tmp_path / "teacher").mkdir()
    teacher = small.teacher(tmp_path / "teacher", "seed_oss")
    report, card = published(raw | {"model": str(teacher)}, tmp_path / "out")
    assert "<h2>Why this student</h2>" in report and "\n- seed_oss\n" in card
    student = tiny.model(tmp_path / "out" / "student")
    assert type(student).__name__ == "SeedOssForCausalLM" and student.config.num_hidden_layers == 3


def test_a_loss_that_is_added_works_to_report_and_card(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absolute(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
        return beta * (student - teacher).abs().mean(-1)

    row = replace(LOSSES["mse"], of=absolute, title="absolute difference", options=("beta",))
    monkeypatch.setitem(LOSSES, "absolute", row)
    report, card = published(raw, tmp_path / "out", distill={"loss": {"absolute": 2.0, "forward_kl": 1.0}})
    assert "2 absolute difference + forward KL, hidden states too" in report
    assert "with the loss\n   2 absolute difference + forward KL" in card


def test_an_optimizer_that_is_added_works_to_report_and_card(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(groups: Any, betas: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=betas[0])

    monkeypatch.setitem(OPTIMIZERS, "sgd", OptimizerRow(made, "plain descent"))
    report, card = published(raw, tmp_path / "out", distill={"optimizer": "sgd", "learning_rate": 1e-3})
    assert "optimizer: sgd" in report and "optimizer: sgd" in card


def test_a_criterion_that_is_added_works_to_report_and_card(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(CRITERIA["random"], title="another draw")
    monkeypatch.setitem(CRITERIA, "draw", row)
    report, card = published(raw, tmp_path / "out", prune={"criterion": "draw", "seed": 3})
    assert "units by another draw;" in report and "the criterion `draw`" in card


@pytest.mark.parametrize("drops", [False, True])
def test_a_layer_criterion_that_is_added_works_to_report_and_card(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drops: bool
) -> None:
    def score(measure: Measure, num_layers: int, *num_dropped: int) -> Tensor:
        assert num_dropped == ((1,) if drops else ())
        return -leave_one_out(measure, num_layers)

    row = replace(LAYER_CRITERIA["loss"], score=score, title="the other way round", drops=drops)
    monkeypatch.setitem(LAYER_CRITERIA, "reversed", row)
    report, card = published(raw, tmp_path / "out", prune={"layer_criterion": "reversed", "layer_samples": 2})
    assert "Layers, by the other way round" in report and "layers by `reversed`" in card


def test_a_repair_that_is_added_works_on_the_weights_and_to_report_and_card(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halved(tensor: Tensor, plan: Plan, layer: int, scores: Scores) -> Tensor:
        assert plan.layers[layer] < plan.teacher.layers and scores.ffn.shape == (plan.teacher.layers, plan.teacher.ffn)
        return tensor / 2

    row = Repair(
        ("ffn",), "The outputs of the MLP were halved.", doc="the MLP is halved", site="mlp_out", change=halved
    )
    monkeypatch.setitem(REPAIRS, "halved", row)
    published(raw, tmp_path / "plain")
    report, card = published(raw, tmp_path / "out", repair={"steps": ["halved"]})
    assert "<dt>halved</dt><dd>The outputs of the MLP were halved.</dd>" in report
    assert "Repaired at the cut by `halved`." in card
    plain, changed = (tiny.tensors(tmp_path / out / "pruned") for out in ("plain", "out"))
    for name, tensor in plain.items():
        assert torch.equal(changed[name], tensor / 2 if "down_proj" in name else tensor), name


def test_a_stage_that_is_added_works_to_report_and_card(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_layers(made: Run) -> None:
        def work(out: Path) -> dict[str, object]:
            return {"layers": made.shape.layers}

        made.directory.do("counted", work, inputs={"model": made.digest(made.teacher.path)}, config={})

    monkeypatch.setitem(STAGES, "counted", "the number of layers")
    monkeypatch.setitem(PIPELINE, "counted", Stage(count_layers))
    report, card = published(raw, tmp_path / "out")
    assert "<dt>counted</dt><dd>the number of layers</dd>" in report and card
    assert json.loads((tmp_path / "out" / "counted" / "record.json").read_text())["result"] == {"layers": 3}


def test_the_stages_of_a_run_are_those_that_the_layout_describes() -> None:
    assert list(PIPELINE) == list(STAGES)


class Names(Layout):
    tensors: int
    files: list[FileName]


def test_an_exporter_that_is_added_works_to_report_card_and_push(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(export: Export, out: Path) -> dict[str, object]:
        names = [spec.name for spec in export.student.specs()]
        (out / "names.txt").write_text("\n".join(names))
        table: dict[str, object] = {"tensors": len(names), "files": ["names.txt"]}
        write_json(out / "table.json", table)
        return table

    row = Exporter(
        title="Names of tensors",
        write=write,
        table="table.json",
        kind=FileKind("a table of names", TypeAdapter(Names)),
        report=lambda found: [html.note(f"{found.tensors} names were written.")],
        card=lambda found, prompt: f"{found.files[0]} has {found.tensors} names.",
        files=lambda found, directory: [directory / file for file in found.files],
    )
    monkeypatch.setitem(EXPORTERS, "names", row)
    out = tmp_path / "out"
    report, card = published(raw, out)
    count = len(list(open_checkpoint(out / "student").specs()))
    assert f'<h2>Names of tensors</h2>\n<p class="note">{count} names were written.</p>' in report
    assert f"\n## Names of tensors\n\nnames.txt has {count} names.\n\n## How it was made" in card
    assert len((out / "names" / "names.txt").read_text().splitlines()) == count
    assert out / "names" / "names.txt" in [upload.file for upload in planned_uploads(read_run(out))]
    before = (out / "names" / "record.json").read_bytes()
    assert run(build_recipe(raw), out).stages["names"].result["tensors"] == count
    assert (out / "names" / "record.json").read_bytes() == before


def test_a_section_that_is_made_before_a_row_is_added_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPAIRS, "nothing", Repair(("ffn",), "Nothing.", doc="nothing"))
    monkeypatch.setitem(LOSSES, "another", LOSSES["mse"])
    assert RepairConfig(steps=["nothing"]).steps == ["nothing"]
    assert DistillConfig(loss={"another": 1.0}).objective.reads == {"logits"}
