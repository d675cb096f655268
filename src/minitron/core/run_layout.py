"""The run directory: the names of its stages, models and files, which are written here only, and a stage's record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, TypeAdapter

from minitron.core.layouts import Amount, Count, Layout
from minitron.core.typed_files import FileKind

RECORD_FILE, METRICS_FILE = "record.json", "metrics.jsonl"  # of a stage, and of a training
# The order in which models and stages are shown.
MODELS = ("teacher", "corrected", "pruned", "student", "scratch")
# Stage -> what its directory holds, in the order in which they are made and shown.
STAGES = {
    "data": "the text as blocks of tokens, a part of its documents held out",
    "corrected": "the teacher after it has learnt the text",
    "statistics": "the statistics of the calibration samples' activations",
    "lessons": "the teacher's recorded logits",
    "search": "the shapes within the budgets, ranked",
    "scores": "the importance of each unit and layer",
    "plan": "the units that stay",
    "pruned": "the model after the cut and its repair",
    "student": "the model after distillation",
    "scratch": "the baseline: the student's shape, trained from random weights",
    "evaluations": "what was measured of each model",
}
# What a stage keeps beside its own directory while it works: what it resumes from, and the metrics of trainings.
WORK = ("data-state", "search-state", "distill", "distill-corrected", "distill-scratch")


@dataclass(frozen=True)
class RunLayout:
    """The paths in a run directory.

    out: the run directory.
    """

    out: Path

    def stage(self, name: str) -> Path:
        """The directory of a stage or of an exporter, which is there when it is done."""
        return self.out / name

    def record(self, name: str) -> Path:
        """The record of a stage's inputs and result."""
        return self.stage(name) / RECORD_FILE

    def work(self, name: str) -> Path:
        """A directory that a stage works in beside its own, one of WORK."""
        assert name in WORK
        return self.out / name

    def evaluation(self, model: str) -> Path:
        """The measurements of a model."""
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
    def budget(self) -> Path:
        """The tokens that the minutes of a distillation have become."""
        return self.out / "budget.json"

    @property
    def fit(self) -> Path:
        """The settings of the distillation that were changed to fit the memory."""
        return self.out / "fit.json"

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
        return self.work("distill") / METRICS_FILE

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


class Hardware(Layout):
    device: str
    cores: Count
    threads: Count
    memory_bytes: Count


class Inputs(Layout):
    """The digests and settings that a stage started from, in its record.json and in inputs.json of its state."""

    inputs: dict[str, str]
    config: dict[str, object]


class Record(Inputs):
    """<stage>/record.json describes a stage that is done."""

    result: dict[str, object]
    started: str
    seconds: Amount
    peak_memory_bytes: Count
    energy_joules: Amount | None = None
    versions: Annotated[dict[str, str], AfterValidator(_with_minitron)]  # package -> its version
    hardware: Hardware


INPUTS = FileKind("what a stage was started with", TypeAdapter(Inputs))
RECORD = FileKind("the record of a stage", TypeAdapter(Record))
