"""What a distillation is asked for, and what its settings resolve to: learning rates, batch, steps."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from minitron.core.config import Section
from minitron.core.device import Precision
from minitron.core.errors import MinitronError, RunError
from minitron.core.text import either
from minitron.data.corpus import TEACHER, DataConfig
from minitron.distillation.hidden_loss import Places
from minitron.distillation.losses import LOSSES, LossName
from minitron.distillation.objective import Objective
from minitron.distillation.optim import OPTIMIZERS, Optimizer, Weights
from minitron.distillation.trackers import TrackerName

Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(gt=0)]


class DistillConfig(Section):
    tokens: int | None = Field(default=None, ge=1)
    """Training tokens. Default: one pass over the training text."""
    loss: LossName | dict[LossName, Weight] = "forward_kl"
    """What the student learns from the teacher's logits, or a mixture with weights, such as {forward_kl: 1, mse:
    0.1}."""
    teacher: Literal["online", "recorded"] = "online"
    """Whether the teacher runs beside the student, or says everything before, in a pass with one layer in memory at a
    time, and is then gone; what is recorded is its `top_k` likeliest tokens and the rest."""
    correction: Literal["before", "parallel"] | None = None
    """Whether the teacher is trained on the same text too, by cross-entropy (P2): `before` anything is measured, cut
    and distilled from it, or in `parallel` with the student, whose start is then cut from the teacher as it was."""
    correction_tokens: int | None = Field(default=None, ge=1)
    """Tokens that the teacher is trained on. Default: those of distillation, at most one pass over the text."""
    correction_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the teacher. Default: a fifth of that of a plain cut with its hidden size."""
    correction_warmup_steps: int | None = Field(default=None, ge=0)
    """Linear warm-up of the teacher. Default: 120 steps (P2), at most a fifth of its steps."""
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    """Of both models' distributions, in the losses that compare these."""
    jensen_shannon_beta: float = Field(default=0.5, gt=0, lt=1)
    """Share of the teacher in the mixture that jensen_shannon compares both with."""
    top_k: int | None = Field(default=None, ge=1)
    """Compare only the teacher's likeliest tokens, and all others as one. Default: the whole vocabulary, or 64 of a
    recorded teacher."""
    top_k_tail: bool = True
    """Whether the others count at all; without them the likeliest are scaled up to 1, and the loss is biased."""
    intermediate: Places | None = None
    """Where states between layers are to agree too: they count twice as much as the logits at first, and nothing at the
    end. `all`: along the whole depth; `p1`: after the embedding and before the last two layers. Default: `all`, or
    `off` where no teacher runs beside the student."""
    batch_blocks: int | None = Field(default=None, ge=1)
    """Blocks per optimizer step. Default: see `resolve`."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Tokens per forward and backward; changes memory, not the result beyond rounding."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate. Default: 6% of the weights' size, half of it for a repaired cut; more in `resolve`."""
    scratch_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the same shape from random weights. Default: see `resolve`, or `learning_rate` if given."""
    min_learning_rate: float | None = Field(default=None, ge=0)
    """Learning rate at the end of the cosine. Default: a tenth of the peak."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Linear warm-up. Default: 2% of the steps, at least 10 and at most a fifth."""
    optimizer: Optimizer | None = None
    """What moves the weights. Default: soap, or adamw for weights in bfloat16."""
    weight_decay: float = Field(default=0.1, ge=0, le=100)
    """Decoupled weight decay on matrices; vectors have none."""
    betas: tuple[Share, Share] = Field(default=(0.9, 0.95), strict=False)
    """Decays of Adam's moments."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    activation_checkpointing: bool = False
    """Keep only the states between layers for the backward pass, and compute the rest again: a third more time."""
    compile: bool = False
    """Compile the layers of both models and the loss with torch.compile: a minute at the start, and shorter steps."""
    weights: Weights = "float32"
    """Of the student and its optimizer in training: 16 bytes a parameter in float32, gradient included; 10 in bfloat16
    with Kahan summation, 8 with stochastic rounding, both with matrix products in bfloat16."""
    precision: Precision = "auto"
    """Matrix products; logits are float32 in any case."""
    evaluate_steps: int | None = Field(default=None, ge=1)
    """Steps between held-out evaluations. Default: a tenth of the steps, or as many as read evaluate_blocks blocks,
    where these are more."""
    evaluate_blocks: int = Field(default=64, ge=1)
    """Held-out blocks of the periodic evaluation."""
    stop_at_loss: float | None = Field(default=None, gt=0)
    """End when the held-out loss has come down to this at an evaluation. With the default loss it is a KL in nats."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """Steps between resumable checkpoints. Default: a tenth of the steps."""
    log_to: list[TrackerName] = Field(default=[])
    """Where the rows of metrics.jsonl go too: tensorboard, wandb, trackio. A training that goes on may change it."""

    @property
    def for_record(self) -> dict[str, Any]:
        """What a training is; what only watches it is no part of that."""
        return self.model_dump(mode="json", exclude={"log_to"})

    @property
    def optimizer_name(self) -> Optimizer:
        """The optimizer, whether it was chosen or not."""
        return self.optimizer or ("soap" if self.weights == "float32" else "adamw")

    @property
    def objective(self) -> Objective:
        terms: Mapping[str, float] = {self.loss: 1.0} if isinstance(self.loss, str) else self.loss
        return Objective(terms, self.temperature, self.jensen_shannon_beta, self.top_k, self.top_k_tail, self.compile)


def require_correction_fits(config: DistillConfig) -> None:
    """Raises: MinitronError for a correction of the teacher that the rest of the config leaves without effect."""
    if config.correction is None:
        return
    if not config.objective.needs_teacher:
        raise MinitronError(
            f"distill.correction={config.correction} trains a teacher that distill.loss=cross_entropy never asks: "
            "leave one of them out"
        )
    if config.correction == "parallel" and config.teacher == "recorded":
        raise MinitronError(
            "distill.correction=parallel changes the teacher at every step, and distill.teacher=recorded has it say "
            "everything before: set distill.correction=before, or leave distill.teacher out"
        )
    if config.correction == "parallel" and (config.correction_tokens or 0) > (config.tokens or math.inf):
        raise MinitronError(
            f"distill.correction_tokens={config.correction_tokens:,} is more than distill.tokens={config.tokens:,}, "
            "all that a teacher corrected in parallel reads: lower it, or set distill.correction=before"
        )


def has_states(config: DistillConfig) -> bool:
    return config.teacher == "online" and config.objective.needs_teacher


def require_losses_fit(config: DistillConfig) -> None:
    on_logits = sorted(name for name in config.objective.terms if LOSSES[name].reads == "logits")
    if config.top_k is not None and on_logits:
        raise MinitronError(
            f"distill.loss {on_logits[0]} compares all logits, and distill.top_k={config.top_k} leaves only some: "
            "leave one of them out"
        )
    if config.teacher == "recorded" and config.intermediate not in (None, "off"):
        raise MinitronError("a recorded teacher has no states between layers: set distill.intermediate=off")


def require_weights_fit(config: DistillConfig) -> None:
    if config.weights != "float32" and config.precision == "float32":
        raise MinitronError(
            f"distill.weights={config.weights} computes matrix products in bfloat16, and distill.precision=float32 "
            "asks for another format: leave one of them out"
        )
    if config.weights != "float32" and config.weights not in OPTIMIZERS[config.optimizer_name].in_bfloat16:
        others = either(name for name, row in OPTIMIZERS.items() if config.weights in row.in_bfloat16)
        raise MinitronError(
            f"distill.weights={config.weights} has no room for what distill.optimizer={config.optimizer} holds of each "
            f"weight: set distill.optimizer={others}, or leave distill.weights out"
        )


def require_correctable(config: DistillConfig, text: DataConfig) -> None:
    """Raises: MinitronError where a correction of the teacher would have no effect."""
    require_correction_fits(config)
    if config.correction is not None and text.source == TEACHER:
        raise RunError(
            f"distill.correction={config.correction} teaches the teacher a text that it has not written, and "
            f"data.source={TEACHER!r} is its own: leave distill.correction out, or give a text"
        )
