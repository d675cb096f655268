"""The whole pipeline on one screen, and the run directory that it fills: stages, records, resume.

A stage writes into a temporary directory that is renamed when it is complete; its record.json says what went in. A
stage whose record is there and whose inputs are unchanged is done. Inputs that changed are an error that says which.
"""

import fcntl
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from minitron import data
from minitron.config import Section
from minitron.device import compute_dtype, pick_device
from minitron.distill import train
from minitron.errors import RunError
from minitron.evaluate.generate import generate
from minitron.evaluate.quality import evaluate
from minitron.evaluate.speed import measure_speed
from minitron.files import atomic_directory, digest_file, digest_files, readable_os_errors, write_json
from minitron.model.architecture import Shape, kv_cache_bytes
from minitron.model.checkpoint import (
    Checkpoint,
    carried_files,
    load_model,
    load_tokenizer,
    model_files,
    open_checkpoint,
    resolve_model,
)
from minitron.prune.calibrate import Statistics, calibrate
from minitron.prune.cut import cut
from minitron.prune.importance import CRITERIA, Scores
from minitron.prune.plan import Plan, choose, target_shape
from minitron.publish.card import write_card
from minitron.publish.records import RunRecords, read_run
from minitron.publish.report import write_report
from minitron.recipe import Recipe, dump_recipe

LARGEST_DEFAULT_BLOCK = 2048


class Listener(Protocol):
    """Hears how a run goes; the command line draws it."""

    def stage(self, name: str, state: str) -> None: ...

    def progress(self, done: int, total: int, note: str = "") -> None: ...


class Silent:
    def stage(self, name: str, state: str) -> None:
        pass

    def progress(self, done: int, total: int, note: str = "") -> None:
        pass


def run(recipe: Recipe, out: Path, listener: Listener | None = None) -> RunRecords:
    """Teacher -> statistics -> scores -> plan -> pruned -> student -> evaluations -> report, resuming what is done.

    Returns the run's records, which the report and the card are made from.

    Raises: MinitronError; RunError if `out` is in use or holds stages made from other inputs.
    """
    teacher = open_checkpoint(resolve_model(recipe.model, recipe.revision))
    tokenizer = load_tokenizer(teacher.path)
    recipe, shape = resolve(recipe, teacher)
    with _Run(out, recipe, listener or Silent()) as stages:
        corpus = prepare_data(stages, teacher, tokenizer)
        recipe = stages.settle(
            distill=train.resolve(
                recipe.distill, shape, block_tokens=corpus.block_tokens, train_tokens=corpus.train_tokens
            )
        )
        statistics = collect_statistics(stages, teacher, corpus)
        plan = make_plan(stages, teacher, statistics, shape)
        pruned = prune(stages, teacher, plan)
        student = teach(stages, "student", pruned, teacher.path, corpus)
        models = {"teacher": teacher.path, "pruned": pruned, "student": student}
        if recipe.scratch_baseline:
            models["scratch"] = teach(stages, "scratch", pruned, None, corpus)
        measure(stages, models, corpus, tokenizer)
    return publish(out)


def resolve(recipe: Recipe, teacher: Checkpoint) -> tuple[Recipe, Shape]:
    """Fill in every default that the teacher's config decides, and the student's shape."""
    context = teacher.config.get("max_position_embeddings") or LARGEST_DEFAULT_BLOCK
    block_tokens = recipe.data.block_tokens or min(context, LARGEST_DEFAULT_BLOCK)
    if block_tokens > context:
        raise RunError(f"data.block_tokens={block_tokens} is longer than the model's context of {context} tokens")
    shape = target_shape(teacher.architecture, teacher.config, teacher.shape, recipe.prune)
    dtype = compute_dtype(recipe.calibrate.precision, pick_device())
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"block_tokens": block_tokens}),
            "calibrate": recipe.calibrate.model_copy(
                update={"precision": "bfloat16" if dtype == torch.bfloat16 else "float32"}
            ),
        }
    ), shape


def prepare_data(stages: "_Run", teacher: Checkpoint, tokenizer: Any) -> data.Corpus:
    config = stages.recipe.data
    assert config.block_tokens is not None
    stages.do(
        "data",
        lambda out: asdict_without_path(
            data.prepare(config, tokenizer, vocab=teacher.shape.vocab, block_tokens=config.block_tokens, out=out)
        ),
        inputs={"text": data.source_digest(config), "tokenizer": stages.digest(carried_files(teacher.path))},
        config={"data": config},
    )
    return data.open_corpus(stages.out / "data")


def collect_statistics(stages: "_Run", teacher: Checkpoint, corpus: data.Corpus) -> Statistics:
    config, seed = stages.recipe.calibrate, stages.recipe.seed

    def work(out: Path) -> dict[str, Any]:
        rows = data.batch_rows(len(corpus.train), seed=seed, step=0, batch=min(config.samples, len(corpus.train)))
        statistics = calibrate(
            teacher,
            torch.from_numpy(corpus.train.select(rows)),
            dtype=compute_dtype(config.precision, torch.device("cpu")),
            batch=config.batch,
            scratch=out,
            progress=lambda done, total: stages.listener.progress(done, total, "layers"),
        )
        statistics.save(out)
        return {"samples": statistics.samples, "tokens": statistics.tokens}

    stages.do(
        "statistics",
        work,
        inputs={"model": stages.digest(model_files(teacher.path)), "data": corpus.digest},
        config={"calibrate": config, "seed": seed},
    )
    return Statistics.load(stages.out / "statistics")


def make_plan(stages: "_Run", teacher: Checkpoint, statistics: Statistics, shape: Shape) -> Plan:
    config = stages.recipe.prune
    criterion = {"criterion": config.criterion, "sequence": config.sequence_aggregate, "batch": config.batch_aggregate}

    def score(out: Path) -> dict[str, Any]:
        scores = CRITERIA[config.criterion]
        scores(statistics, teacher.shape, config.sequence_aggregate, config.batch_aggregate).save(out)
        return criterion

    def plan(out: Path) -> dict[str, Any]:
        made = choose(Scores.load(stages.out / "scores"), teacher.shape, shape)
        made.save(out / "plan.json")
        return {"plan": str(made)}

    statistics_digest = stages.digest([stages.out / "statistics" / "statistics.safetensors"])
    stages.do("scores", score, inputs={"statistics": statistics_digest}, config={"prune": criterion})
    stages.do(
        "plan",
        plan,
        inputs={"scores": stages.digest([stages.out / "scores" / "scores.json"])},
        config={"shape": asdict(shape)},
    )
    return Plan.load(stages.out / "plan" / "plan.json")


def prune(stages: "_Run", teacher: Checkpoint, plan: Plan) -> Path:
    def work(out: Path) -> dict[str, Any]:
        cut(teacher, plan, out)
        return describe(open_checkpoint(out))

    inputs = {
        "model": stages.digest(model_files(teacher.path)),
        "plan": stages.digest([stages.out / "plan" / "plan.json"]),
    }
    return stages.do("pruned", work, inputs=inputs, config={})


def teach(stages: "_Run", name: str, pruned: Path, teacher: Path | None, corpus: data.Corpus) -> Path:
    """Distil the pruned model, or (without a teacher) train its shape from random weights on the same tokens."""
    config, seed = stages.recipe.distill, stages.recipe.seed
    if teacher is None:
        config = config.model_copy(update={"loss": "cross_entropy"})

    def work(out: Path) -> dict[str, Any]:
        trained = train.distill(
            pruned,
            teacher,
            corpus,
            config,
            seed=seed,
            work=stages.out / ("distill" if teacher else f"distill-{name}"),
            out=out,
            initialize="weights" if teacher else "random",
            progress=stages.listener.progress,
        )
        return describe(open_checkpoint(out)) | {"training": asdict(trained)}

    inputs = {"pruned": stages.digest(model_files(pruned)), "data": corpus.digest}
    if teacher:
        inputs["teacher"] = stages.digest(model_files(teacher))
    return stages.do(name, work, inputs=inputs, config={"distill": config, "seed": seed})


def measure(stages: "_Run", models: Mapping[str, Path], corpus: data.Corpus, tokenizer: Any) -> None:
    config = stages.recipe.evaluate

    def work(out: Path) -> dict[str, Any]:
        device = pick_device()
        loaded = {name: load_model(path).to(device) for name, path in models.items()}
        for name, model in loaded.items():
            quality = evaluate(
                model,
                corpus.heldout.head(config.blocks),
                teacher=loaded["teacher"] if name != "teacher" else None,
                batch=config.batch,
                progress=lambda done, total, name=name: stages.listener.progress(done, total, name),
            )
            write_json(out / f"{name}.json", describe(open_checkpoint(models[name])) | quality.to_dict())
        texts = [
            {"prompt": prompt}
            | {
                name: generate(loaded[name], tokenizer, prompt, new_tokens=config.new_tokens)
                for name in ("teacher", "pruned", "student")
            }
            for prompt in config.prompts
        ]
        write_json(out / "generations.json", texts)
        if config.speed:
            pair = {name: loaded[name] for name in ("teacher", "student")}
            speeds = measure_speed(pair, prompt_tokens=min(256, corpus.block_tokens))
            write_json(out / "speed.json", {name: speed.to_dict() for name, speed in speeds.items()})
        return {"models": list(models)}

    inputs = {name: stages.digest(model_files(path)) for name, path in models.items()}
    stages.do("evaluations", work, inputs=inputs | {"data": corpus.digest}, config={"evaluate": config})


def publish(out: Path) -> RunRecords:
    """Write report.html and the student's card from the records."""
    records = read_run(out)
    write_report(records)
    write_card(records)
    return records


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `minitron inspect` prints and evaluations carry: family, shape, parameters and bytes."""
    parameters = checkpoint.parameters
    return {
        "family": checkpoint.architecture.name,
        "shape": asdict(checkpoint.shape),
        "parameters": asdict(parameters) | {"non_embedding": parameters.non_embedding},
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "weight_bytes": checkpoint.weight_bytes,
        "kv_cache_bytes_per_token": kv_cache_bytes(checkpoint.shape, checkpoint.dtype.itemsize),
        "tied_embeddings": checkpoint.head == checkpoint.architecture.embedding,
    }


def asdict_without_path(corpus: data.Corpus) -> dict[str, Any]:
    return {name: value for name, value in vars(corpus).items() if name != "path"}


@dataclass
class _Run:
    """An open run directory: its lock, its resolved recipe and its stages."""

    out: Path
    recipe: Recipe
    listener: Listener
    _digests: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> "_Run":
        if self.out.exists() and not self.out.is_dir():
            raise RunError(f"{self.out} is a file; the output must be a directory: choose another --out")
        with readable_os_errors(self.out):
            self._created = not self.out.exists()
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = (self.out / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RunError(f"run directory {self.out} is in use by another process; wait for it, or choose another --out") from None
        cache = self.out / ".digests.json"
        self._digests = json.loads(cache.read_text()) if cache.exists() else {}
        if not (self.out / "recipe.yaml").exists():
            self._write_recipe()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._write_recipe()  # not before every stage agreed to it: the stored recipe is what the stages were made by
        elif self._created and not any(self.out.glob("*/")):
            shutil.rmtree(self.out)  # bad input: leave nothing behind
        self._lock.close()

    def settle(self, **sections: Section) -> Recipe:
        """Replace sections by their resolved form."""
        self.recipe = self.recipe.model_copy(update=sections)
        return self.recipe

    def digest(self, files: list[Path]) -> str:
        known = dict(self._digests)
        digest = digest_files(files, self._digests)
        if self._digests != known:
            write_json(self.out / ".digests.json", self._digests)
        return digest

    def do(
        self,
        name: str,
        work: Callable[[Path], dict[str, Any]],
        *,
        inputs: Mapping[str, str],
        config: Mapping[str, Any],
    ) -> Path:
        """Run one stage unless its record says that it is done; returns its directory.

        `work` fills the directory it is given and returns what the record should say of the result.
        """
        path = self.out / name
        plain = {key: _plain(value) for key, value in config.items()}
        if (path / "record.json").exists():
            _require_same(path, json.loads((path / "record.json").read_text()), inputs, plain)
            self.listener.stage(name, "unchanged")
            return path
        self.listener.stage(name, "running")
        started, clock = time.time(), time.monotonic()
        with atomic_directory(path) as partial:
            result = work(partial)
            write_json(
                partial / "record.json",
                {
                    "stage": name,
                    "inputs": dict(inputs),
                    "config": plain,
                    "result": result,
                    "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                    "seconds": round(time.monotonic() - clock, 3),
                    "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                    "versions": versions(),
                    "hardware": hardware(),
                },
            )
        self.listener.stage(name, "done")
        return path

    def _write_recipe(self) -> None:
        with readable_os_errors(self.out):
            partial = self.out / "recipe.yaml.partial"
            partial.write_text(dump_recipe(self.recipe))
            partial.replace(self.out / "recipe.yaml")


def versions() -> dict[str, str]:
    names = ("minitron", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def hardware() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Section) else value


def _require_same(path: Path, record: dict[str, Any], inputs: Mapping[str, str], config: Mapping[str, Any]) -> None:
    changed = [name for name, digest in inputs.items() if record["inputs"].get(name) != digest]
    old, new = _flat(record["config"]), _flat(config)
    changed += [f"{key} ({old.get(key)!r}, now {new.get(key)!r})" for key in {*old, *new} if old.get(key) != new.get(key)]
    if changed:
        raise RunError(
            f"{path} was made from other inputs; changed: {', '.join(sorted(changed))}. "
            "Put them back, delete that directory and those made after it, or choose another --out"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
