"""What the files of a run directory hold: their types, of which each is checked when the file is read.

Keys that older versions did not write have a default; keys that nothing reads are left out.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from minitron.core.typed_files import FileKind


def _positive_or_unknown(value: float) -> float:
    if not (value > 0 or math.isnan(value)):
        raise ValueError("must be above 0")
    return value


# Numbers beyond these are no counts or measurements, and would not be shown either.
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Unbounded = Annotated[float, Field(ge=-1e30)]  # such as the score of a layer that stays in any case
Amount = Annotated[float, Field(ge=0, le=1e30)]
Rate = Annotated[float, AfterValidator(_positive_or_unknown)]  # nan where every round was disturbed
FileName = Annotated[str, Field(pattern=r"^[^/\x00]*[^/\x00.][^/\x00]*$")]


# Names that a recipe has for the losses, what layers are scored by, and the steps of a repair.
Loss = Literal["forward_kl", "reverse_kl", "jensen_shannon", "mse", "cosine", "cross_entropy"]
LayerCriterion = Literal["block_influence", "loss", "contiguous", "task"]
Repair = Literal[
    "norm_gain", "basis", "ffn_least_squares", "ffn_obs", "heads_least_squares", "heads_obs", "residual_heads", "refit"
]


class Layout(BaseModel):
    """An object of a JSON file."""

    model_config = ConfigDict(strict=True)


class Machine(Layout):
    device: str
    cores: Count
    threads: Count
    memory_bytes: Count


class Versions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, str]

    minitron: str


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
    versions: Versions
    hardware: Machine


class Sizes(Layout, extra="forbid"):
    layers: Positive
    hidden: Positive
    ffn: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    vocab: Positive


class Parts(Layout):
    total: Positive
    non_embedding: Positive
    embedding: Count
    attention: Count
    mlp: Count
    norm: Count


class PlanSizes(Layout, extra="forbid"):
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


class Units(Layout):
    """A plan file that lists the units of some dims only."""

    layers: list[int] = []
    hidden: list[int] = []
    ffn: list[list[int]] = []
    heads: list[list[int]] = []
    kv_heads: list[list[int]] = []


class PlanFile(Layout):
    """plan/plan.json and pruned/plan.json; whether it agrees with itself, `Plan.load` says."""

    teacher: PlanSizes
    student: PlanSizes
    layers: list[int]
    hidden: list[int]
    ffn: list[list[int]]
    heads: list[list[int]]
    kv_heads: list[list[int]]


class MadePlan(PlanFile):
    """The same, and it agrees with itself."""

    @model_validator(mode="after")
    def of_its_sizes(self) -> "MadePlan":
        teacher, student = vars(self.teacher), vars(self.student)
        for dim in ("ffn", "heads", "kv_heads"):
            if len(getattr(self, dim)) != self.student.layers:
                raise ValueError(f"{dim} has not a list for each of {self.student.layers} layers")
        for dim in ("layers", "hidden", "ffn", "heads", "kv_heads"):
            for units in [getattr(self, dim)] if dim in ("layers", "hidden") else getattr(self, dim):
                fits = bool(units) and len(units) == student[dim] and 0 <= units[0] <= units[-1] < teacher[dim]
                if not fits or units != sorted(set(units)):
                    raise ValueError(
                        f"{dim} must list {student[dim]} different indices below {teacher[dim]}, in ascending order"
                    )
        return self


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
    """A row of evaluations/generations.json: a prompt, and what each model makes of it."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, str]

    prompt: str


class Speed(Layout):
    prefill: Rate
    prefill_range: Annotated[list[float], Field(min_length=2, max_length=2)]
    decode: Rate
    decode_range: Annotated[list[float], Field(min_length=2, max_length=2)]
    prompt_tokens: Count
    new_tokens: Count


class Ratios(Layout):
    prefill: float = math.nan
    decode: float = math.nan


class Speeds(Layout):
    """evaluations/speed.json."""

    teacher: Speed
    student: Speed
    ratio: Ratios | None = None


class Asked(Layout):
    """What a benchmark's task says."""

    title: str
    metric: str
    value: float
    stderr: float | None
    n: Count
    shots: Count


class Tasks(Layout):
    """evaluations/tasks.json."""

    tasks: dict[str, dict[str, Asked]]
    kept: dict[str, float | None] = {}
    chosen_by: list[str]


class Logged(Layout):
    """A row of metrics.jsonl."""

    step: Positive
    tokens: Positive
    loss: Number = 0.0
    learning_rate: Amount = 0.0
    heldout_loss: Number = 0.0


class Candidate(Layout):
    name: FileName
    shape: Sizes
    total: Positive
    non_embedding: Positive
    weight_bytes: Amount
    kv_cache_bytes: Amount
    decode_seconds: Amount
    prefill_seconds: Amount
    predicted: Unbounded
    losses: dict[Annotated[str, Field(pattern=r"^[0-9]{1,12}$")], Number]


class Throughput(Layout):
    bytes_per_second: Amount
    flops_per_second: Amount


class Search(Layout):
    """search/candidates.json, best first."""

    machine: Throughput
    context_tokens: Positive
    batch: Positive
    candidates: Annotated[list[Candidate], Field(min_length=1)]


class Quantized(Layout):
    kl: float
    top1: float
    tokens: Count
    perplexity: float
    reference_perplexity: float


class QuantizedFile(Layout):
    name: str
    file: FileName
    bytes: Positive
    bits_per_weight: Amount
    informed: bool
    measured: Quantized | None
    kl_of_other: float | None = None


class Ladder(Layout):
    """gguf/quantization.json."""

    notes: list[str]
    files: list[QuantizedFile]


class UnitScores(Layout):
    """scores/scores.json."""

    layers: list[Unbounded]
    hidden: list[Number]
    ffn: list[list[Number]]
    heads: list[list[Number]]
    kv_heads: list[list[Number]]


class Separation(Layout):
    token: Count
    leads: bool


class CorpusFacts(Layout):
    """data/corpus.json."""

    block_tokens: Positive
    dtype: Annotated[str, Field(pattern=r"^uint(16|32)$")]
    delimiter: str
    train_documents: Count
    train_tokens: Count  # none where all of the text is held out
    heldout_documents: Count
    heldout_tokens: Positive
    digest: str
    bytes_dtype: Annotated[str, Field(pattern=r"^uint(16|32)$")] = "uint16"
    bytes_digest: str = ""
    shared_documents: Count = 0
    shared_chars: Count = 0
    separator: Separation | None = None


class StatisticsFacts(Layout):
    """statistics/statistics.json."""

    samples: Positive
    tokens: Positive
    model: str = ""


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


class TextRecipe(Layout):
    source: str
    heldout: str | None
    block_tokens: Positive
    sample_temperature: Amount = 1.0
    sample_top_k: Count | None = None
    sample_top_p: Amount | None = None


class CutRecipe(Layout):
    target: str | None
    criterion: str
    drop_layers: str | None = None
    keep_layers: str | None = None
    iterations: Count = 1


class TrainingRecipe(Layout):
    loss: Loss | dict[Loss, Number]
    evaluate_blocks: Count
    temperature: Amount = 1.0
    top_k: Count | None = None
    teacher: str = ""
    correction: str | None = None
    correction_tokens: Count | None = None


class MeasuringRecipe(Layout):
    prompts: list[str]
    new_tokens: Count
    limit: Count | None = None
    tasks_dir: str | None = None


class FilesRecipe(Layout):
    types: list[str] = []
    bits_per_weight: list[Amount] = []
    sizes: list[Amount] = []


class RunRecipe(Layout):
    """recipe.yaml of a run, as far as its report and card read it."""

    model: str
    revision: str | None
    seed: Count
    data: TextRecipe
    prune: CutRecipe
    distill: TrainingRecipe
    evaluate: MeasuringRecipe
    gguf: FilesRecipe | None = None


INPUTS = FileKind("what a stage was started with", TypeAdapter(Inputs))
RECORD = FileKind("the record of a stage", TypeAdapter(Record))
PLAN = FileKind("a plan file", TypeAdapter(PlanFile))
MADE_PLAN = FileKind("a plan file", TypeAdapter(MadePlan))
UNITS = FileKind("a plan file", TypeAdapter(Units))
EVALUATED = FileKind("the evaluation of a model", TypeAdapter(Evaluated))
GENERATIONS = FileKind("a list of prompts and their continuations", TypeAdapter(list[Continued]))
SPEEDS = FileKind("the speed of two models", TypeAdapter(Speeds))
TASKS = FileKind("the results of benchmarks", TypeAdapter(Tasks))
LOGGED = FileKind("a row of metrics", TypeAdapter(Logged))
SEARCH = FileKind("the result of a search", TypeAdapter(Search))
LADDER = FileKind("a table of GGUF files", TypeAdapter(Ladder))
SCORES = FileKind("scores of units", TypeAdapter(UnitScores))
CORPUS = FileKind("the description of a corpus", TypeAdapter(CorpusFacts))
STATISTICS = FileKind("the description of statistics", TypeAdapter(StatisticsFacts))
LESSONS = FileKind("the description of lessons", TypeAdapter(LessonsFacts))
RUN_RECIPE = FileKind("a run's recipe", TypeAdapter(RunRecipe))
LOSSES = FileKind("losses of candidates", TypeAdapter(dict[str, dict[str, float]]))


class Trained(Layout):
    tokens: Count


class _Training(Layout):
    training: Trained


class _Sampled(Layout):
    documents: Count


class _Text(Layout):
    train_tokens: Count
    heldout_tokens: Count
    sampled: _Sampled | None = None


class _Calibrated(Layout):
    samples: Count
    tokens: Count


class _Planned(Layout):
    plan: str


class _Repaired(Layout):
    repairs: list[Repair] | None = None


class _Scored(Layout):
    layers: LayerCriterion = "block_influence"


class _Named(Layout):
    name: FileName


class _Searched(Layout):
    tokens: Count
    winner: _Named


# Stage -> what its record says of the result.
RESULTS: dict[str, FileKind] = {
    "data": FileKind("that of the stage data", TypeAdapter(_Text)),
    "statistics": FileKind("that of the stage statistics", TypeAdapter(_Calibrated)),
    "search": FileKind("that of the stage search", TypeAdapter(_Searched)),
    "scores": FileKind("that of the stage scores", TypeAdapter(_Scored)),
    "plan": FileKind("that of the stage plan", TypeAdapter(_Planned)),
    "pruned": FileKind("that of the stage pruned", TypeAdapter(_Repaired)),
    "corrected": FileKind("that of the stage corrected", TypeAdapter(_Training)),
    "student": FileKind("that of the stage student", TypeAdapter(_Training)),
    "scratch": FileKind("that of the stage scratch", TypeAdapter(_Training)),
}
