"""A run directory: the names of its stages, its models and its files, each of them here only, and a stage's record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter

from minitron.core.layouts import Amount, Count, Layout
from minitron.core.typed_files import FileKind

# The order in which models and stages are shown.
MODELS = ("teacher", "corrected", "pruned", "student", "scratch")
STAGES = (
    *("data", "corrected", "statistics", "lessons", "search", "scores", "plan"),
    *("pruned", "student", "scratch", "evaluations", "gguf"),
)
# What a stage keeps beside its own directory while it works: what it resumes from, and the metrics of trainings.
WORK = ("data-state", "search-state", "distill", "distill-corrected", "distill-scratch")


@dataclass(frozen=True)
class RunLayout:
    """Where everything of a run lies.

    out: the run directory.
    """

    out: Path

    def stage(self, name: str) -> Path:
        """The directory of a stage or of an exporter, which is there when it is done."""
        return self.out / name

    def record(self, name: str) -> Path:
        """What went into a stage and what came out."""
        return self.stage(name) / "record.json"

    def work(self, name: str) -> Path:
        """The directory of what is not a stage's result, one of WORK."""
        assert name in WORK
        return self.out / name

    def evaluation(self, model: str) -> Path:
        """What was measured of a model."""
        assert model in MODELS
        return self.out / "evaluations" / f"{model}.json"

    @property
    def recipe(self) -> Path:
        return self.out / "recipe.yaml"

    @property
    def report(self) -> Path:
        return self.out / "report.html"

    @property
    def card(self) -> Path:
        return self.out / "student" / "README.md"

    @property
    def lock(self) -> Path:
        return self.out / ".lock"

    @property
    def digests(self) -> Path:
        """The sha256 of files that did not change since they were read."""
        return self.out / ".digests.json"

    @property
    def generations(self) -> Path:
        return self.out / "evaluations" / "generations.json"

    @property
    def speed(self) -> Path:
        return self.out / "evaluations" / "speed.json"

    @property
    def tasks(self) -> Path:
        """The benchmarks."""
        return self.out / "evaluations" / "tasks.json"

    @property
    def metrics(self) -> Path:
        """A row for each step of the student's training and for each evaluation in it."""
        return self.out / "distill" / "metrics.jsonl"

    @property
    def scores(self) -> Path:
        return self.out / "scores" / "scores.json"

    @property
    def plan(self) -> Path:
        """The plan by the scores."""
        return self.out / "plan" / "plan.json"

    @property
    def cut(self) -> Path:
        """The plan with the units that the repair chose."""
        return self.out / "pruned" / "plan.json"

    @property
    def candidates(self) -> Path:
        """The shapes that the search ranked."""
        return self.out / "search" / "candidates.json"

    @property
    def statistics(self) -> Path:
        return self.out / "statistics" / "statistics.safetensors"


def _with_minitron(versions: dict[str, str]) -> dict[str, str]:
    if "minitron" not in versions:
        raise ValueError("versions.minitron is missing")
    return versions


class Machine(Layout):
    device: str
    cores: Count
    threads: Count
    memory_bytes: Count


class Inputs(Layout):
    """What went into a stage, as <stage>/record.json and inputs.json of what a stage goes on from say it."""

    inputs: dict[str, str]
    config: dict[str, Any]


class Record(Inputs):
    """<stage>/record.json."""

    result: dict[str, Any]
    started: str
    seconds: Amount
    peak_memory_bytes: Count
    energy_joules: Amount | None = None
    versions: Annotated[dict[str, str], AfterValidator(_with_minitron)]  # package -> its version
    hardware: Machine


INPUTS = FileKind("what a stage was started with", TypeAdapter(Inputs))
RECORD = FileKind("the record of a stage", TypeAdapter(Record))
