"""The section prune of a recipe: the student's size, and how units and layers are scored."""

from pydantic import Field

from minitron.core.config import Section, UserPath
from minitron.core.errors import PlanError
from minitron.pruning.depth import LAYER_CRITERIA, LayerCriterionName, layer_criteria_that_read
from minitron.pruning.importance import Aggregate, CriterionName


class PruneConfig(Section):
    target: str | None = None
    """Size of the student: `50%` of the teacher's non-embedding parameters, or a total such as `4.5B` or `300M`."""
    shape: dict[str, int] | None = None
    """The student's sizes instead of a target, such as {hidden: 3072, ffn: 9216}; dims not named stay."""
    drop_layers: str | None = None
    """Layers to drop whatever their score, such as `15-30` or `3,7,9-11`, numbered from 0 as in the tensors' names."""
    keep_layers: str | None = None
    """Instead of `drop_layers`, the layers to keep."""
    criterion: CriterionName = "activation"
    """How units other than layers are scored."""
    sequence_aggregate: Aggregate = "mean"
    """Reduction of absolute activations over the tokens of a sample; mean is best in P1's ablation."""
    batch_aggregate: Aggregate = "l2"
    """Reduction over samples; l2 is best in P1's ablation."""
    seed: int = Field(default=0, ge=0)
    """Seed of the criterion `random`; the others have no use for it."""
    layer_criterion: LayerCriterionName = "block_influence"
    """How layers are scored."""
    layer_task: UserPath | None = None
    """For the layer criterion `task`: a .jsonl file of multiple-choice questions, or, where lm-evaluation-harness is
    installed, the name of one of its tasks or a .yaml file of one."""
    layer_samples: int = Field(default=128, ge=1)
    """Calibration blocks on which layers are scored by loss, or questions by task; at most."""
    iterations: int = Field(default=1, ge=1)
    """Steps of the cut, each on new scores of the model that is left. More than one step gained nothing after
    retraining in P1."""
    hidden_multiple: int | None = Field(default=None, ge=1)
    """The student's hidden size is a multiple of this. Default by the teacher's size, see `default_multiple`."""
    ffn_multiple: int | None = Field(default=None, ge=1)
    """The student's ffn size is a multiple of this. Default by the teacher's size, see `default_multiple`."""


def require_task_fits(prune: PruneConfig) -> None:
    """Raises: PlanError for a task without the layer criterion that reads it, or for that criterion without a task."""
    if (LAYER_CRITERIA[prune.layer_criterion].reads == "questions") != (prune.layer_task is not None):
        raise PlanError(
            f"prune.layer_criterion is {prune.layer_criterion!r} and prune.layer_task is {prune.layer_task!r}: "
            f"the criterion {' or '.join(map(repr, layer_criteria_that_read('questions')))} needs a task, and no other "
            "criterion has use for one"
        )
