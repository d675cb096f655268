"""Every verb keeps its contract, and every bad input is one clear line that leaves nothing behind."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench
import published
import pytest
import small
import tiny
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.cli import main as cli
from minitron.cli.console import Console
from minitron.pipeline.directory import RunDirectory
from minitron.pruning.plan import Plan

SHAPE = "hidden=24,ffn=24,layers=3"
PROMPT = "the rain in"


@dataclass
class Desk:
    """A command line in a directory with a teacher and a text, and what it said."""

    path: Path
    teacher: Path
    text: Path
    capsys: pytest.CaptureFixture[str]

    def run(self, *command: Any) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        try:
            code = cli.main([str(word) for word in command])
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = self.capsys.readouterr()
        return code, out, err

    def json(self, *command: Any) -> Any:
        code, out, err = self.run(*command, "--json")
        assert code == 0, err
        return json.loads(out)

    def recipe(self, **changes: Any) -> Path:
        raw = {
            "model": str(self.teacher),
            "data": {"source": str(self.text), "block_tokens": 16},
            "prune": {"shape": {"ffn": 24}},
            "distill": {"tokens": 256, "batch_blocks": 4},
            "evaluate": {"blocks": 4, "prompts": [PROMPT], "new_tokens": 4, "speed": False},
        }
        (self.path / "recipe.yaml").write_text(yaml.safe_dump(raw | changes))
        return self.path / "recipe.yaml"

    def files(self) -> set[str]:
        return {str(file.relative_to(self.path)) for file in self.path.rglob("*")}

    def refuses(self, *command: Any, keeps: str = "nothing") -> str:
        """The one line that a refused command prints, after checking that it wrote nothing outside `keeps`."""
        before = self.files()
        code, out, err = self.run(*command, "--quiet")
        assert code == 1, (code, out, err)
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), (out, err)
        assert {file for file in self.files() - before if file.split("/")[0] != keeps} == set() == before - self.files()
        return err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("desk")
    small.teacher(path / "teacher")
    small.text(path / "text.jsonl")
    return path


@pytest.fixture
def desk(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    handler = signal.getsignal(signal.SIGTERM)
    yield Desk(tmp_path, made / "teacher", made / "text.jsonl", capsys)
    signal.signal(signal.SIGTERM, handler)


def test_help_of_every_verb_shows_its_example(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for verb in cli.COMMANDS:
        monkeypatch.setenv("COLUMNS", "80")
        code, out, _ = desk.run(verb, "--help")
        assert code == 0
        assert " ".join(cli.COMMANDS[verb].example.split()) in " ".join(out.split())
        assert cli.COMMANDS[verb].help in " ".join(out.split())


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["prun", "m"],
        ["prune", "m", "--out", "o"],
        ["prune", "m", "--out", "o", "--shape", "ffn=2", "--target-params", "50%"],
        ["prune", "m", "--out", "o", "--shape", "ffn"],
        ["prune", "m", "--out", "o", "--layers", "1-2"],
        ["prune", "m", "--out", "o", "--layers", "drop=1", "--target-params", "50%"],
        ["distill", "--teacher", "t", "--out", "o"],
        ["distill", "--teacher", "t", "--student", "s", "--out", "o", "--tokens", "20X"],
        ["evaluate", "m", "--blocks", "0"],
        ["calibrate", "m", "--out", "o", "--seed", "-1"],
        ["compress", "m"],
        ["run", "r", "--dry-run", "--gpus", "8", "--utilisation", "0"],
        ["run", "r", "--dry-run", "--gpus", "8", "--gpu-teraflops", "fast"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_prints_the_usage(desk: Desk, command: list[str]) -> None:
    code, out, err = desk.run(*command)
    assert code == 2 and out == "" and err.startswith("usage: minitron")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["prun"]], ids=" ".join)
def test_torch_is_not_waited_for_where_no_command_is_named(words: list[str]) -> None:
    code = (
        "import sys\nfrom minitron.cli.main import main\ntry:\n    main(sys.argv[1:])\n"
        "finally:\n    assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == (2 if words == ["prun"] else 0) and "AssertionError" not in done.stderr, done.stderr


def test_version_is_that_of_the_package(desk: Desk) -> None:
    from importlib.metadata import version

    assert desk.run("--version")[:2] == (0, f"minitron {version('minitron')}\n")


def test_inspect_says_what_the_model_is(desk: Desk) -> None:
    facts = desk.json("inspect", desk.teacher)
    model = tiny.model(desk.teacher)
    embedding = sum(p.numel() for name, p in model.named_parameters() if "embed" in name or "lm_head" in name)
    total = sum(p.numel() for p in model.parameters())
    assert facts["family"] == "llama" and facts["dtype"] == "float32" and facts["weight_bytes"] == 4 * total
    assert facts["shape"] == {
        "layers": 4, "hidden": 32, "ffn": 40, "heads": 8, "kv_heads": 4, "head_dim": 4, "vocab": 320,
    }  # fmt: skip
    counts = facts["parameters"]
    assert (counts["total"], counts["embedding"], counts["non_embedding"]) == (total, embedding, total - embedding)
    code, text, _ = desk.run("inspect", desk.teacher)
    assert code == 0 and f"{total:,}" in text and "embeddings are untied" in text


@pytest.mark.parametrize("model", published.MODELS.values(), ids=published.MODELS)
def test_inspect_counts_a_published_model_from_its_config_alone(desk: Desk, model: published.Published) -> None:
    path = model.write(desk.path / "model")
    facts = desk.json("inspect", path)
    assert (facts["parameters"]["total"], facts["parameters"]["non_embedding"]) == (model.total, model.non_embedding)
    assert facts["weights"] is False
    text = desk.run("inspect", path)[1]
    assert f"{model.total:,}" in text and f"{model.non_embedding:,}" in text and "not here" in text


def test_inspect_drafts_the_table_of_an_unknown_family(desk: Desk) -> None:
    config = AutoConfig.for_model("stablelm", **tiny.SIZES | {"num_hidden_layers": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(desk.path / "model")
    desk.capsys.readouterr()
    code, out, err = desk.run("inspect", desk.path / "model")
    assert code == 1 and err.startswith("error: model_type 'stablelm' is not supported")
    assert '"model.layers.{layer}.mlp.down_proj.weight": "hidden ffn",' in out and "docs/extend/family.md" in out
    drafted = json.loads(desk.run("inspect", desk.path / "model", "--json")[1])["draft"]
    assert drafted["config_keys"]["ffn"] == "intermediate_size" and not drafted["unplaced"]


def test_an_unknown_family_without_weights_is_refused_alone(desk: Desk) -> None:
    (desk.path / "config.json").write_text('{"model_type": "stablelm"}')
    assert "model_type 'stablelm' is not supported" in desk.refuses("inspect", desk.path)


def test_a_recipe_that_ships_runs_by_its_name(desk: Desk) -> None:
    teacher = published.MODELS["Llama-3.1-8B"].write(desk.path / "model")
    facts = desk.json("run", "llama-3.1-8b-to-4b-depth", "--set", f"model={teacher}", "--dry-run", "--gpus", "8")
    assert facts["student"]["shape"]["layers"] == 16
    assert "no recipe file nowhere.yaml" in desk.refuses("run", "nowhere.yaml")


def test_the_rooms_one_by_one(desk: Desk) -> None:
    path, data = desk.path, ("--data", desk.text)
    counted = desk.json("calibrate", desk.teacher, *data, "--samples", 8, "--block-tokens", 16, "--out", path / "stats")
    assert (counted["samples"], counted["tokens"]) == (8, 8 * 16)

    stats = ("--statistics", path / "stats", *data)
    by_shape = desk.json("prune", desk.teacher, "--shape", SHAPE, *stats, "--out", path / "pruned")
    assert [by_shape["shape"][dim] for dim in ("hidden", "ffn", "layers")] == [24, 24, 3]
    by_target = desk.json("prune", desk.teacher, "--target-params", "60%", *stats, "--out", path / "target")
    whole = desk.json("inspect", desk.teacher)["parameters"]["non_embedding"]
    assert 0.5 * whole < by_target["parameters"]["non_embedding"] <= 0.603 * whole
    plain = ("--repair", "none", "--plan", path / "pruned" / "plan.json")
    desk.json("prune", desk.teacher, *plain, "--out", path / "planned")
    assert Plan.load(path / "planned" / "plan.json") == Plan.load(path / "pruned" / "plan.json")
    assert by_shape["repairs"] == ["basis", "ffn_obs", "layers_least_squares"] and not same_weights(
        path / "planned", path / "pruned"
    )
    desk.json("prune", desk.teacher, "--shape", SHAPE, *data, "--samples", 9, "--out", path / "direct")
    desk.json("prune", desk.teacher, "--shape", SHAPE, *stats, "--samples", 9, "--out", path / "on_less")
    assert not same_weights(path / "on_less", path / "pruned")
    assert Plan.load(path / "direct" / "plan.json").student == Plan.load(path / "pruned" / "plan.json").student

    pair = ("--teacher", desk.teacher, "--student", path / "pruned")
    taught = desk.json("distill", *pair, *data, "--tokens", "4K", "--block-tokens", 16, "--out", path / "student")
    assert taught["shape"] == by_shape["shape"] and taught["training"]["tokens"] == 62 * 4 * 16
    assert not same_weights(path / "student", path / "pruned")
    assert not (path / "student.work").exists() and (path / "student" / "metrics.jsonl").is_file()

    measured = {
        name: desk.json("evaluate", path / name, "--teacher", desk.teacher, *data, "--block-tokens", 16)
        for name in ("pruned", "student")
    }
    assert measured["student"].keys() == {
        "lm_loss", "perplexity", "bits_per_byte", "kl_to_teacher", "top1_agreement", "tokens",
    }  # fmt: skip
    plainly = desk.json("evaluate", path / "planned", "--teacher", desk.teacher, *data, "--block-tokens", 16)
    assert measured["pruned"]["kl_to_teacher"] < plainly["kl_to_teacher"]
    alone = desk.json("evaluate", path / "student", *data, "--block-tokens", 16)
    assert alone == measured["student"] | {"kl_to_teacher": None, "top1_agreement": None}

    texts = [
        desk.json("generate", path / "student", "--prompt", PROMPT, "--new-tokens", 9, *sampling)["text"]
        for sampling in ((), ("--temperature", 2, "--seed", 1), ("--temperature", 2, "--seed", 1))
    ]
    assert texts[0] != texts[1] == texts[2]
    assert desk.run("generate", path / "student", "--prompt", PROMPT, "--new-tokens", 9)[1] == PROMPT + texts[0] + "\n"


def test_the_rooms_on_text_sampled_from_the_teacher(desk: Desk) -> None:
    path, data = desk.path, ("--data", "teacher")
    options = ("--samples", 100, "--block-tokens", 16)
    counted = desk.json("calibrate", desk.teacher, *data, *options, "--out", path / "stats")
    assert (counted["samples"], counted["tokens"]) == (100, 100 * 16)
    again = desk.json(
        "calibrate", desk.teacher, "--data", path / "stats" / "sampled.jsonl", *options, "--out", path / "again"
    )
    assert again == counted | {"out": str(path / "again")}
    first, second = (tiny.tensors(path / name) for name in ("stats", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    desk.json("prune", desk.teacher, "--shape", "ffn=24", "--statistics", path / "stats", "--repair", "none",
              "--out", path / "pruned")  # fmt: skip
    pair = ("--teacher", desk.teacher, "--student", path / "pruned", "--block-tokens", 16)
    taught = desk.json("distill", *pair, *data, "--tokens", 640, "--out", path / "student")
    assert taught["training"]["tokens"] >= 640 and (path / "student" / "sampled.jsonl").is_file()
    line = desk.refuses("distill", *pair, *data, "--out", path / "other")
    assert "'teacher' is text without end, sampled from the teacher: say how many tokens to train on with --tok" in line
    line = desk.refuses("evaluate", path / "student", "--teacher", desk.teacher, *data)
    assert "not to evaluate: give text, such as data/sampled.jsonl of a run that sampled some" in line


def same_weights(one: Path, other: Path) -> bool:
    first, second = tiny.tensors(one), tiny.tensors(other)
    return all(torch.equal(first[name], second[name]) for name in second)


def test_layers_by_number_of_a_plain_cut_need_neither_text_nor_statistics(desk: Desk) -> None:
    plain = ("--repair", "none")
    code, _, err = desk.run("prune", desk.teacher, "--layers", "drop=1-2", *plain, "--out", desk.path / "dropped")
    assert code == 0 and "no --data given" not in err
    desk.json("prune", desk.teacher, "--layers", "keep=0,3", *plain, "--out", desk.path / "kept")
    assert same_weights(desk.path / "dropped", desk.path / "kept")
    assert Plan.load(desk.path / "kept" / "plan.json").layers == (0, 3)


def test_units_from_a_file_with_scores_for_the_rest(desk: Desk) -> None:
    file = desk.path / "units.json"
    file.write_text(json.dumps({"ffn": [list(range(7))] * 4}))
    command = ("prune", desk.teacher, "--plan", file, "--shape", "layers=3", "--data", desk.text)
    desk.json(*command, "--layer-criterion", "loss", "--out", desk.path / "out")
    plan = Plan.load(desk.path / "out" / "plan.json")
    assert plan.ffn == (tuple(range(7)),) * 3 and len(plan.layers) == 3
    refused = desk.refuses(*command, "--repair", "ffn_obs", "--out", desk.path / "no")
    assert "repair step ffn_obs chooses which ffn stay, but the plan lists them: use ffn_least_squares" in refused
    whole = ("prune", desk.teacher, "--plan", desk.path / "out" / "plan.json", "--shape", "ffn=3")
    assert "is a whole plan, which says what stays of every dim" in desk.refuses(*whole, "--out", desk.path / "no")


def test_statistics_of_another_model_are_refused(desk: Desk) -> None:
    options = ("--data", desk.text, "--samples", 8, "--block-tokens", 16)
    desk.json("calibrate", desk.teacher, *options, "--out", desk.path / "stats")
    other = small.teacher(desk.path / "other", num_hidden_layers=3)
    command = ("prune", other, "--shape", "ffn=8", "--statistics", desk.path / "stats", "--out", desk.path / "out")
    message = desk.refuses(*command, "--data", desk.text)
    assert "were not collected from the model in" in message and "minitron calibrate" in message


def test_a_criterion_that_is_unknown_or_lacks_its_task_is_refused(desk: Desk) -> None:
    command = ("prune", desk.teacher, "--shape", "layers=2", "--data", desk.text, "--out", desk.path / "out")
    assert "--criterion: Input should be 'activation', 'magnitude' or" in desk.refuses(*command, "--criterion", "size")
    assert "needs a task" in desk.refuses(*command, "--layer-criterion", "task")
    task = ("--layer-criterion", "task", "--layer-task", "nowhere.jsonl")
    assert "task file nowhere.jsonl does not exist" in desk.refuses(*command, *task)


def test_search_ranks_every_shape_within_the_budgets(desk: Desk) -> None:
    options = ("--data", desk.text, "--block-tokens", 16, "--target-params", "50%", "--window", "0.2")
    desk.run("calibrate", desk.teacher, *options[:4], "--samples", 4, "--out", desk.path / "statistics")
    dims = ("--dims", "ffn=8-40/8", "layers=2-4")
    facts = desk.json("search", desk.teacher, "--statistics", desk.path / "statistics", *options[4:], *dims)
    found = facts["candidates"]
    damage = [one["predicted"] for one in found]
    assert len(found) > 5 and damage == sorted(damage)
    code, out, _ = desk.run("search", desk.teacher, "--statistics", desk.path / "statistics", *options[4:], *dims)
    sizes = [str(found[0]["shape"][dim]) for dim in ("layers", "hidden", "ffn", "heads", "kv_heads")]
    assert code == 0 and out.splitlines()[2].split()[:5] == sizes and f"{len(found)} shapes fit" in out
    limit = sorted(one["weight_bytes"] for one in found)[2]
    short = ("--max-memory", limit, "--cut", 2, "--set", "calibrate.samples=8")
    few = desk.json("search", desk.teacher, *options, *dims, *short)["candidates"]
    assert {one["name"] for one in few} == {one["name"] for one in found if one["weight_bytes"] <= limit}
    losses = [one["losses"]["0"] for one in few[:2]]
    assert losses == sorted(losses) and not few[2]["losses"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), r"size is not given: give prune.target \(--target-params\)"),
        (
            ("--target-params", "50%", "--max-memory", "1KB"),
            r"search.max_memory_bytes .* leaves none by itself\. Nearest: ",
        ),
        (("--target-params", "50%", "--dims", "ffn"), "--dims 'ffn': write it as dim=sizes"),
        (("--target-params", "50%", "--dims", "fnn=3"), "unknown dim 'fnn'; did you mean 'ffn'"),
        (("--target-params", "50%", "--window", "2"), "--window: Input should be less than 1"),
    ],
)
def test_a_search_that_finds_nothing_says_why(desk: Desk, options: tuple[str, ...], message: str) -> None:
    (desk.path / "statistics").mkdir()
    assert re.search(message, desk.refuses("search", desk.teacher, "--data", desk.text, "--block-tokens", 16, *options))


def test_run_and_compress_and_their_report_and_card(desk: Desk) -> None:
    facts = desk.json("run", desk.recipe(), "--set", "distill.tokens=512", "--out", desk.path / "a")
    assert [row["model"] for row in facts["models"]] == ["teacher", "pruned", "student"]
    assert yaml.safe_load((desk.path / "a" / "recipe.yaml").read_text())["distill"]["tokens"] == 512

    settings = ("--set", "evaluate.speed=false", "--set", "data.block_tokens=16", "--set", "evaluate.blocks=4")
    settings += ("--set", "evaluate.new_tokens=4")
    command = ("compress", desk.teacher, "--target-params", "60%", "--data", desk.text, "--tokens", 512, *settings)
    table = desk.run(*command, "--out", desk.path / "b")[1]
    assert all(word in table for word in ("teacher", "pruned", "student", "held-out text", "report.html"))
    for verb, file in (("report", "report.html"), ("card", "student/README.md")):
        before = (desk.path / "b" / file).read_text()
        (desk.path / "b" / file).unlink()
        assert desk.json(verb, desk.path / "b") == {verb: str(desk.path / "b" / file)}
        assert (desk.path / "b" / file).read_text() == before


@pytest.mark.parametrize("verb", ["run", "compress"])
def test_a_dry_run_says_what_it_would_make_and_writes_nothing(desk: Desk, verb: str) -> None:
    what = (desk.recipe(),) if verb == "run" else (desk.teacher, "--target-params", "60%", "--tokens", "1M")
    before = desk.files()
    facts = desk.json(verb, *what, "--dry-run", "--out", desk.path / "out")
    assert facts["distill_tokens"] == (256 if verb == "run" else 1_000_000)
    assert facts["student"]["parameters"]["total"] < facts["teacher"]["parameters"]["total"]
    assert facts["distill_flops"] > 0 and facts["here"]["seconds"] > 0 and facts["training_bytes"] > 0
    code, text, _ = desk.run(verb, *what, "--dry-run", "--gpus", "8", "--out", desk.path / "out")
    # The recipe gives its sizes; a target is planned with the largest shape that it allows.
    sizes = "layers=4 hidden=32 ffn=24 heads=8" if verb == "run" else "layers=3 hidden=32 ffn=36 heads=4"
    assert code == 0 and f"student: llama, {sizes} kv_heads=4" in text and "memory while distilling" in text
    assert "on 8 GPUs: " in text and "at an assumed 40% of 989 TFLOP/s each" in text
    assert desk.files() == before


def test_a_missing_data_option_is_noticed_on_stderr(desk: Desk) -> None:
    code, out, err = desk.run("compress", desk.teacher, "--target-params", "60%", "--dry-run", "--gpus", "8", "--json")
    assert code == 0 and json.loads(out)
    assert err.startswith("no --data given: using the built-in corpus")


def test_an_interrupted_distill_exits_with_130_and_the_same_command_goes_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = desk.path / "pruned"
    desk.json("prune", desk.teacher, "--shape", SHAPE, "--data", desk.text, "--out", student)
    command = ("distill", "--teacher", desk.teacher, "--student", student, "--data", desk.text, "--tokens", "1K")
    steps: list[int] = []

    def interrupt_at_third_step(console: cli.Console, done: int, total: int, note: str = "") -> None:
        steps.append(done)
        if steps[-1] == 3 and len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(cli.Console, "progress", interrupt_at_third_step)
    code, out, err = desk.run(*command, "--out", desk.path / "student", "--quiet")
    assert (code, out) == (130, "") and err.startswith("interrupted: stopped at step 4 of ") and err.count("\n") == 1
    assert not (desk.path / "student").exists()
    desk.json(*command, "--out", desk.path / "student")
    assert steps[3] == 5
    desk.json(*command, "--out", desk.path / "undisturbed")
    assert same_weights(desk.path / "student", desk.path / "undisturbed")


def test_an_interrupted_calibration_exits_with_130_and_leaves_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.Console, "progress", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = desk.files()
    code, out, err = desk.run("calibrate", desk.teacher, "--data", desk.text, "--out", desk.path / "out", "--quiet")
    assert (code, out) == (130, "") and err.startswith("interrupted; ")
    assert desk.files() == before


def change_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def drop_a_shard(model: Path) -> None:
    empty(model)
    small.teacher(model, "llama-sharded")
    sorted(model.glob("*.safetensors"))[1].unlink()


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def put_nan(model: Path) -> None:
    tensors = tiny.tensors(model)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def pickle(model: Path) -> None:
    torch.save(tiny.tensors(model), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def grow_tokenizer(model: Path) -> None:
    tokenizer = tiny.tokenizer(model)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(100)])
    tokenizer.save_pretrained(model)


def drop_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no model": (empty, "is not a model directory: it has no config.json"),
    "no directory": (shutil.rmtree, "does not exist"),
    "missing shard": (drop_a_shard, r"lacks 1 of \d+ shards that .* names: model-00002-of"),
    "truncated": (truncate, "model.safetensors is truncated: .* copy it again"),
    "contradiction": (
        lambda model: change_config(model, intermediate_size=48),
        r"mlp.\w+_proj.weight is \[.*40.*\], but by config.json it must be \[.*48.*\]",
    ),
    "too few layers": (lambda model: change_config(model, num_hidden_layers=3), "are not part of the llama family"),
    "too many layers": (
        lambda model: change_config(model, num_hidden_layers=5),
        "9 are missing in .*, first model.layers.4",
    ),
    "nan": (put_nan, "tensor model.layers.2.mlp.up_proj.weight holds NaN or infinity: the checkpoint is damaged"),
    "pickle": (pickle, r"only pickled weights \(pytorch_model.bin\)"),
    "unknown family": (
        lambda model: change_config(model, model_type="lama"),
        "model_type 'lama' is not supported; did you mean 'llama'",
    ),
    "config no json": (lambda model: (model / "config.json").write_text("{"), "config.json is not JSON"),
    "large tokenizer": (grow_tokenizer, "the tokenizer has 400 tokens but the model's vocabulary only 320"),
    "no tokenizer": (drop_tokenizer, "has no tokenizer that transformers can load"),
}
VERBS = {
    "prune": ("prune", "MODEL", "--shape", "ffn=24", "--data", "TEXT", "--out", "OUT"),
    "compress": ("compress", "MODEL", "--target-params", "60%", "--data", "TEXT", "--tokens", "1K", "--out", "OUT"),
    "distill": ("distill", "--teacher", "TEACHER", "--student", "MODEL", "--data", "TEXT", "--out", "OUT"),
    "evaluate": ("evaluate", "MODEL", "--data", "TEXT"),
    "generate": ("generate", "MODEL", "--prompt", PROMPT),
}
# Distillation reads the teacher's tokenizer; a prompt may well have only tokens that the model knows.
FINE = {("distill", "large tokenizer"), ("distill", "no tokenizer"), ("generate", "large tokenizer")}


@pytest.mark.parametrize("bad", BAD_MODELS)
def test_a_bad_model_is_one_line_and_nothing_is_written(desk: Desk, bad: str) -> None:
    model = desk.path / "model"
    shutil.copytree(desk.teacher, model)
    damage, message = BAD_MODELS[bad]
    damage(model)
    names = {"MODEL": model, "TEACHER": desk.teacher, "TEXT": desk.text}
    for verb, command in VERBS.items():
        names["OUT"] = desk.path / f"{verb}-out"
        if (verb, bad) not in FINE:
            assert re.search(message, desk.refuses(*(names.get(word, word) for word in command))), verb
            assert not list(desk.path.rglob("*.partial"))


BAD_TEXTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("text.txt", b"", "holds no text: every document in it is empty"),
    "blank": ("text.txt", b" \n\n\t\n", "holds no text: every document in it is empty"),
    "binary": ("text.txt", bytes(range(256)), r"is not UTF-8 text \(byte 128\)"),
    "nul": ("text.txt", b"abc\x00def", "is binary: it holds a NUL character at position 3"),
    "short": ("text.jsonl", b'{"text": "one"}\n{"text": "two"}\n', "fewer than one block of 64"),
    "single": ("text.txt", b"only one document", "is a single document, so nothing can be held out"),
    "not json": ("text.jsonl", b"{", "text.jsonl, line 1, is not JSON"),
    "other field": ("text.jsonl", b'{"content": "one"}', r"no field 'text' \(data.text_field\); it has content"),
    "other suffix": ("text.csv", b"a,b", "has the suffix '.csv'; data files end in .txt"),
}


@pytest.mark.parametrize("bad", BAD_TEXTS)
def test_a_bad_text_is_one_line_and_nothing_is_written(desk: Desk, bad: str) -> None:
    name, content, message = BAD_TEXTS[bad]
    (desk.path / name).write_bytes(content)
    out = ("--data", desk.path / name, "--out", desk.path / "out")
    pair = ("--teacher", desk.teacher, "--student", desk.teacher)
    for command in (
        ("calibrate", desk.teacher),
        ("distill", *pair),
        ("compress", desk.teacher, "--target-params", "60%"),
    ):
        assert re.search(message, desk.refuses(*command, *out))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("110%", "110%"),
        ("10B", "target 10B is larger than the model, which has"),
        ("1%", "no shape fits the budgets"),
        ("half", "half"),
    ],
)
def test_a_target_that_cannot_be_met_is_refused(desk: Desk, target: str, message: str) -> None:
    for verb in ("prune", "compress"):
        what = ("--target-params", target, "--data", desk.text, "--out", desk.path / "out")
        assert message in desk.refuses(verb, desk.teacher, *what)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("ffn=48", "ffn=48 is larger than the teacher's ffn=40"),
        ("ffn=0", "ffn"),
        ("fnn=24", "did you mean 'ffn'"),
        ("vocab=100", "vocab"),
        ("heads=3", "heads"),
    ],
)
def test_a_shape_that_cannot_be_cut_is_refused(desk: Desk, shape: str, message: str) -> None:
    what = ("--shape", shape, "--data", desk.text, "--out", desk.path / "out")
    assert message in desk.refuses("prune", desk.teacher, *what)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.learning_rat=1", "unknown key distill.learning_rat; did you mean 'learning_rate'"),
        ("distil.tokens=1", "unknown key distil; did you mean 'distill'"),
        ("distill.tokens=many", "distill.tokens: Input should be a valid integer"),
        ("distill.tokens=0", "distill.tokens: Input should be greater than or equal to 1 (got 0)"),
        ("distill.betas=[0.9, 1.5]", "distill.betas.1: Input should be less than 1 (got 1.5)"),
        ("seed", "write it as section.key=value"),
        ("model.path=x", "model is not a section"),
    ],
)
def test_a_bad_recipe_value_is_named_with_its_path(desk: Desk, override: str, message: str) -> None:
    assert message in desk.refuses("run", desk.recipe(), "--set", override, "--out", desk.path / "out")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("model: m\nprune: {target: 50%}\ndistill: {xyz: 1}", "unknown key distill.xyz; Available: "),
        ("prune: {target: 50%}", "model is missing"),
        ("model: [", "is not YAML"),
        ("- a", "must be a mapping of recipe keys"),
        (None, "there is no recipe file"),
    ],
)
def test_a_bad_recipe_file_is_named(desk: Desk, recipe: str | None, message: str) -> None:
    path = desk.path / "recipe.yaml"
    if recipe is not None:
        path.write_text(recipe)
    line = desk.refuses("run", path, "--out", desk.path / "out")
    assert message in line and str(path) in line


def writers(desk: Desk, out: Path) -> dict[str, tuple[Any, ...]]:
    data = ("--data", desk.text, "--out", out)
    pair = ("--teacher", desk.teacher, "--student", desk.teacher)
    return {
        "calibrate": ("calibrate", desk.teacher, *data),
        "prune": ("prune", desk.teacher, "--shape", "ffn=32", *data),
        "distill": ("distill", *pair, "--tokens", "1K", *data),
        "run": ("run", desk.recipe(), "--out", out),
    }


@pytest.mark.parametrize("verb", ["calibrate", "prune", "distill", "run"])
def test_an_output_that_is_a_file_is_refused(desk: Desk, verb: str) -> None:
    (desk.path / "out").write_text("mine")
    command = writers(desk, desk.path / "out")[verb]
    assert "out" in desk.refuses(*command)
    assert (desk.path / "out").read_text() == "mine"


@pytest.mark.parametrize("verb", ["calibrate", "prune", "distill"])
def test_an_output_that_holds_something_is_refused(desk: Desk, verb: str) -> None:
    (desk.path / "out").mkdir()
    (desk.path / "out" / "mine.txt").write_text("mine")
    assert "exists and is not empty; remove it, or choose another --out" in desk.refuses(
        *writers(desk, desk.path / "out")[verb]
    )


def test_a_run_directory_in_use_is_refused(desk: Desk) -> None:
    command = writers(desk, desk.path / "out")["run"]
    with RunDirectory(desk.path / "out"):
        assert "is in use by another process" in desk.refuses(*command)


def test_vocabularies_that_differ_are_refused(desk: Desk) -> None:
    other = small.teacher(desk.path / "other", vocab_size=336)
    command = (
        "distill",
        "--student",
        other,
        "--out",
        desk.path / "out",
        "--teacher",
        desk.teacher,
        "--data",
        desk.text,
    )
    line = desk.refuses(*command)
    assert "teacher and student vocabularies differ" in line and "336" in line and "320" in line
    assert "only rows of padding differ" in line and "model.resize_token_embeddings(320)" in line


def test_tokenizers_that_differ_are_refused(desk: Desk) -> None:
    other = small.teacher(desk.path / "respelt")
    facts = json.loads((other / "tokenizer.json").read_text())
    vocab = facts["model"]["vocab"]
    one, two = sorted(vocab, key=vocab.get)[40:42]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (other / "tokenizer.json").write_text(json.dumps(facts))
    for command in (("distill", "--student", other, "--out", desk.path / "out"), ("evaluate", other)):
        line = desk.refuses(*command, "--teacher", desk.teacher, "--data", desk.text)
        assert f"{one!r} is token 40 of {desk.teacher} and 41 of {other}; KL compares logits token by token" in line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("distill", "--learning-rate", "-1"), "--learning-rate: Input should be greater than 0 (got -1.0)"),
        (("calibrate", "--block-tokens", 4), "--block-tokens: Input should be greater than or equal to 8 (got 4)"),
        (("calibrate", "--block-tokens", 65), "data.block_tokens=65 is longer than the model's context of 64 tokens"),
        (("generate", "--prompt", ""), "the prompt is empty and the tokenizer adds no start token"),
        (("generate", "--prompt", "a", "--temperature", "-1"), "temperature -1.0 is negative; 0 is greedy"),
    ],
)
def test_an_option_out_of_range_is_named(desk: Desk, command: tuple[Any, ...], message: str) -> None:
    verb, *options = command
    where = ("--data", desk.text, "--out", desk.path / "out")
    model = {
        "distill": ("--teacher", desk.teacher, "--student", desk.teacher, *where),
        "calibrate": (desk.teacher, *where),
        "generate": (desk.teacher,),
    }[verb]
    assert message in desk.refuses(verb, *model, *options)


def test_a_warning_is_shown_even_if_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    Console(argparse.Namespace(json=True, quiet=True)).warn("the newest state is damaged")
    assert tuple(capsys.readouterr()) == ("", "warning: the newest state is damaged\n")


def test_an_unfinished_run_has_no_report(desk: Desk) -> None:
    assert "is not a run directory: it has no recipe.yaml" in desk.refuses("report", desk.path)
    desk.recipe()
    assert "is not finished: it has no evaluations/record.json; the same command" in desk.refuses("card", desk.path)


@pytest.fixture(params=["16k", "64k"])
def full_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system smaller than the tokens of the text, or than the model."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = f"size={request.param}"
    mounted = os.geteuid() == 0 and (
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], capture_output=True).returncode == 0
    )
    if not mounted:
        pytest.skip("cannot mount a small file system here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("verb", ["calibrate", "prune", "distill", "run"])
def test_a_full_disk_is_one_line_and_only_stages_that_are_done_are_left(
    desk: Desk, full_disk: Path, verb: str, request: pytest.FixtureRequest
) -> None:
    small_disk = "16k" in request.node.name
    if verb == "calibrate" and not small_disk:
        pytest.skip("these statistics are smaller")
    line = desk.refuses(*writers(desk, full_disk / "out")[verb], keeps="nothing" if small_disk else "disk")
    assert f"cannot write {full_disk}/out" in line and "No space left on device" in line
    for stage in ("data", "statistics", "scores", "plan", "pruned", "student"):
        assert all((made / "record.json").is_file() for made in full_disk.rglob(stage))


def test_benchmarks_of_a_model_and_its_teacher(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_CACHE", str(desk.path / "cache"))
    rows = bench.write(desk.path / "bench", ("piqa", "stories", "humaneval"))
    student = desk.path / "student"
    desk.json("prune", desk.teacher, "--layers", "drop=1", "--out", student)
    command = ("evaluate", student, "--teacher", desk.teacher, "--tasks", "piqa,stories", "--tasks-dir", rows)
    facts = desk.json(*command)
    assert facts.keys() == {"tasks", "teacher_tasks", "kept"} and facts["tasks"].keys() == {"piqa", "stories"}
    one, whole = facts["tasks"]["piqa"], facts["teacher_tasks"]["piqa"]
    assert (one["metric"], one["n"], one["shots"], one["version"]) == ("acc_norm", 6, 0, "1.0")
    assert 0 <= one["value"] <= 1 and one["stderr"] is not None
    assert facts["kept"]["piqa"] == (one["value"] / whole["value"] if whole["value"] else None)
    assert desk.json(*command) == desk.json(*command, "--no-cache", "--streamed") == facts
    text = desk.run(*command)[1]
    assert "stories" in text and f"{100 * one['value']:.1f} ± {100 * one['stderr']:.1f}" in text
    both = desk.json(*command, "--limit", 2, "--data", desk.text, "--block-tokens", 16)
    assert both["tasks"]["piqa"]["n"] == 2 and both["kl_to_teacher"] > 0

    def refused(*options: Any, model: Path = student) -> str:
        return desk.refuses("evaluate", model, *options, keeps="cache")

    assert "did you mean 'piqa'" in refused("--tasks", "piqqa")
    assert "allow it with --allow-code" in refused("--tasks-dir", rows)
    assert "has no chat template" in refused("--tasks", "piqa", "--tasks-dir", rows, "--chat")
    assert "--limit has an effect only with benchmarks; leave it out, or give --tasks, --suite or" in refused(
        "--limit", 3
    )
    assert "model.gguf: benchmarks are measured on checkpoints" in refused("--tasks", "piqa", model=Path("model.gguf"))
