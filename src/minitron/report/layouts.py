"""The parts of recipe.yaml and of stages' results that report and card read, checked when they are read."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from minitron.core.config import choice
from minitron.core.layouts import Amount, Count, Finite, Layout, Positive
from minitron.core.typed_files import FileKind
from minitron.distillation.losses import LossName
from minitron.pruning.depth import LAYER_CRITERIA
from minitron.pruning.importance import CriterionName
from minitron.pruning.repair import REPAIRS


class TextRecipe(Layout):
    source: str
    heldout: str | None
    block_tokens: Positive
    sample_temperature: Amount = 1.0
    sample_top_k: Count | None = None
    sample_top_p: Amount | None = None


class CutRecipe(Layout):
    target: str | None
    criterion: CriterionName
    drop_layers: str | None = None
    keep_layers: str | None = None
    iterations: Count = 1


class TrainingRecipe(Layout):
    loss: LossName | dict[LossName, Finite]
    evaluate_blocks: Count
    temperature: Amount = 1.0
    top_k: Count | None = None
    intermediate: str | bool | None = None  # YAML 1.1 reads `off` as false
    teacher: str = ""
    correction: Literal["before", "parallel"] | None = None
    correction_tokens: Count | None = None


class MeasuringRecipe(Layout):
    prompts: list[str]
    new_tokens: Count
    limit: Count | None = None
    tasks_dir: str | None = None


class FilesRecipe(Layout):
    types: list[str] = Field(default=[])
    bits_per_weight: list[Amount] = Field(default=[])
    sizes: list[Amount] = Field(default=[])

    @property
    def wanted(self) -> bool:
        return bool(self.types or self.bits_per_weight or self.sizes)


class RunRecipe(Layout):
    """The keys of a run's recipe.yaml that its report and card read."""

    model: str
    revision: str | None
    seed: Count
    data: TextRecipe
    prune: CutRecipe
    distill: TrainingRecipe
    evaluate: MeasuringRecipe
    gguf: FilesRecipe | None = None


class ScoresResult(Layout):
    """The result of the stage scores, which names a criterion of layers only if it took a pass of its own."""

    layers: Annotated[str, choice(LAYER_CRITERIA)] = "block_influence"


class PlanResult(Layout):
    """The result of the stage plan."""

    plan: str


class PrunedResult(Layout):
    """The result of the stage pruned. Older versions did not say which steps ran."""

    repairs: list[Annotated[str, choice(REPAIRS)]] | None = None


RUN_RECIPE = FileKind("a run's recipe", TypeAdapter(RunRecipe))
SCORES_RESULT = FileKind("that of the stage scores", TypeAdapter(ScoresResult))
PLAN_RESULT = FileKind("that of the stage plan", TypeAdapter(PlanResult))
PRUNED_RESULT = FileKind("that of the stage pruned", TypeAdapter(PrunedResult))
