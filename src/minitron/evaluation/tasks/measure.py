"""Benchmarks of models on disk.

Tasks and rows are checked first, kept results are not measured again, and all models get the same items and prompts.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitron.core.config import expanded
from minitron.core.device import free_bytes, pick_device
from minitron.core.errors import RunError, TaskError
from minitron.core.files import digest_files, read_digests, readable_os_errors, write_json
from minitron.core.progress import SILENT, Listener
from minitron.evaluation.layouts import TaskResult
from minitron.evaluation.tasks import definitions, harness
from minitron.evaluation.tasks.rows import LocalTask, find_folders, read_task, task_of
from minitron.evaluation.tasks.sandbox import require_sandbox
from minitron.evaluation.tasks.suite import SUITES, BenchmarkTask, chosen
from minitron.model.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from minitron.model.weight_files import model_files

CACHE = "MINITRON_CACHE"  # environment variable: a directory for results, instead of the user's cache directory
KEY_FORMAT = 2  # another number makes all results be measured again
# A model is streamed if its weights take more than this share of free memory; activations need some too.
SHARE_FOR_WEIGHTS = 0.8

Key = Mapping[str, object]  # what a kept result depends on
TaskResults = dict[str, dict[str, TaskResult]]  # model -> task -> its result


@dataclass(frozen=True)
class TaskOptions:
    """How benchmarks are measured.

    limit: items of each task (of each subject of MMLU); None for all.
    shots: examples in the prompt, instead of each task's number.
    allow_code: whether code that the model writes may run, in the sandbox.
    chat: whether prompts go through the model's chat template.
    streamed: whether one layer is in memory at a time; None where the model does not fit.
    batch: rows per forward call; None for as many as memory allows.
    """

    limit: int | None = None
    shots: int | None = None
    allow_code: bool = False
    chat: bool = False
    streamed: bool | None = None
    batch: int | None = None


@dataclass(frozen=True)
class TaskPlan:
    """Benchmarks that can be measured, with their local rows."""

    benchmarks: tuple[BenchmarkTask, ...]
    local: Mapping[str, LocalTask]
    options: TaskOptions

    @property
    def digest(self) -> str:
        """The digest of the local rows."""
        parts = [f"{name} {task.digest}\n" for name, task in sorted(self.local.items())]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def plan_tasks(
    tasks: Sequence[str],
    directory: Path | None = None,
    options: TaskOptions | None = None,
    *,
    listener: Listener = SILENT,
) -> TaskPlan:
    """Plan what `measure_tasks` does; faults of tasks and files are found here, before a model is loaded.

    Args:
        tasks: names of tasks and suites; none for all that the directory holds.
        directory: local rows, one folder per task. Tasks of a suite without a folder are left out.

    Raises: TaskError.
    """
    harness.require_harness()
    options = options or TaskOptions()
    folders = find_folders(directory) if directory is not None else {}
    tasks = [task_of(name) if task_of(name) in folders else name for name in tasks]
    if directory is not None:
        members = {name for suite in tasks if suite in SUITES for name in SUITES[suite]}
        if left_out := sorted(members - folders.keys()):
            listener.warn(f"left out, for {directory} has no folder for them: {', '.join(left_out)}")
        tasks = [name for task in tasks for name in SUITES.get(task, [task]) if name not in left_out] or [*folders]
    benchmarks = chosen(tasks, options.shots)
    if not benchmarks:
        raise TaskError("no task is named: give --tasks, --suite or --tasks-dir")
    local = {one.task: read_task(folders[one.task]) for one in benchmarks if one.task in folders}
    for note in filter(None, (one.left_out for one in local.values())):
        listener.warn(note)
    for one in benchmarks:
        definitions.require_known(one, local.get(one.task), allow_code=options.allow_code)
    if any(_runs_code(one, local.get(one.task)) for one in benchmarks):
        require_sandbox()
    return TaskPlan(tuple(benchmarks), local, options)


def _runs_code(benchmark: BenchmarkTask, local: LocalTask | None) -> bool:
    return (local is None or local.kind is None) and definitions.runs_code(benchmark.task)


def measure_tasks(
    models: Mapping[str, Path], plan: TaskPlan, *, cache: Path | None = None, listener: Listener = SILENT
) -> TaskResults:
    """Measure each model in each task, and return the results in the order of both.

    Args:
        models: name -> directory of the checkpoint.
        cache: directory of results; None to measure all, and keep nothing.

    Raises: TaskError, CheckpointError.
    """
    opened = {name: open_checkpoint(path) for name, path in models.items()}
    cache = None if cache is None else _usable(cache, listener)
    if plan.options.chat:
        for name, checkpoint in opened.items():
            _require_chat_template(name, checkpoint)
    ready: dict[str, harness.Task] = {}
    results: TaskResults = {}
    for name, checkpoint in opened.items():
        keys = {one.task: _key(one, plan, checkpoint, cache) for one in plan.benchmarks} if cache else {}
        known = {task: _known(cache, key) for task, key in keys.items()} if cache else {}
        found = {task: result for task, result in known.items() if result is not None}
        missing = [one for one in plan.benchmarks if one.task not in found]
        for one in missing:
            ready.setdefault(one.task, harness.load_task(one, plan.local.get(one.task)))
        if missing:
            model = _open_model(name, checkpoint, [ready[one.task] for one in missing], plan.options, listener)
            for one in missing:
                model.note = f"{one.task}, {name}"
                found[one.task], _ = harness.run_task(
                    ready[one.task], model, limit=plan.options.limit, chat=plan.options.chat
                )
                if cache and not _keep(cache, keys[one.task], found[one.task], listener):
                    cache = None
            del model  # before the next one is loaded
        results[name] = {one.task: found[one.task] for one in plan.benchmarks}
    return results


def _require_chat_template(name: str, checkpoint: Checkpoint) -> None:
    if not load_tokenizer(checkpoint.path).chat_template:
        raise TaskError(
            f"{name} in {checkpoint.path} has no chat template: its prompts cannot be a chat; leave --chat out, or put "
            "a chat_template.jinja beside its tokenizer"
        )


def _open_model(
    name: str, checkpoint: Checkpoint, tasks: Sequence[harness.Task], options: TaskOptions, listener: Listener
) -> Any:
    from minitron.evaluation.tasks.in_memory import InMemory
    from minitron.evaluation.tasks.models import Streamed

    device, tokenizer = pick_device(), load_tokenizer(checkpoint.path)
    streamed = options.streamed
    if streamed is None:
        room = SHARE_FOR_WEIGHTS * free_bytes(device)
        streamed = checkpoint.weight_bytes > room
        if streamed:
            listener.warn(
                f"{name}: {checkpoint.weight_bytes / 1e9:.1f} GB of weights do not fit into {room / 1e9:.1f} GB of "
                "free memory; they are streamed, one layer at a time"
            )
    with harness.quietly():
        if not streamed:
            model = load_model(checkpoint.path).to(device)
            return InMemory(model, tokenizer, batch=options.batch, listener=listener)
        if writing := [task.benchmark.task for task in tasks if task.generates]:
            raise TaskError(
                f"{', '.join(writing)}: the answer is generated text, which a streamed model cannot give, for each "
                "token would read all of it: leave these tasks out, or measure them where the model fits into memory"
            )
        return Streamed(checkpoint, tokenizer, batch=options.batch, listener=listener)


def cache_directory() -> Path:
    """The directory in which the command line keeps results.

    Raises: MinitronError for a MINITRON_CACHE that is no path.
    """
    if named := os.environ.get(CACHE):
        return Path(expanded(named)) / "tasks"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minitron" / "tasks"


def _usable(cache: Path, listener: Listener) -> Path | None:
    """The cache if it can be written, else None after a warning."""
    if cache.parts[0].startswith("~"):
        _without(listener, "the home directory is not known")
        return None
    try:
        with readable_os_errors(cache):
            cache.mkdir(parents=True, exist_ok=True)
            write_json(cache / ".probe", None)
            (cache / ".probe").unlink()
    except OSError as error:
        _without(listener, f"cannot write {cache}: {error.strerror}")
        return None
    except RunError as error:
        _without(listener, str(error).split(";")[0])
        return None
    return cache


def _without(listener: Listener, reason: str) -> None:
    listener.warn(f"results are not kept: {reason}; set {CACHE} to a directory that can be written, or give --no-cache")


def _key(benchmark: BenchmarkTask, plan: TaskPlan, checkpoint: Checkpoint, cache: Path) -> Key:
    """Everything that a result depends on; the harness's version stands for the versions of a task and its dataset."""
    local = plan.local.get(benchmark.task)
    return {
        "format": KEY_FORMAT,
        "harness": definitions.version(),
        "model": _model_digest(checkpoint, cache),
        "dtype": str(checkpoint.written_dtype),
        "benchmark": asdict(benchmark),
        "rows": local.digest if local else "hub",
        "limit": plan.options.limit,
        "chat": plan.options.chat,
    }


def _model_digest(checkpoint: Checkpoint, cache: Path) -> str:
    """Digest the model's files, each of which is read only if it has changed since the last time."""
    file = cache / "digests.json"
    known = read_digests(file)
    before = dict(known)
    digest = digest_files([path.resolve() for path in model_files(checkpoint.path)], known)
    if known != before:
        with suppress(OSError, RunError):  # then it is digested again
            write_json(file, known)
    return digest


def _file_of(cache: Path, key: Key) -> Path:
    return cache / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.json"


def _seal(result: Any) -> str:
    """Digest a result, so that a number changed by a bad disk or an editor is not taken for it."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _known(cache: Path, key: Key) -> TaskResult | None:
    """The kept result; None where the file is missing, damaged or of another key, and will be replaced."""
    try:
        raw = json.loads(_file_of(cache, key).read_text(encoding="utf-8"))
        if raw["key"] != key or raw["sha256"] != _seal(raw["result"]):
            return None
        return TaskResult(**raw["result"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _keep(cache: Path, key: Key, result: TaskResult, listener: Listener) -> bool:
    """Keep a result, and return whether that worked: a full disk need not end the measuring."""
    row = result.to_dict()
    try:
        write_json(_file_of(cache, key), {"key": dict(key), "result": row, "sha256": _seal(row)})
    except (OSError, RunError) as error:
        _without(listener, str(error).split(";")[0])
        return False
    return True
