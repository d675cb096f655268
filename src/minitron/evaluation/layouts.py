"""The contents of the files of evaluations, checked when they are read."""

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from minitron.core.layouts import Count, Layout, Parts, Positive, Rate, Sizes
from minitron.core.typed_files import FileKind


class Evaluated(Layout):
    """evaluations/<model>.json. Losses may be infinite, and are nan where they were not measured."""

    family: str
    shape: Sizes
    parameters: Parts
    dtype: str
    weight_bytes: Positive
    kv_cache_bytes_per_token: Positive
    tokens: Count
    lm_loss: float
    perplexity: float
    bits_per_byte: float | None
    kl_to_teacher: float | None
    top1_agreement: float | None
    kl_to_corrected: float | None = None


class Continued(BaseModel):
    """A row of evaluations/generations.json: a prompt and each model's continuation."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, str]

    prompt: str

    @property
    def of_models(self) -> dict[str, str]:
        """Model -> its continuation."""
        return self.__pydantic_extra__


Ends = Annotated[list[float], Field(min_length=2, max_length=2)]


class Speed(Layout):
    """Medians over rounds, in tokens per second of all sequences together.

    prefill_range, decode_range: the slowest and the fastest round.
    peak_memory_bytes: None where it cannot be measured.
    """

    prefill: Rate
    prefill_range: Ends
    decode: Rate
    decode_range: Ends
    prompt_tokens: Count
    new_tokens: Count
    batch: Count = 1
    peak_memory_bytes: Count | None = None


class Ratios(Layout):
    """The student's speed over the teacher's: the median and the range of the ratios of the rounds."""

    prefill: float = math.nan
    prefill_range: Ends = Field(default=[math.nan, math.nan])
    decode: float = math.nan
    decode_range: Ends = Field(default=[math.nan, math.nan])


class Speeds(Layout):
    """evaluations/speed.json. Older versions did not write the ratios of the rounds; ratios of the medians stand in."""

    teacher: Speed
    student: Speed
    ratio: Ratios | None = None

    @model_validator(mode="after")
    def with_ratios(self) -> "Speeds":
        if self.ratio is None:
            self.ratio = Ratios(
                prefill=self.student.prefill / self.teacher.prefill, decode=self.student.decode / self.teacher.decode
            )
        return self


class TaskResult(Layout):
    """The result of one model in one task.

    stderr: of the value over items, by the harness; None where the harness has none.
    n: the number of items.
    shots: examples in the prompt.
    version: of the task, by the harness.
    others: further metrics of the task, as metric or metric,filter.
    """

    title: str
    metric: str
    value: float
    stderr: float | None
    n: Count
    shots: Count
    version: str = ""
    higher_is_better: bool = True
    filter: str | None = None
    others: dict[str, float] = Field(default={})

    def to_dict(self) -> dict[str, object]:
        return self.model_dump()


class Tasks(Layout):
    """evaluations/tasks.json."""

    tasks: dict[str, dict[str, TaskResult]]
    kept: dict[str, float | None] = Field(default={})
    chosen_by: list[str]


EVALUATED = FileKind("the evaluation of a model", TypeAdapter(Evaluated))
GENERATIONS = FileKind("a list of prompts and their continuations", TypeAdapter(list[Continued]))
SPEEDS = FileKind("the speed of two models", TypeAdapter(Speeds))
TASKS = FileKind("the results of benchmarks", TypeAdapter(Tasks))
