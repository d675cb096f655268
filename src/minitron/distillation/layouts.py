"""The types of the files of a training and of recorded logits, checked when they are read."""

from typing import Annotated

from pydantic import Field, TypeAdapter

from minitron.core.layouts import Amount, Count, FileName, Finite, Layout, Positive
from minitron.core.text import both, count, size
from minitron.core.typed_files import FileKind


class Logged(Layout):
    """A row of metrics.jsonl describes a training step, or an evaluation on held-out text."""

    step: Positive
    tokens: Positive
    loss: Finite | None = None
    learning_rate: Amount | None = None
    heldout_loss: Finite | None = None


class Shard(Layout):
    file: FileName
    blocks: Positive
    sha256: str


class LessonsFacts(Layout):
    """lessons/lessons.json describes recorded logits."""

    vocab: Positive
    top_k: Positive
    temperature: Annotated[float, Field(gt=0)]
    block_tokens: Positive
    shards: Annotated[list[Shard], Field(min_length=1)]


class TrainingFacts(Layout):
    """The training in a stage's record.json."""

    tokens: Count


class Budget(Layout):
    """budget.json tells how the minutes of a distillation became tokens: at the speed that was measured before it."""

    minutes: Annotated[float, Field(gt=0)]
    tokens_per_second: Annotated[float, Field(gt=0)]
    tokens: Positive

    def __str__(self) -> str:
        """Say what the minutes have become."""
        speed, tokens = count(self.tokens_per_second), count(self.tokens)
        return f"{self.minutes:g} minutes at a measured {speed} tokens/s: {tokens} tokens"


class Fit(Layout):
    """fit.json tells the memory that a training step may take, and the settings that were changed to fit it.

    memory: the bytes that it may take in each process.
    processes: among which the models are sharded.
    asked: the bytes of a step with the settings that were asked for; None where they are far fewer.
    peak: the bytes of a step with the settings that are taken; None where they are far fewer.
    changes: the changed settings of `distill`.
    """

    memory: Positive
    processes: Positive
    asked: Positive | None = None
    peak: Positive | None = None
    changes: dict[str, bool | int | str] = Field(default={})

    @property
    def settings(self) -> str:
        """The changed settings, as they are given to a command."""
        values = [str(value).lower() if isinstance(value, bool) else value for value in self.changes.values()]
        return both(f"distill.{name}={value}" for name, value in zip(self.changes, values, strict=True))

    def __str__(self) -> str:
        """Say what was changed, and why; something must have been."""
        assert self.asked is not None and self.peak is not None and self.changes
        return (
            f"a step would take {size(self.asked)} where {size(self.memory)} may be taken; with {self.settings} it "
            f"takes {size(self.peak)}"
        )


class TrainedStage(Layout):
    """The result of the stages corrected, student and scratch."""

    training: TrainingFacts
    budget: Budget | None = None
    fit: Fit | None = None


FIT = FileKind("the memory of a distillation", TypeAdapter(Fit))
BUDGET = FileKind("the budget of a distillation", TypeAdapter(Budget))
LOGGED = FileKind("a row of metrics", TypeAdapter(Logged))
LESSONS = FileKind("the description of recorded logits", TypeAdapter(LessonsFacts))


def training_result(stage: str) -> FileKind[TrainedStage]:
    """The result of one of the stages that train."""
    return FileKind(f"that of the stage {stage}", TypeAdapter(TrainedStage))
