"""Structured pruning and knowledge distillation of language models: the Minitron method.

The verbs are functions (`minitron.prune(...)`), the packages are nouns (`minitron.pruning`). P1 in the docstrings is
arXiv:2407.14679, P2 is arXiv:2408.11796. Start reading at `minitron.pipeline.stages`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitron.api import Distilled as Distilled
    from minitron.api import Inspected as Inspected
    from minitron.api import Pruned as Pruned
    from minitron.api import benchmark as benchmark
    from minitron.api import calibrate as calibrate
    from minitron.api import distill as distill
    from minitron.api import evaluate as evaluate
    from minitron.api import generate as generate
    from minitron.api import inspect as inspect
    from minitron.api import measure_speed as measure_speed
    from minitron.api import needs_of_prune as needs_of_prune
    from minitron.api import plan_quantized as plan_quantized
    from minitron.api import prune as prune
    from minitron.api import quantize as quantize
    from minitron.api import run as run
    from minitron.api import search as search
    from minitron.calibration.statistics import CalibrateConfig as CalibrateConfig
    from minitron.calibration.statistics import Statistics as Statistics
    from minitron.core.errors import MinitronError as MinitronError
    from minitron.core.progress import Listener as Listener
    from minitron.data.config import DataConfig as DataConfig
    from minitron.distillation.config import DistillConfig as DistillConfig
    from minitron.distillation.train import Trained as Trained
    from minitron.evaluation.engines import SpeedModel as SpeedModel
    from minitron.evaluation.engines import SpeedOptions as SpeedOptions
    from minitron.evaluation.engines import SpeedResult as SpeedResult
    from minitron.evaluation.layouts import Ratios as Ratios
    from minitron.evaluation.layouts import Speed as Speed
    from minitron.evaluation.layouts import TaskResult as TaskResult
    from minitron.evaluation.quality import EvaluateConfig as EvaluateConfig
    from minitron.evaluation.quality import Evaluation as Evaluation
    from minitron.evaluation.speed import Load as Load
    from minitron.evaluation.speed import SpeedRow as SpeedRow
    from minitron.evaluation.tasks.measure import TaskOptions as TaskOptions
    from minitron.evaluation.tasks.suite import BenchmarkResult as BenchmarkResult
    from minitron.gguf.config import QuantizeConfig as QuantizeConfig
    from minitron.gguf.layouts import Measured as Measured
    from minitron.gguf.layouts import QuantizedModel as QuantizedModel
    from minitron.gguf.layouts import WrittenFile as WrittenFile
    from minitron.gguf.quantize import PlannedFile as PlannedFile
    from minitron.gguf.reader import GgufFacts as GgufFacts
    from minitron.model.architecture import Architecture as Architecture
    from minitron.model.architecture import Shape as Shape
    from minitron.model.checkpoint import Checkpoint as Checkpoint
    from minitron.model.checkpoint import open_checkpoint as open_checkpoint
    from minitron.model.describe import Description as Description
    from minitron.model.families import FAMILIES as FAMILIES
    from minitron.pruning.config import PruneConfig as PruneConfig
    from minitron.pruning.importance import Scores as Scores
    from minitron.pruning.plan import Plan as Plan
    from minitron.pruning.repair import RepairConfig as RepairConfig
    from minitron.pruning.steps import CutNeeds as CutNeeds
    from minitron.recipe import DEMO_TEACHER as DEMO_TEACHER
    from minitron.recipe import Recipe as Recipe
    from minitron.recipe import build_recipe as build_recipe
    from minitron.recipe import load_recipe as load_recipe
    from minitron.report.records import RunRecords as RunRecords
    from minitron.shapes.rank import Ranked as Ranked
    from minitron.shapes.rank import Ranking as Ranking
    from minitron.shapes.space import SearchConfig as SearchConfig

# Module -> the names that `minitron` has of it. Imported when used, so that `minitron --help` does not wait for torch.
_PUBLIC = {
    "minitron.api": "Distilled Inspected Pruned benchmark calibrate distill evaluate generate inspect "
    "measure_speed needs_of_prune plan_quantized prune quantize run search",
    "minitron.calibration.statistics": "CalibrateConfig Statistics",
    "minitron.core.errors": "MinitronError",
    "minitron.core.progress": "Listener",
    "minitron.data.config": "DataConfig",
    "minitron.distillation.config": "DistillConfig",
    "minitron.distillation.train": "Trained",
    "minitron.evaluation.engines": "SpeedModel SpeedOptions SpeedResult",
    "minitron.evaluation.layouts": "Ratios Speed TaskResult",
    "minitron.evaluation.quality": "EvaluateConfig Evaluation",
    "minitron.evaluation.speed": "Load SpeedRow",
    "minitron.evaluation.tasks.measure": "TaskOptions",
    "minitron.evaluation.tasks.suite": "BenchmarkResult",
    "minitron.gguf.config": "QuantizeConfig",
    "minitron.gguf.layouts": "Measured QuantizedModel WrittenFile",
    "minitron.gguf.quantize": "PlannedFile",
    "minitron.gguf.reader": "GgufFacts",
    "minitron.model.architecture": "Architecture Shape",
    "minitron.model.checkpoint": "Checkpoint open_checkpoint",
    "minitron.model.describe": "Description",
    "minitron.model.families": "FAMILIES",
    "minitron.pruning.config": "PruneConfig",
    "minitron.pruning.importance": "Scores",
    "minitron.pruning.plan": "Plan",
    "minitron.pruning.repair": "RepairConfig",
    "minitron.pruning.steps": "CutNeeds",
    "minitron.recipe": "DEMO_TEACHER Recipe build_recipe load_recipe",
    "minitron.report.records": "RunRecords",
    "minitron.shapes.rank": "Ranked Ranking",
    "minitron.shapes.space": "SearchConfig",
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
