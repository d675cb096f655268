"""The whole pipeline: its files, its resume after anything, and that the stored recipe makes the same student again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench
import gguf
import pytest
import small
import tiny
import torch
import yaml
from gguf import GGMLQuantizationType as BlockType

from minitron.calibration.statistics import Statistics
from minitron.cli.main import main
from minitron.core.errors import MinitronError, RunError, TaskError
from minitron.data.config import DataConfig
from minitron.data.corpus import draw_samples, open_corpus
from minitron.evaluation.quality import measure_quality
from minitron.evaluation.tasks.measure import TaskOptions, measure_tasks, plan_tasks
from minitron.gguf.file import describe_gguf, plain_types, write_gguf
from minitron.gguf.types import mixture, write_quantized
from minitron.model.architecture import PRUNABLE
from minitron.model.checkpoint import open_checkpoint
from minitron.model.samples import Batch
from minitron.pipeline.run import run
from minitron.pruning.plan import Plan
from minitron.recipe import build_recipe, load_recipe
from minitron.shapes.space import SearchConfig

STAGES = ("data", "statistics", "scores", "plan", "pruned", "student", "scratch", "evaluations", "gguf")
FILES = (
    "recipe.yaml",
    "data/corpus.json",
    "statistics/statistics.safetensors",
    "scores/scores.json",
    "plan/plan.json",
    "pruned/config.json",
    "pruned/model.safetensors",
    "student/config.json",
    "student/model.safetensors",
    "student/README.md",
    "distill/metrics.jsonl",
    "evaluations/teacher.json",
    "evaluations/pruned.json",
    "evaluations/student.json",
    "evaluations/scratch.json",
    "evaluations/generations.json",
    "evaluations/speed.json",
    "report.html",
    *(f"{stage}/record.json" for stage in STAGES),
)
PROMPT = "the rain in"


class Heard:
    def __init__(self) -> None:
        self.stages: list[tuple[str, str]] = []
        self.said: list[str] = []

    def stage(self, name: str, state: str) -> None:
        self.stages.append((name, state))

    def progress(self, done: int, total: int, note: str = "") -> None:
        assert 0 < done <= total

    def warn(self, text: str) -> None:
        self.said.append(text)


def raw_recipe(path: Path, variant: str, **changes: Any) -> dict[str, Any]:
    """A short whole run of a tiny teacher, with everything that can be left open left open."""
    return {
        "model": str(small.teacher(path / "teacher", variant)),
        "data": {"source": str(small.text(path / "text.jsonl")), "heldout_fraction": 0.2, "block_tokens": 16},
        "calibrate": {"samples": 8},
        "prune": {"shape": {"hidden": 24, "ffn": 24, "layers": 3}},
        "distill": {"tokens": 20 * 4 * 16, "batch_blocks": 4, "evaluate_blocks": 4},
        "evaluate": {"blocks": 8, "prompts": [PROMPT], "new_tokens": 12, "speed": False},
    } | changes


VARIANTS = ("llama-tied",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directories of finished runs, to read only."""
    outs = {}
    for variant in VARIANTS:
        path = tmp_path_factory.mktemp(variant)
        raw = raw_recipe(path, variant, scratch_baseline=True)
        raw["evaluate"]["speed"] = True
        raw["gguf"] = {"types": ["Q8_0"], "verify": False, "samples": 4}
        (path / "teacher" / "README.md").write_text("---\nlicense: mit\nlanguage: en\nsize_label: 8B\n---\n# Teacher\n")
        run(build_recipe(raw), path / "out")
        outs[variant] = path / "out"
    return outs


@pytest.fixture(params=VARIANTS)
def finished(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Path:
    return runs[request.param]


def test_a_run_writes_gguf_files_of_its_student(finished: Path) -> None:
    """Those that the student's directory alone makes, which has its card by then."""
    table = json.loads((finished / "gguf" / "quantization.json").read_text())
    (row,) = table["files"]
    assert (row["name"], row["measured"]) == ("Q8_0", None) and row["file"] == f"{table['model']}-Q8_0.gguf"
    model = describe_gguf(open_checkpoint(finished / "student"), name=table["model"])
    write_quantized(model, mixture(model, "Q8_0", informed=True), finished.parent / "again.gguf")
    assert (finished.parent / "again.gguf").read_bytes() == (finished / "gguf" / row["file"]).read_bytes()
    said = {key: field.contents() for key, field in gguf.GGUFReader(finished / "gguf" / row["file"]).fields.items()}
    assert said["general.size_label"] == gguf.size_label(tiny.model(finished / "student").num_parameters(), 0, 0, 0)
    assert (said["general.name"], said["general.license"]) == (table["model"], "mit")
    assert "minitron" in said["general.tags"] and "general.languages" not in said
    card = (finished / "student" / "README.md").read_text()
    assert f"llama-cli -m {row['file']}" in card and f"FROM ./{row['file']}" in card and "None was tested" in card


def stamps(path: Path) -> dict[str, int]:
    """Modification time of every file but those that each call writes from the records."""
    again = {".lock", "recipe.yaml", "report.html", "student/README.md"}
    names = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
    return {name: file.stat().st_mtime_ns for name, file in names.items() if name not in again}


def assert_same_student(one: Path, other: Path) -> None:
    first, second = tiny.tensors(one / "student"), tiny.tensors(other / "student")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_has_every_file_of_the_contract_and_no_leftover(finished: Path) -> None:
    names = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    assert names.issuperset(FILES)
    assert not [name for name in names if ".partial" in name or "state-" in name]
    assert tiny.logits(tiny.model(finished / "student"), tiny.tokens(1, 8)).isfinite().all()


def test_the_evaluations_are_those_of_the_models_on_disk(finished: Path) -> None:
    models = {name: finished / name for name in ("pruned", "student", "scratch")}
    models["teacher"] = finished.parent / "teacher"
    teacher = tiny.model(models["teacher"])
    measured = {}
    for name, path in models.items():
        guide = None if name == "teacher" else teacher
        expected = measure_quality(tiny.model(path), open_corpus(finished / "data").heldout.head(8), teacher=guide)
        measured[name] = json.loads((finished / "evaluations" / f"{name}.json").read_text())
        assert {key: measured[name][key] for key in expected.to_dict()} == pytest.approx(expected.to_dict())
        assert measured[name]["parameters"]["total"] == open_checkpoint(path).parameters.total
    assert measured["student"]["kl_to_teacher"] < measured["pruned"]["kl_to_teacher"]
    assert measured["student"]["shape"] == measured["scratch"]["shape"] == measured["pruned"]["shape"]


def test_without_repair_the_pruned_model_is_the_plan_cut_from_the_teacher(finished: Path, tmp_path: Path) -> None:
    made = tmp_path / "run"
    run(load_recipe(finished / "recipe.yaml", ["repair.steps=[]", "scratch_baseline=false"]), made)
    plan = Plan.load(made / "plan" / "plan.json")
    assert plan == Plan.load(made / "pruned" / "plan.json")
    name = "model.layers.{}.mlp.down_proj.weight"
    teacher, pruned = tiny.tensors(finished.parent / "teacher"), tiny.tensors(made / "pruned")
    for layer, kept in enumerate(plan.layers):
        expected = teacher[name.format(kept)][list(plan.hidden)][:, list(plan.ffn[layer])]
        assert torch.equal(pruned[name.format(layer)], expected)


def test_the_same_command_again_skips_everything(finished: Path) -> None:
    recipe, before, heard = load_recipe(finished / "recipe.yaml"), stamps(finished), Heard()
    run(recipe, finished, heard)
    assert heard.stages == [(stage, "unchanged") for stage in STAGES]
    assert stamps(finished) == before


def test_the_stored_recipe_is_resolved_and_makes_the_same_student_again(finished: Path, tmp_path: Path) -> None:
    stored = load_recipe(finished / "recipe.yaml")
    correction = {"correction", "correction_tokens", "correction_learning_rate", "correction_warmup_steps"}
    assert {name for name, value in stored.distill if value is None} == {
        "top_k",
        "minutes",
        "stop_at_loss",
        *correction,
    }
    assert "auto" not in (stored.calibrate.precision, stored.distill.precision)
    again = run(stored, tmp_path / "again")
    assert load_recipe(tmp_path / "again" / "recipe.yaml") == stored
    assert again.whole_recipe == yaml.safe_load((finished / "recipe.yaml").read_text())
    assert_same_student(finished, tmp_path / "again")
    rows = [(out / "distill" / "metrics.jsonl").read_text() for out in (finished, tmp_path / "again")]
    assert rows[0] == rows[1]


def test_a_gguf_file_makes_the_student_of_the_checkpoint_that_it_was_written_from(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "teacher.gguf"
    described = describe_gguf(open_checkpoint(finished.parent / "teacher"))
    write_gguf(described, file, plain_types(described, BlockType.F32), keys={})
    changes = [f"model={file}", "scratch_baseline=false", "gguf={}", "evaluate.speed=false"]
    recipe, heard = load_recipe(finished / "recipe.yaml", changes), Heard()
    run(recipe, tmp_path / "out")
    assert_same_student(finished, tmp_path / "out")
    file.touch()  # what counts is the content
    run(recipe, tmp_path / "out", heard)
    assert {state for _, state in heard.stages} == {"unchanged"}
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match="was made from other inputs; changed: "):
        run(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "stage", "named"),
    [
        ("data.heldout_fraction=0.3", "data", r"data.heldout_fraction \(0.2, now 0.3\)"),
        ("calibrate.samples=4", "statistics", r"calibrate.samples \(8, now 4\)"),
        ("prune.shape.ffn=32", "plan", r"shape.ffn \(24, now 32\)"),
        ("distill.learning_rate=0.01", "student", r"distill.learning_rate \([0-9.]+, now 0.01\)"),
        ("evaluate.blocks=4", "evaluations", r"evaluate.blocks \(8, now 4\)"),
    ],
)
def test_a_changed_recipe_is_an_error_that_names_the_change(
    finished: Path, change: str, stage: str, named: str
) -> None:
    stored, before = (finished / "recipe.yaml").read_text(), stamps(finished)
    with pytest.raises(RunError, match=f"{stage} was made from other inputs; changed: .*{named}"):
        run(load_recipe(finished / "recipe.yaml", [change]), finished)
    assert (finished / "recipe.yaml").read_text() == stored and stamps(finished) == before


def test_changed_text_or_weights_are_an_error_that_names_them(tmp_path: Path) -> None:
    raw = raw_recipe(tmp_path, "llama", distill={"tokens": 128, "batch_blocks": 4})
    recipe = build_recipe(raw)
    run(recipe, tmp_path / "out")
    text = (tmp_path / "text.jsonl").read_text()
    small.text(tmp_path / "text.jsonl", seed=1)
    with pytest.raises(RunError, match=r"data was made from other inputs; changed: text\. Put them back"):
        run(recipe, tmp_path / "out")
    (tmp_path / "text.jsonl").write_text(text)
    tiny.checkpoint("llama", tmp_path / "teacher", rms_norm_eps=1e-4)
    with pytest.raises(RunError, match=r"statistics was made from other inputs; changed: model\."):
        run(recipe, tmp_path / "out")


def test_an_interrupted_training_does_not_go_on_with_another_recipe(tmp_path: Path) -> None:
    steps = 10
    recipe = build_recipe(raw_recipe(tmp_path, "llama", distill={"tokens": steps * 4 * 16, "batch_blocks": 4}))

    class Impatient(Heard):
        def progress(self, done: int, total: int, note: str = "") -> None:
            if total == steps and done == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out", Impatient())
    assert list((tmp_path / "out" / "distill").glob("state-*"))
    other = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"weight_decay": 0.2})})
    with pytest.raises(RunError, match=r"distill was made from other inputs; changed: distill.weight_decay \(0.1, now"):
        run(other, tmp_path / "out")
    newest = max((tmp_path / "out" / "distill").glob("state-*"))
    (newest / "state.json").unlink()
    heard = Heard()
    run(recipe, tmp_path / "out", heard)
    assert heard.said[0] == f"{newest} cannot be used: state.json is missing" and "goes on from" in heard.said[1]
    run(recipe, tmp_path / "undisturbed")
    assert_same_student(tmp_path / "out", tmp_path / "undisturbed")


def test_a_run_that_keeps_documents_apart_does_so_throughout(tmp_path: Path) -> None:
    raw = raw_recipe(tmp_path, "llama")
    short = [json.dumps({"text": " ".join(small.WORDS.split()[n % 9 : n % 9 + 3]) + f" {n}"}) for n in range(400)]
    Path(raw["data"]["source"]).write_text("\n".join(short))
    raw["data"]["separate_documents"] = True
    raw["calibrate"] = {"samples": 32, "precision": "float32"}
    raw["prune"] |= {"layer_criterion": "loss", "layer_samples": 8, "iterations": 2}
    raw |= {"distill": {"tokens": 640, "batch_blocks": 4}, "repair": {"steps": ["refit"]}}
    records = run(build_recipe(raw), tmp_path / "out")
    corpus = open_corpus(tmp_path / "out" / "data")
    assert corpus.separator is not None
    teacher = tiny.model(tmp_path / "teacher")
    for name in ("teacher", "student"):
        model = teacher if name == "teacher" else tiny.model(tmp_path / "out" / name)
        found = measure_quality(model, corpus.heldout.head(8))
        assert records.evaluations[name].lm_loss == pytest.approx(found.lm_loss, rel=1e-5)

    inputs: list[torch.Tensor] = []
    teacher.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].abs()))
    tokens = draw_samples(corpus, 32, 0).tokens
    with torch.no_grad():
        teacher(**Batch(tokens, corpus.separator).inputs, use_cache=False)
        teacher(input_ids=tokens, use_cache=False)
    apart, across = (each.mean(1).sum(0) for each in inputs)
    counted = Statistics.load(tmp_path / "out" / "statistics").sums["mlp_out"][2, 0, 0].float()
    torch.testing.assert_close(counted, apart, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(counted, across, rtol=1e-2, atol=1e-2)


def sampled_recipe(path: Path, **changes: Any) -> dict[str, Any]:
    data = {"source": "teacher", "heldout_fraction": 0.2, "block_tokens": 16, "sample_batch": 8}
    return raw_recipe(path, "llama", distill={"tokens": 40 * 16, "batch_blocks": 4}) | {"data": data} | changes


def test_a_run_on_text_sampled_from_the_teacher_says_so_and_is_resumed(tmp_path: Path) -> None:
    recipe = build_recipe(sampled_recipe(tmp_path))

    class Impatient(Heard):
        def progress(self, done: int, total: int, note: str = "") -> None:
            super().progress(done, total, note)
            if total == 40 * 16 and done > 400:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out", Impatient())
    assert (tmp_path / "out" / "data-state" / "sampled.jsonl").read_text().count("\n") % 8 == 0
    with pytest.raises(RunError, match=r"data-state was made from other inputs; changed: seed \(0, now 1\)"):
        run(recipe.model_copy(update={"seed": 1}), tmp_path / "out")
    records = run(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "data-state").exists()
    run(recipe, tmp_path / "undisturbed")
    for name in ("data/sampled.jsonl", "data/train.bin", "data/heldout.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert_same_student(tmp_path / "out", tmp_path / "undisturbed")

    heard = Heard()
    run(recipe, tmp_path / "out", heard)
    assert {state for _, state in heard.stages} == {"unchanged"}
    assert load_recipe(tmp_path / "out" / "recipe.yaml").data.max_tokens == 40 * 16
    sampled = records.stages["data"].result["sampled"]
    assert f"sampled from the teacher, {sampled['documents']} documents at temperature 1" in (
        (tmp_path / "out" / "report.html").read_text()
    )
    card = (tmp_path / "out" / "student" / "README.md").read_text()
    assert "of text sampled from the parent itself" in card and "held-out part" in card
    # The same text as any text: what is held out of it is held out again.
    kept = recipe.data.model_dump(exclude={"sample_batch"})  # which has an effect only where text is sampled
    given = DataConfig(**kept | {"source": str(tmp_path / "out" / "data" / "sampled.jsonl")})
    run(recipe.model_copy(update={"data": given}), tmp_path / "given")
    assert_same_student(tmp_path / "out", tmp_path / "given")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {}}, r"'teacher' is text without end, sampled from the teacher: say how many tokens to train on"),
        ({"data": {"heldout": "teacher"}}, r"data.heldout cannot be 'teacher': .* leave data.heldout out"),
    ],
)
def test_what_cannot_be_sampled_is_refused_at_once(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MinitronError, match=message):
        run(build_recipe(sampled_recipe(tmp_path, **changes)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


SEARCH = {
    "level": "distilled",
    "window": 0.2,
    "dims": {"layers": "2-4", "ffn": "8-40/8", "hidden": "16-32/8"},
    "cut_candidates": 4,
    "distill_candidates": 3,
    "first_rung": 0.2,
    "judge_blocks": 4,
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that searched for its shape, to read only."""
    path = tmp_path_factory.mktemp("searched")
    raw = raw_recipe(path, "llama", prune={"target": "50%"}, search=SEARCH)
    raw["distill"]["tokens"] = 20 * 4 * 16
    (path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    run(load_recipe(path / "recipe.yaml"), path / "out")
    return path / "out"


def test_the_student_of_a_search_is_that_of_its_shape_given_at_the_start(searched: Path, tmp_path: Path) -> None:
    """The winner's short runs are the first steps of the final distillation: no bit differs from one without search."""
    found = json.loads((searched / "search" / "candidates.json").read_text())["candidates"]
    assert [len(one["losses"]) for one in found[:5]] == [2, 2, 2, 1, 0]
    recipe = load_recipe(searched.parent / "recipe.yaml")
    prune = recipe.prune.model_copy(update={"target": None, "shape": {dim: found[0]["shape"][dim] for dim in PRUNABLE}})
    run(recipe.model_copy(update={"prune": prune, "search": SearchConfig()}), tmp_path / "undisturbed")
    assert_same_student(searched, tmp_path / "undisturbed")
    metrics = [(out / "distill" / "metrics.jsonl").read_text() for out in (searched, tmp_path / "undisturbed")]
    assert metrics[0] == metrics[1]
    assert not (searched / "search-state").exists() and not list(searched.glob("**/state-*"))


def test_candidates_are_cut_as_their_final_plan_is(tmp_path: Path) -> None:
    """Layers by their criterion and in steps: what the winner's short runs taught is the student that is planned."""
    prune = {"target": "50%", "layer_criterion": "loss", "layer_samples": 4, "iterations": 2}
    search = SEARCH | {"dims": {"layers": "2-3", "ffn": "16-40/8"}, "cut_candidates": 2, "distill_candidates": 2}
    raw = raw_recipe(tmp_path, "llama", prune=prune, search=search)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    records = run(recipe, tmp_path / "searched")
    shape = {dim: records.whole_recipe["prune"]["shape"][dim] for dim in PRUNABLE}
    assert shape["layers"] < 4
    prune = recipe.prune.model_copy(update={"target": None, "shape": shape})
    run(recipe.model_copy(update={"prune": prune, "search": SearchConfig()}), tmp_path / "undisturbed")
    assert_same_student(tmp_path / "searched", tmp_path / "undisturbed")


def test_a_search_is_not_made_again_and_its_stored_recipe_needs_none(searched: Path) -> None:
    before = stamps(searched)
    for recipe in (load_recipe(searched.parent / "recipe.yaml"), load_recipe(searched / "recipe.yaml")):
        heard = Heard()
        run(recipe, searched, heard)
        assert {state for _, state in heard.stages} == {"unchanged"}
        assert (("search", "unchanged") in heard.stages) == recipe.searches
        assert stamps(searched) == before
    changed = load_recipe(searched.parent / "recipe.yaml")
    changed = changed.model_copy(update={"search": changed.search.model_copy(update={"cut_candidates": 5})})
    with pytest.raises(
        RunError, match=r"search was made from other inputs; changed: search.cut_candidates \(4, now 5\)"
    ):
        run(changed, searched)


def test_a_search_that_was_interrupted_often_ends_with_the_same_student(searched: Path, tmp_path: Path) -> None:
    recipe, calls = load_recipe(searched.parent / "recipe.yaml"), 0

    class Impatient(Heard):
        def progress(self, done: int, total: int, note: str = "") -> None:
            nonlocal calls
            calls += 1
            if calls in (6, 14, 22, 30):
                raise KeyboardInterrupt

    interruptions = 0
    while True:
        try:
            run(recipe, tmp_path / "out", Impatient())
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 4
    assert_same_student(searched, tmp_path / "out")
    tables = [
        json.loads((out / "search" / "candidates.json").read_text())["candidates"]
        for out in (searched, tmp_path / "out")
    ]
    without_time = [[{k: v for k, v in row.items() if "seconds" not in k} for row in table] for table in tables]
    assert without_time[0] == without_time[1]


GENERATE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
*paths, prompt = sys.argv[1:]
texts = []
for path in paths:
    model, notes = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(notes.values()), (path, notes)
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    output = model.generate(tokens, attention_mask=mask, max_new_tokens=20, do_sample=False)
    texts.append(tokenizer.decode(output[0, tokens.shape[1]:], skip_special_tokens=True))
assert "minitron" not in sys.modules
print(json.dumps(texts))
"""


def test_what_a_run_makes_generates_the_same_text_without_minitron(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(out / name) for out in runs.values() for name in ("pruned", "student")]
    texts = []
    for path in paths:
        assert main(["generate", path, "--prompt", PROMPT, "--new-tokens", "20", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    done = subprocess.run([sys.executable, "-c", GENERATE, *paths, PROMPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == texts


def test_a_run_measures_benchmarks_and_says_which_one_chose(tmp_path: Path) -> None:
    rows = bench.write(tmp_path / "bench", ("piqa", "stories"))
    raw = raw_recipe(tmp_path, "llama")
    raw["prune"] |= {"layer_criterion": "task", "layer_task": str(rows / "stories" / "dev.jsonl")}
    raw["evaluate"] |= {"tasks_dir": str(rows), "limit": 4}
    records = run(build_recipe(raw), tmp_path / "out")
    assert records.tasks is not None
    tasks = records.tasks.tasks
    expected = measure_tasks(
        {"teacher": Path(raw["model"]), "student": tmp_path / "out" / "student"},
        plan_tasks([], rows, TaskOptions(limit=4)),
    )
    assert tasks == expected
    assert records.tasks.chosen_by == ["stories"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "stories (used to choose)" in page and "Only the first 4 items" in page
    assert run(build_recipe(raw), tmp_path / "out").tasks == records.tasks
    bench.dump(rows / "piqa" / "dev.jsonl", bench.rows("piqa", 5))
    with pytest.raises(RunError, match="evaluations was made from other inputs; changed: tasks"):
        run(build_recipe(raw), tmp_path / "out")


def test_benchmarks_that_cannot_be_measured_are_refused_before_the_work(tmp_path: Path) -> None:
    raw = raw_recipe(tmp_path, "llama")
    raw["evaluate"] |= {"tasks": ["humaneval"]}
    with pytest.raises(TaskError, match="allow it with --allow-code"):
        run(build_recipe(raw), tmp_path / "out")
    assert not (tmp_path / "out").exists()
