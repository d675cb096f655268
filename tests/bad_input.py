"""Bad input and what a command may do with it: files of every kind that minitron reads, damaged one at a time.

The law: the exit code is 0, 1 or 2; a refusal is one line that names the file, the key or the tensor that was damaged;
nothing ends in a traceback, a signal or not at all; what the command makes is there whole or not at all; and nothing
else changes. A command that succeeds prints finite numbers. Where the damage cannot matter, or digests guard against
it, success means the result of the undamaged file.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import bench
import mutations
import pyarrow
import pyarrow.parquet
import small
import tiny
import yaml
from forks import CRASHED, Ended, Forks
from hypothesis import strategies as st
from mutations import Mutation
from safetensors import SafetensorError
from safetensors.torch import load_file

LIMIT_SECONDS = 60
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
PROMPT = "the rain in"
SHAPE = ("--shape", "ffn=16", "--repair", "none")
TEXT = ("--data", "text.jsonl", "--block-tokens", "16")
TRAINING = ("--tokens", "512", "--set", "distill.batch_blocks=4", "--set", "distill.evaluate_blocks=2")
QUICK_SEARCH = ("--bytes-per-second", "10GB", "--flops-per-second", "1e11")
# Directories of a desk that any command may fill: they are the user's cache.
CACHE = "cache"


@dataclass(frozen=True)
class Target:
    """A file that a command reads, and the command.

    file: the damaged file; None where an argument is. form: of its contents, a key of `mutations.FORMS`.
    command: one that succeeds with the undamaged file. words: name the damaged thing, besides the file's own name and
    the keys in it. out: what the command makes: there whole after success, else not there. kept: what it may write
    besides, after a failure too. needs: what it reads, besides the file. same: success must mean the result of the
    undamaged file.
    """

    name: str
    file: str | None
    form: str
    command: tuple[str, ...]
    words: tuple[str, ...] = ()
    out: str | None = None
    kept: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    same: bool = False


def _targets() -> Iterator[Target]:
    layers = ("--layers", "keep=0,2", "--repair", "none", "--out", "student")
    readers: dict[str, tuple[tuple[str, ...], str | None]] = {
        "inspect": (("inspect", "{model}"), None),
        "prune": (("prune", "{model}", *layers), "student"),
        "evaluate": (("evaluate", "{model}", *TEXT, "--whole", "--blocks", "2"), None),
        "generate": (("generate", "{model}", "--prompt", PROMPT, "--new-tokens", "4"), None),
        "calibrate": (("calibrate", "{model}", *TEXT, "--samples", "4", "--out", "statistics"), "statistics"),
        "quantize": (("quantize", "{model}", "--types", "F16", "--no-verify", "--out", "gguf"), "gguf"),
    }

    def model(verb: str, file: str, form: str, *words: str, directory: str = "teacher") -> Target:
        command, out = readers[verb]
        command = tuple(word.format(model=directory) for word in command)
        return Target(
            f"{file}: {verb}", f"{directory}/{file}", form, command, words, out, needs=(directory, "text.jsonl")
        )

    for verb in readers:
        yield model(verb, "config.json", "json", "model_type")
    for verb in ("inspect", "prune", "evaluate"):
        yield model(verb, "model.safetensors", "safetensors")
        yield model(verb, "model.safetensors.index.json", "json", directory="sharded")
    yield model("calibrate", "model-00002-of-00004.safetensors", "safetensors", directory="sharded")
    for verb in ("calibrate", "generate", "quantize"):
        yield model(verb, "tokenizer.json", "json", "tokenizer")
        yield model(verb, "tokenizer_config.json", "json", "tokenizer")
    yield model("generate", "special_tokens_map.json", "json", "tokenizer")
    yield model("generate", "generation_config.json", "json")
    yield model("prune", "generation_config.json", "json")

    tasks = ("evaluate", "teacher", "--tasks-dir", "tasks", "--shots", "0", "--limit", "3", "--no-cache")
    for task in ("winogrande", "hellaswag", "arc_easy"):
        yield Target(
            f"rows of {task}",
            f"tasks/{task}/dev.jsonl",
            "lines",
            tasks,
            ("tasks", task),
            needs=("teacher", f"tasks/{task}"),
        )
    chat = (*tasks, "--chat")
    yield Target(
        "chat_template.jinja",
        "teacher/chat_template.jinja",
        "text",
        chat,
        ("chat", "template"),
        needs=("teacher", "tasks/winogrande"),
    )

    run = ("run", "recipe.yaml", "--out", "run")
    yield Target(
        "recipe: run --dry-run",
        "recipe.yaml",
        "yaml",
        (*run, "--dry-run"),
        ("RECIPE",),
        needs=("teacher", "text.jsonl"),
    )
    yield Target("recipe: run", "recipe.yaml", "yaml", run, ("RECIPE",), kept=("run",), needs=("teacher", "text.jsonl"))
    yield Target(
        "--set: run --dry-run",
        None,
        "set",
        (*run, "--dry-run"),
        ("--set",),
        needs=("recipe.yaml", "teacher", "text.jsonl"),
    )
    distill = ("distill", "--teacher", "teacher", "--student", "pruned", *TEXT, *TRAINING, "--out", "student")
    needs = ("teacher", "pruned", "text.jsonl")
    yield Target("--set: distill", None, "set distill", distill, ("--set",), "student", ("student.work",), needs)

    planned = ("prune", "teacher", "--plan", "plan.json", "--repair", "none", "--out", "student")
    yield Target("plan.json, whole", "plan.json", "json", planned, ("plan",), "student", needs=("teacher",))
    listed = (
        "prune",
        "teacher",
        "--plan",
        "units.json",
        "--repair",
        "none",
        *TEXT[:2],
        "--samples",
        "4",
        "--out",
        "student",
    )
    yield Target(
        "plan.json, some units", "units.json", "json", listed, ("plan",), "student", needs=("teacher", "text.jsonl")
    )
    asked = ("--layer-criterion", "task", "--layer-task", "questions.jsonl", "--samples", "4")
    task = ("prune", "teacher", "--shape", "layers=2", "--repair", "none", *asked, *TEXT[:2], "--out", "student")
    yield Target(
        "questions.jsonl", "questions.jsonl", "lines", task, ("layer_task",), "student", needs=("teacher", "text.jsonl")
    )

    for file, form in (("statistics.json", "json"), ("statistics.safetensors", "safetensors")):
        with_statistics = ("--statistics", "statistics")
        pruned = ("prune", "teacher", *SHAPE, *with_statistics, "--out", "student")
        needs = ("teacher", "statistics")
        yield Target(f"{file}: prune", f"statistics/{file}", form, pruned, ("statistics",), "student", needs=needs)
        search = ("search", "teacher", "--target-params", "60%", "--dims", "ffn=16,24", "layers=2,3", *QUICK_SEARCH)
        yield Target(
            f"{file}: search", f"statistics/{file}", form, (*search, *with_statistics), ("statistics",), needs=needs
        )

    whole = ("evaluate", "teacher", "--data", "text.txt", "--block-tokens", "16", "--whole", "--blocks", "2")
    yield Target("text: text.txt", "text.txt", "text", whole, ("text",), needs=("teacher",))
    for file, form in (("text.jsonl", "lines"), ("text.parquet", "binary")):
        read = ("calibrate", "teacher", "--data", file, "--block-tokens", "16", "--samples", "4", "--out", "statistics")
        yield Target(f"text: {file}", file, form, read, ("text",), "statistics", needs=("teacher",))

    yield Target("GGUF: inspect", "model.gguf", "binary", ("inspect", "model.gguf"))
    yield Target(
        "GGUF: generate", "model.gguf", "binary", ("generate", "model.gguf", "--prompt", PROMPT, "--new-tokens", "2")
    )
    for file in ("imatrix.gguf", "imatrix.dat"):
        quantize = ("quantize", "teacher", "--types", "IQ4_NL", "--no-verify", "--imatrix", file, "--out", "gguf")
        yield Target(f"imatrix: {file}", file, "binary", quantize, ("importance",), "gguf", needs=("teacher",))

    state = "student.work/distill"
    files = {
        "student.work/.digests.json": "json",
        "student.work/data/corpus.json": "json",
        "student.work/data/record.json": "json",
        "student.work/data/train.bin": "numbers",
        "student.work/data/heldout.bin": "numbers",
        f"{state}/inputs.json": "json",
        f"{state}/metrics.jsonl": "lines",
        f"{state}/STATE/state.json": "json",
        f"{state}/STATE/student.safetensors": "safetensors",
        f"{state}/STATE/optimizer.safetensors": "safetensors",
        f"{state}/STATE/random.safetensors": "safetensors",
    }
    for file, form in files.items():
        name = f"training: {Path(file).name}"
        words = (Path(file).parent.name,)
        needs = ("teacher", "pruned", "text.jsonl", "student.work")
        yield Target(name, file, form, distill, words, "student", ("student.work",), needs, same=True)
    recorded = (*distill, *RECORDED)
    for file, form in (("lessons.json", "json"), ("shard-00000.safetensors", "safetensors"), ("record.json", "json")):
        yield Target(
            f"lessons: {file}", f"recorded/student.work/lessons/{file}", form, recorded, ("lessons",), "student",
            ("student.work",), ("teacher", "pruned", "text.jsonl", "recorded/student.work"), same=True,
        )  # fmt: skip

    files = {
        "recipe.yaml": "yaml",
        ".digests.json": "json",
        "data/corpus.json": "json",
        "data/record.json": "json",
        "statistics/statistics.json": "json",
        "statistics/record.json": "json",
        "scores/scores.json": "json",
        "scores/record.json": "json",
        "plan/plan.json": "json",
        "search/candidates.json": "json",
        "search/record.json": "json",
        "pruned/config.json": "json",
        "pruned/record.json": "json",
        "student/record.json": "json",
        "evaluations/record.json": "json",
    }
    for file, form in files.items():
        yield Target(
            f"run again: {file}",
            f"run/{file}",
            form,
            run,
            (Path(file).parent.name or "recipe",),
            kept=("run",),
            needs=("recipe.yaml", "teacher", "text.jsonl", "run"),
        )
    shown = {
        "recipe.yaml": "yaml",
        "evaluations/student.json": "json",
        "evaluations/teacher.json": "json",
        "evaluations/generations.json": "json",
        "evaluations/speed.json": "json",
        "evaluations/record.json": "json",
        "distill/metrics.jsonl": "lines",
        "scores/scores.json": "json",
        "plan/plan.json": "json",
        "pruned/plan.json": "json",
        "pruned/record.json": "json",
        "student/record.json": "json",
        "statistics/record.json": "json",
        "search/candidates.json": "json",
        "gguf/quantization.json": "json",
    }
    for file, form in shown.items():
        for verb, out in (("report", "run/report.html"), ("card", "run/student/README.md")):
            yield Target(f"{verb}: {file}", f"run/{file}", form, (verb, "run"), kept=(out,), needs=("run",))
    for file in ("recipe.yaml", "gguf/quantization.json", "student/config.json", "student/model.safetensors"):
        form = {"yaml": "yaml", "json": "json", "safetensors": "safetensors"}[file.rpartition(".")[2]]
        yield Target(f"push: {file}", f"run/{file}", form, ("push", "run", "me/small", "--dry-run"), needs=("run",))
    for file in ("evaluations/student.json", "recipe.yaml"):
        compare = ("report", "run", "other", "--out", "comparison.html")
        form = "yaml" if file.endswith("yaml") else "json"
        yield Target(
            f"report of two: {file}",
            f"other/{file}",
            form,
            compare,
            ("other",),
            "comparison.html",
            needs=("run", "other"),
        )


RECORDED = ("--set", "distill.teacher=recorded", "--set", "distill.top_k=8", "--set", "distill.intermediate=off")
TARGETS = {target.name: target for target in _targets()}
SET_KEYS = (
    *("model", "seed", "data.source", "data.block_tokens", "data.heldout_fraction", "data.max_tokens", "prune.target"),
    *("prune.shape", "prune.shape.ffn", "prune.drop_layers", "calibrate.samples", "search.level", "search.dims"),
    *("repair.steps", "distill", "gguf.types", "evaluate.prompts", "evaluate.tasks", "x", "", "a.b.c", "data.source.x"),
)
SET_DISTILL_KEYS = (
    *("tokens", "loss", "batch_blocks", "learning_rate", "temperature", "top_k", "optimizer", "warmup_fraction"),
    *("evaluate_blocks", "intermediate", "teacher", "correction", "log_to", "weights", "weight_decay", "x", ""),
)


@dataclass(frozen=True)
class Outcome:
    """What a command did with an input: how it ended, and how it broke the law, if it did."""

    mutation: Mutation
    ended: Ended
    same: bool  # it succeeded with the result of the undamaged file
    violations: tuple[str, ...]


class Room:
    """Good inputs of every kind in one directory, from which each command gets a desk of its own."""

    def __init__(self, base: Path):
        """
        Args:
            base: an empty directory.
        """
        self.base, self.desk, self.good = base, base / "desk", base / "good"
        self.forks = Forks(base)
        self.results: dict[str, dict[str, str]] = {}
        self.desk.mkdir()
        for name in PLACES.values():
            (self.desk / name).mkdir(exist_ok=True)
        _make_inputs(self)
        self.desk.rename(self.good)

    def close(self) -> None:
        self.forks.close()

    def run(self, *command: str, killed_after_saves: int = 0) -> Ended:
        places = {name: str(self.desk / directory) for name, directory in PLACES.items()}
        return self.forks.run(
            *command, "--json", "--quiet",
            cwd=self.desk, places=places, limit_seconds=LIMIT_SECONDS, killed_after_saves=killed_after_saves,
        )  # fmt: skip

    def made(self, *command: str, killed_after_saves: int = 0) -> None:
        ended = self.run(*command, killed_after_saves=killed_after_saves)
        assert ended.code == (-9 if killed_after_saves else 0), (command, ended)

    def inputs(self, target: Target) -> st.SearchStrategy[Mutation]:
        """Every way to damage a target's file or argument."""
        if target.file is None:
            return _settings(SET_KEYS if target.form == "set" else SET_DISTILL_KEYS, target.form)
        return mutations.mutations(target.form, (self.good / self.actual(target.file)).read_bytes())

    def outcome(self, target: Target, mutation: Mutation) -> Outcome:
        """Run a target's command on a damaged input, and hold the law against what it does."""
        if target.name not in self.results:
            self.results[target.name] = self._undamaged(target)
        self._lay_out(target)
        extra = self._damage(target, mutation)
        before = _snapshot(self.desk)
        ended = self.run(*target.command, *extra)
        after = _snapshot(self.desk)
        same = ended.code == 0 and self._result(target, ended) == self.results[target.name]
        broken = [*_of_the_end(target, mutation, ended, self), *_of_the_files(target, ended, before, after)]
        if ended.code == 0 and not broken:
            broken = [*_of_success(target, ended, self.desk)]
            if target.same and not same:
                broken.append("succeeds with another result than that of the undamaged file")
        return Outcome(mutation, ended, same, tuple(broken))

    def actual(self, file: str) -> str:
        """A file's name, of a training's state that of the newest."""
        if "STATE" not in file:
            return file
        newest = sorted((self.good / file.partition("STATE")[0]).glob("state-*"))[-1]
        return file.replace("STATE", newest.name)

    def _undamaged(self, target: Target) -> dict[str, str]:
        self._lay_out(target)
        ended = self.run(*target.command)
        assert ended.code == 0 and not _said(ended), (target.name, ended)
        assert not [*_of_success(target, ended, self.desk)], (target.name, ended)
        return self._result(target, ended)

    def _lay_out(self, target: Target) -> None:
        shutil.rmtree(self.desk, ignore_errors=True)
        self.desk.mkdir()
        for name in PLACES.values():
            (self.desk / name).mkdir(exist_ok=True)
        for name in dict.fromkeys((*target.needs, *([target.file] if target.file else ()))):
            source, place = self.good / self.actual(name), self.desk / self.actual(name).removeprefix("recorded/")
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)
            elif not place.exists():
                shutil.copy2(source, place)

    def _damage(self, target: Target, mutation: Mutation) -> tuple[str, ...]:
        """Put the damaged file in place; returns the arguments to add."""
        if target.file is None:
            return ("--set", mutation.data.decode(errors="surrogatepass"))
        file = self.desk / self.actual(target.file).removeprefix("recorded/")
        file.unlink()
        match mutation.kind:
            case "file":
                file.write_bytes(mutation.data)
            case "directory":
                file.mkdir()
            case "dangling link":
                file.symlink_to("nowhere")
            case "link to itself":
                file.symlink_to(file.name)
        return ()

    def _result(self, target: Target, ended: Ended) -> dict[str, str]:
        """What a command made, as digests, or where it makes nothing what it printed."""
        places = [target.out] if target.out else list(target.kept)
        files = [file for place in places for file in [self.desk / place, *(self.desk / place).rglob("*")]]
        wanted = [
            file
            for file in files
            if file.suffix in (".safetensors", ".gguf", ".html") or file.name in ("plan.json", "README.md")
        ]
        found = {
            str(file.relative_to(self.desk)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in wanted
            if file.is_file()
        }
        return found or {"stdout": ended.stdout}


PLACES = {"HOME": "home", "TMPDIR": "tmp", "MINITRON_CACHE": CACHE, "XDG_CACHE_HOME": CACHE, "MPLCONFIGDIR": CACHE}


def _make_inputs(room: Room) -> None:
    desk = room.desk
    tiny.checkpoint("llama", desk / "teacher", **SIZES)
    tiny.tokenizer(desk / "teacher")
    tiny.checkpoint("llama", desk / "sharded", **SIZES, shard="40KB")
    tiny.tokenizer(desk / "sharded")
    special = {
        "eos_token": {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    }
    (desk / "teacher" / "special_tokens_map.json").write_text(json.dumps(special))
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    (desk / "teacher" / "chat_template.jinja").write_text(template)
    small.text(desk / "text.jsonl", documents=20)
    texts = [json.loads(line)["text"] for line in (desk / "text.jsonl").read_text().splitlines()]
    (desk / "text.txt").write_text("\n\n".join(texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), desk / "text.parquet")
    bench.write(desk / "tasks", ("winogrande", "hellaswag", "arc_easy"), 6)
    rows = [
        {"ctx": row["ctx_a"], **{key: row[key] for key in ("endings", "label")}} for row in bench.rows("hellaswag", 6)
    ]
    bench.dump(desk / "questions.jsonl", rows)
    units = {"layers": [0, 2], "hidden": list(range(0, 32, 2)), "kv_heads": [[0], [1]]}
    (desk / "units.json").write_text(json.dumps(units))
    (desk / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    calibration = ("--samples", "4", "--second-moment", "--out", "statistics")
    room.made("calibrate", "teacher", *TEXT, *calibration)
    room.made("prune", "teacher", *SHAPE, "--statistics", "statistics", "--out", "pruned")
    shutil.copy(desk / "pruned" / "plan.json", desk / "plan.json")
    quantize = (
        "quantize",
        "teacher",
        "--types",
        "Q8_0",
        "--calibration",
        "text.jsonl",
        "--block-tokens",
        "16",
        "--no-verify",
    )
    room.made(*quantize, "--out", "gguf")
    next((desk / "gguf").glob("*Q8_0.gguf")).rename(desk / "model.gguf")
    (desk / "gguf" / "imatrix.gguf").rename(desk / "imatrix.gguf")
    _write_legacy(desk / "imatrix.gguf", desk / "imatrix.dat")
    distill = ("distill", "--teacher", "teacher", "--student", "pruned", *TEXT, *TRAINING, "--out", "student")
    room.made(*distill, *RECORDED, killed_after_saves=2)
    (desk / "recorded").mkdir()
    (desk / "student.work").rename(desk / "recorded" / "student.work")
    room.made(*distill, killed_after_saves=3)
    room.made("run", "recipe.yaml", "--out", "run")
    shutil.copytree(desk / "run", desk / "other")
    for name in (*PLACES.values(), "gguf"):
        shutil.rmtree(desk / name, ignore_errors=True)


RECIPE: dict[str, Any] = {
    "model": "teacher",
    "seed": 1,
    "data": {"source": "text.jsonl", "block_tokens": 16, "heldout_fraction": 0.2},
    "calibrate": {"samples": 4, "second_moment": False},
    "prune": {"target": "60%", "criterion": "activation"},
    "search": {
        "level": "predicted", "dims": {"ffn": "16,24", "layers": "2,3"}, "window": 0.5,
        "bytes_per_second": 1e10, "flops_per_second": 1e11,
    },
    "repair": {"steps": []},
    "distill": {"tokens": 256, "batch_blocks": 4, "loss": {"forward_kl": 1.0}, "learning_rate": 0.001},
    "evaluate": {"blocks": 2, "prompts": [PROMPT], "new_tokens": 2, "speed": True},
    "gguf": {"types": ["Q8_0"], "verify": False},
}  # fmt: skip


def _write_legacy(source: Path, file: Path) -> None:
    from minitron.publish.imatrix import read_importance, write_importance

    write_importance(read_importance(source), file)


@cache
def _settings(keys: tuple[str, ...], form: str) -> st.SearchStrategy[Mutation]:
    """Values of --set."""
    values = [json.dumps(value) for value in mutations.VALUES] + [
        "a: b: c",
        "[",
        "*x",
        "!!python/name:os",
        "{1: 2}",
        "~",
        "&a [*a]",
    ]
    section = "distill." if form.endswith("distill") else ""

    def made(key: str, value: str, equals: str) -> Mutation:
        text = f"{section}{key}{equals}{value}".replace("\x00", "?").replace("\\ud800", "?")
        return Mutation(f"--set {text[:80]!r}", text.encode(), tuple(key.split(".")))

    return st.builds(
        made, st.sampled_from(keys), st.sampled_from(values), st.sampled_from(["=", "=", "=", "", "==", " = "])
    )


def _of_the_end(target: Target, mutation: Mutation, ended: Ended, room: Room) -> Iterator[str]:
    if ended.timed_out:
        yield f"does not end in {LIMIT_SECONDS} s"
    elif ended.code < 0:
        yield f"is ended by signal {-ended.code}"
    elif ended.code == CRASHED or "Traceback (most" in ended.stderr:
        yield f"a traceback: {_last_line(ended.stderr)}"
    elif ended.code not in (0, 1, 2):
        yield f"exit code {ended.code}"
    else:
        said = _said(ended)
        if ended.code == 0 and said:
            yield f"succeeds and says more than warnings: {said[0][:200]}"
        elif ended.code == 1 and (len(said) != 1 or not said[0].startswith("error: ")):
            yield f"is refused in {len(said)} lines: {' / '.join(said)[:300]}"
        elif ended.code == 1 and not _is_named(target, mutation, said[0], room):
            yield f"the message does not name what is wrong: {said[0][:300]}"
        if ended.code == 1 and ended.stdout and target.command[0] != "inspect":
            yield f"is refused and prints a result: {ended.stdout[:100]}"


def _is_named(target: Target, mutation: Mutation, said: str, room: Room) -> bool:
    file = (Path(room.actual(target.file)).name,) if target.file else ()
    keys = [key.strip() for key in mutation.keys]
    return any(name.lower() in said.lower() for name in (*file, *target.words, *keys) if len(name) > 1)


def _of_the_files(target: Target, ended: Ended, before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    made = [target.out] if target.out else []
    free = (CACHE, *target.kept, *made)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if stray := [name for name in changed if not any(name == place or name.startswith(f"{place}/") for place in free)]:
        yield f"changes {', '.join(stray[:3])}"
    if target.out and ended.code != 0 and target.out in after:
        yield f"fails and leaves {target.out}"
    if target.out and ended.code == 0 and target.out not in after:
        yield f"succeeds without {target.out}"
    # What a signal left is another law's: the next start clears it.
    if ended.code >= 0 and (left := [name for name in after if ".partial" in name and name not in before]):
        yield f"leaves {left[0]}"


def _of_success(target: Target, ended: Ended, desk: Path) -> Iterator[str]:
    try:
        printed = json.loads(ended.stdout)
    except ValueError:
        yield f"prints no JSON: {ended.stdout[:100]}"
        return
    if odd := [place for place, number in _numbers(printed) if not math.isfinite(number)]:
        yield f"prints a number that is not finite: {odd[0]}"
    if target.out and (desk / target.out).is_dir():
        for file in (desk / target.out).rglob("*.safetensors"):
            try:
                load_file(file)
            except SafetensorError as error:
                yield f"makes {file.name}, which cannot be read: {error}"
                return
        if (desk / target.out / "config.json").is_file():
            try:
                tiny.logits(tiny.model(desk / target.out), tiny.tokens(1, 4))
            except Exception as error:
                yield f"makes a checkpoint that transformers does not run: {type(error).__name__}: {str(error)[:200]}"


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(inner, f"{place}.{key}")
    elif isinstance(value, float):
        yield place, value


def _said(ended: Ended) -> list[str]:
    """The lines on stderr but for warnings; of a wrong usage, argparse's own last line."""
    lines = [line for line in ended.stderr.splitlines() if line.strip() and not line.startswith("warning: ")]
    return lines[-1:] if ended.code == 2 else lines


def _last_line(text: str) -> str:
    """A traceback's error, and the last place in the project."""
    lines = text.strip().splitlines() or [""]
    places = re.findall(r'src/minitron/(\S+)", line (\d+), in (\S+)', text)
    where = f" at {places[-1][0]} in {places[-1][2]}" if places else ""
    return lines[-1][:200] + where


def _snapshot(directory: Path) -> dict[str, tuple[int, int, int]]:
    """File or directory -> kind, size and time of its last change; of directories the kind, for files come and go."""
    found: dict[str, tuple[int, int, int]] = {}
    for here, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = Path(here, name)
            stat = path.lstat()
            is_directory = path.is_dir() and not path.is_symlink()
            found[str(path.relative_to(directory))] = (
                stat.st_mode,
                *((0, 0) if is_directory else (stat.st_size, stat.st_mtime_ns)),
            )
    return found


def kind_of(violation: str) -> str:
    """Violations of one kind, without what differs from input to input."""
    return re.sub(r"\d+|'[^']*'|\"[^\"]*\"|/\S+", "…", violation)[:120]


def with_command(target: Target, *words: str) -> Target:
    return replace(target, command=(*target.command, *words))
