"""What the files of a training and of recorded logits hold, checked when they are read."""

from typing import Annotated

from pydantic import Field, TypeAdapter

from minitron.core.layouts import Amount, Count, FileName, Finite, Layout, Positive
from minitron.core.typed_files import FileKind


class Logged(Layout):
    """A row of metrics.jsonl: a training step, or an evaluation on held-out text."""

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
    """lessons/lessons.json."""

    vocab: Positive
    top_k: Positive
    temperature: Annotated[float, Field(gt=0)]
    block_tokens: Positive
    shards: Annotated[list[Shard], Field(min_length=1)]


class Trained(Layout):
    """What <stage>/record.json says of a training."""

    tokens: Count


class Training(Layout):
    """The result of the stages corrected, student and scratch."""

    training: Trained


LOGGED = FileKind("a row of metrics", TypeAdapter(Logged))
LESSONS = FileKind("the description of lessons", TypeAdapter(LessonsFacts))


def training_result(stage: str) -> FileKind[Training]:
    """The result of one of the stages that train."""
    return FileKind(f"that of the stage {stage}", TypeAdapter(Training))
