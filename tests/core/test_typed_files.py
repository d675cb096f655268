"""A file of a known kind is what it should be, or one line says where it is not and what to do."""

import json
from pathlib import Path
from typing import Any

import example_run
import pytest
import small
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import Statistics
from minitron.core.errors import DataError, RunError
from minitron.core.run_layout import RECORD
from minitron.core.typed_files import parse_yaml, read_tensors, read_typed, read_typed_lines
from minitron.data.corpus import open_corpus, require_undamaged
from minitron.distillation.layouts import LESSONS, LOGGED, Logged
from minitron.model.checkpoint import open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.report.page import render
from minitron.report.records import read_run

ROW = {"step": 1, "tokens": 64, "loss": 4.0, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row.json is not JSON"),
        ("[]", r"row.json is not a row of metrics: .*valid dictionary.*\(got \[\]\)"),
        ("null", r"row.json is not a row of metrics: .*\(got None\)"),
        ('{"step": 1}', "row.json is not a row of metrics: tokens is missing"),
        ('{"step": "1", "tokens": 2}', r"step: Input should be a valid integer \(got '1'\)"),
        ('{"step": true, "tokens": 2}', r"step: Input should be a valid integer \(got True\)"),
        ('{"step": 1, "tokens": -2}', r"tokens: Input should be greater than 0 \(got -2\)"),
        ('{"step": 1, "tokens": 1e400}', r"tokens: .*\(got inf\)"),
        ('{"step": 1, "tokens": 99999999999999999999}', r"tokens: .*\(got 99999999999999999999\)"),
        ('{"step": 1, "tokens": 2, "loss": NaN}', r"loss: .*\(got nan\)"),
        ('{"step": 1, "tokens": [[[[[[[[1]]]]]]]]}', r"tokens: .*\(got \[\[\[\[\[\[\[\.\.\.\]\]\]\]\]\]\]\)"),
    ],
)
def test_what_a_file_does_not_hold_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text(text)
    with pytest.raises(RunError, match=rf"{message}.*; remove it$"):
        read_typed(tmp_path / "row.json", LOGGED, RunError, way_out="remove it")


def test_a_message_is_short_however_large_the_value(tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text(json.dumps({"step": "x" * 100_000, "tokens": 1}))
    with pytest.raises(RunError) as caught:
        read_typed(tmp_path / "row.json", LOGGED, RunError, way_out="remove it")
    assert len(str(caught.value)) < 300


def test_what_the_type_does_not_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text(json.dumps(ROW | {"note": [1]}))
    assert read_typed(tmp_path / "row.json", LOGGED, RunError, way_out="") == Logged(**ROW)


def test_a_bad_line_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n\n{json.dumps(ROW | {'step': 0})}\n")
    with pytest.raises(RunError, match=r"rows.jsonl, line 3, is not a row of metrics: step: .*; remove it"):
        read_typed_lines(tmp_path / "rows.jsonl", LOGGED, RunError, way_out="remove it")


@pytest.mark.parametrize(
    "text", ["a: [", "a: 2024-13-45", "a: " + "9" * 5000, "a: *b", "[" * 3000, "a: !!python/name:os"]
)
def test_what_is_no_yaml_is_one_error(text: str) -> None:
    with pytest.raises(RunError, match=r"^recipe.yaml is (not|no) YAML"):
        parse_yaml(text, "recipe.yaml", yaml.SafeLoader, RunError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "the alias at line 1 leads back to itself"),
        (
            "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]),
            "holds more",
        ),
    ],
)
def test_aliases_stand_for_a_bounded_number_of_values(text: str, message: str) -> None:
    with pytest.raises(RunError, match=rf"^recipe.yaml is not YAML: .*{message}"):
        parse_yaml(text, "recipe.yaml", yaml.SafeLoader, RunError)
    assert parse_yaml("a: &a [1, 2]\nb: *a\n<<: {c: 3}", "recipe.yaml", yaml.SafeLoader, RunError) == {
        "a": [1, 2],
        "b": [1, 2],
        "c": 3,
    }


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", b"\x01" + b"\0" * 7 + b"["])
def test_what_is_no_safetensors_file_is_one_error_or_empty(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    if data[8:] == b"{}":
        assert read_tensors(tmp_path / "x.safetensors", RunError) == {}
        return
    with pytest.raises(RunError, match=r"x.safetensors is no safetensors file, or a damaged one"):
        read_tensors(tmp_path / "x.safetensors", RunError)


def test_a_file_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    facts = {"vocab": 3, "top_k": 2, "temperature": 1.0, "block_tokens": 4}
    for name in ("../shard", "..", ".", "a/b", ""):
        shards = [{"file": name, "blocks": 1, "sha256": ""}]
        (tmp_path / "lessons.json").write_text(json.dumps(facts | {"shards": shards}))
        with pytest.raises(RunError, match=r"is not the description of recorded logits: shards.0.file"):
            read_typed(tmp_path / "lessons.json", LESSONS, RunError, way_out="")


@pytest.mark.parametrize("file", ["train.bin", "heldout.bin", "heldout_bytes.bin"])
@pytest.mark.parametrize("act", ["flip", "cut", "remove"])
def test_a_corpus_whose_bytes_are_others_is_refused(file: str, act: str, tmp_path: Path, llama: Path) -> None:
    tiny.tokenizer(tmp_path)
    corpus = small.corpus(tmp_path / "data", tmp_path)
    assert open_corpus(corpus.path) == corpus
    data = bytearray((corpus.path / file).read_bytes())
    data[1] ^= 1
    (corpus.path / file).unlink()
    if act != "remove":
        (corpus.path / file).write_bytes(data if act == "flip" else data[:-1])
    with pytest.raises(DataError, match=rf"{file}.*damaged; remove .*data and run the same command"):
        require_undamaged(open_corpus(corpus.path))


def _renamed(tensors: dict[str, Any]) -> None:
    tensors["sums.mlp"] = tensors.pop("sums.mlp_in")


def _longer(tensors: dict[str, Any]) -> None:
    tensors["cosine"] = torch.zeros(5, dtype=torch.float64)


def _float32(tensors: dict[str, Any]) -> None:
    tensors["sums.mlp_out"] = tensors["sums.mlp_out"].float()


def _not_finite(tensors: dict[str, Any]) -> None:
    tensors["sums.head_in"][0, 0, 0, 3] = torch.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_renamed, "has no tensor sums.mlp_in"),
        (_longer, r"cosine is float64 \[5\], and of the model in .* it is float64 \[4\]"),
        (_float32, "sums.mlp_out is float32"),
        (_not_finite, "sums.head_in holds numbers that are not finite"),
    ],
)
def test_statistics_that_do_not_fit_the_model_are_refused(
    damage: Any, message: str, llama: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(llama)
    measure_statistics(checkpoint, Samples(tiny.tokens(2, 8)), Pass(torch.float32)).save(tmp_path)
    Statistics.load_for(checkpoint, tmp_path)
    tensors = load_file(tmp_path / "statistics.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "statistics.safetensors")
    with pytest.raises(RunError, match=rf"statistics.safetensors.*{message}.*collect them again with `minitron calib"):
        Statistics.load_for(checkpoint, tmp_path)


def _at(place: str, value: Any) -> Any:
    def change(tree: Any) -> None:
        *path, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
        for part in path:
            tree = tree[part]
        tree[last] = value

    return change


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "no layout": ("student/record.json", _at("seconds", None), "record.json is not the record of a stage: seconds"),
    "of another stage": ("student/record.json", _at("result", {}), "the result is not that of the stage student"),
    "unit twice": ("plan/plan.json", _at("ffn.1", [4] * 8), "ffn must list 8 different indices below 12"),
    "other layers": ("pruned/plan.json", _at("layers", [0, 1, 2]), "keeps other layers than plan/plan.json"),
    "other teacher": ("plan/plan.json", _at("teacher.ffn", 13), "is of another model than evaluations/teacher.json"),
    "short scores": ("scores/scores.json", _at("ffn.1", [1.0]), "ffn has not a score for each of the teacher's units"),
    "a text": ("evaluations/student.json", _at("lm_loss", "3.8"), r"lm_loss: .* valid number \(got '3.8'\)"),
    "no shape": ("evaluations/teacher.json", _at("shape.heads", 0), "shape.heads: .* greater than 0"),
    "no text": ("evaluations/generations.json", _at("0.student", None), "0.student: .* valid string"),
    "a range": ("evaluations/speed.json", _at("teacher.prefill_range", [1.0]), "teacher.prefill_range"),
    "a loss": ("recipe.yaml", _at("distill.loss", "forward_k"), "recipe.yaml is not a run's recipe: distill.loss"),
}


@pytest.mark.parametrize(("file", "change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_of_a_run_is_named(file: str, change: Any, message: str, tmp_path: Path) -> None:
    path = example_run.write(tmp_path / "run")
    render(read_run(path))
    tree = yaml.safe_load((path / file).read_text())
    change(tree)
    (path / file).write_text(json.dumps(tree))
    with pytest.raises(RunError, match=rf"{file}.*{message}|{message}") as caught:
        read_run(path)
    assert file in str(caught.value)


def test_a_record_that_is_gone_is_named(tmp_path: Path) -> None:
    path = example_run.write(tmp_path / "run")
    (path / "evaluations" / "pruned.json").unlink()
    with pytest.raises(RunError, match=r"evaluations/pruned.json is missing: the run in .* was changed after it ended"):
        read_run(path)
    (path / "evaluations" / "pruned.json").symlink_to("nowhere")
    with pytest.raises(RunError, match=r"pruned.json is a link to nowhere, which does not exist"):
        read_run(path)


def test_the_records_that_runs_write_have_their_type(tmp_path: Path) -> None:
    path = example_run.write(tmp_path / "run")
    for record in path.glob("*/record.json"):
        read_typed(record, RECORD, RunError, way_out="")
