"""What bad_input.py damages: files of every kind that minitron reads, each with a command that reads it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROMPT = "the rain in"
SHAPE = ("--shape", "ffn=16", "--repair", "none")
TEXT = ("--data", "text.jsonl", "--block-tokens", "16")
TRAINING = ("--tokens", "512", "--set", "distill.batch_blocks=4", "--set", "distill.evaluate_blocks=2")
QUICK_SEARCH = ("--bytes-per-second", "10GB", "--flops-per-second", "1e11")


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
        "plan.json, some units",
        "units.json",
        "json",
        listed,
        ("plan", "--data"),
        "student",
        needs=("teacher", "text.jsonl"),
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
