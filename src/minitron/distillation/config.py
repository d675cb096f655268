"""The settings of a distillation as the user gives them, and which of them exclude each other."""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from minitron.core.config import ByteCount, Section, TokenCount
from minitron.core.device import Precision
from minitron.core.errors import MinitronError, RunError
from minitron.core.text import either
from minitron.data.config import DataConfig
from minitron.data.sources import TEACHER
from minitron.distillation.hidden_loss import Depths
from minitron.distillation.losses import LOSSES, LossName
from minitron.distillation.objective import Objective
from minitron.distillation.optim import OPTIMIZERS, Optimizer, Weights
from minitron.distillation.trackers import TrackerName

Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(gt=0)]
Memory = Annotated[ByteCount, Field(ge=1)]


class DistillConfig(Section):
    tokens: TokenCount | None = Field(default=None, ge=1)
    """Training tokens. Default: one pass over the training text."""
    minutes: float | None = Field(default=None, gt=0)
    """Length in minutes of wall time, instead of `tokens`: the tokens follow from a speed that is measured once, before
    anything else, and are kept. On a machine that has become slower since, the distillation takes longer."""
    loss: LossName | dict[LossName, Weight] = "forward_kl"
    """The loss between the student's and the teacher's logits, or a mixture with weights, such as {forward_kl: 1, mse:
    0.1}."""
    teacher: Literal["online", "recorded"] = "online"
    """Whether the teacher runs beside the student (`online`), or its logits are recorded before the training, in a pass
    with one layer in memory at a time (`recorded`): the `top_k` likeliest tokens, and the rest as one number."""
    correction: Literal["before", "parallel"] | None = None
    """Whether the teacher is trained on the same text too, by cross-entropy (P2): `before` anything is measured, cut
    and distilled from it, or in `parallel` with the student, whose start is then cut from the teacher as it was."""
    correction_tokens: TokenCount | None = Field(default=None, ge=1)
    """Tokens that the teacher is trained on. Default: those of distillation, at most one pass over the text."""
    correction_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the teacher. Default: a fifth of that of a plain cut with its hidden size."""
    correction_warmup_steps: int | None = Field(default=None, ge=0)
    """Linear warm-up of the teacher. Default: 120 steps (P2), at most a fifth of its steps."""
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    """Temperature of both models' distributions, in the losses that compare distributions."""
    jensen_shannon_beta: float = Field(default=0.5, gt=0, lt=1)
    """Share of the teacher in the mixture that jensen_shannon compares both models with."""
    top_k: int | None = Field(default=None, ge=1)
    """Compare only the teacher's likeliest tokens, and all others as one. Default: the whole vocabulary, or 64 tokens
    of a recorded teacher."""
    top_k_tail: bool = True
    """Whether the other tokens count at all; without them the likeliest are scaled up to 1, and the loss is biased."""
    intermediate: Depths | None = None
    """Depths at which hidden states are to agree too: they count twice as much as the logits at first, and nothing at
    the end. `all`: along the whole depth; `p1`: after the embedding and before the last two layers. Default: `all`, or
    `off` where no teacher runs beside the student."""
    batch_blocks: int | None = Field(default=None, ge=1)
    """Blocks per optimizer step. Default: see `resolve`."""
    fit: Literal["auto", "off"] | Memory = "auto"
    """The memory that a step may take in each process, such as 72GB: where it would take more, settings that the recipe
    leaves open are changed, once, before anything else. `auto`: nine tenths of what is free on the GPU, or on a machine
    without one; `off`: nothing is changed."""
    micro_batch_tokens: TokenCount = Field(default=4096, ge=1)
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
    """The optimizer. Default: the first of soap, soap_light and adamw whose products take at most a twentieth of
    the operations of a step's passes, or adamw for weights in bfloat16."""
    weight_decay: float = Field(default=0.1, ge=0, le=100)
    """Decoupled weight decay on matrices; vectors have none."""
    betas: tuple[Share, Share] = Field(default=(0.9, 0.95), strict=False)
    """Decays of Adam's moments."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    activation_checkpointing: bool = False
    """Keep only the hidden states for the backward pass, and compute the rest again, which takes a third more time."""
    compile: bool | None = None
    """Compile the layers of both models and the loss with torch.compile: up to a minute at the start, and shorter
    steps. Default: on a CPU with a C++ compiler, where the training is long enough to win the minute back."""
    weights: Weights = "float32"
    """Format of the student's weights in training: with gradient and optimizer a parameter takes 16 bytes in float32,
    10 in bfloat16 with Kahan summation and 8 with stochastic rounding, both with matrix products in bfloat16."""
    precision: Precision = "auto"
    """Format of matrix products; logits are float32 in any case."""
    evaluate_steps: int | None = Field(default=None, ge=1)
    """Steps between held-out evaluations. Default: a tenth of the steps, or more where evaluations would read over a
    quarter as many blocks as the training."""
    evaluate_blocks: int | None = Field(default=None, ge=1)
    """Held-out blocks of the periodic evaluation. Default: as many as hold 32,768 tokens, at most 64."""
    stop_at_loss: float | None = Field(default=None, gt=0)
    """End when the held-out loss has come down to this at an evaluation. With the default loss it is a KL in nats."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """Steps between resumable checkpoints. Default: a tenth of the steps."""
    checkpoint_minutes: float = Field(default=30.0, gt=0)
    """Most minutes between resumable checkpoints, at the end of a step. A training that is resumed may change them."""
    log_to: list[TrackerName] = Field(default=[])
    """Trackers that get the rows of metrics.jsonl too: tensorboard, wandb, trackio. A training that is resumed may
    change them."""

    @property
    def for_record(self) -> dict[str, object]:
        """The settings that a record holds: all but those that change nothing of the student, as trackers do."""
        return self.model_dump(mode="json", exclude={"log_to", "checkpoint_minutes", "fit"})

    @property
    def optimizer_name(self) -> Optimizer:
        """The name of the optimizer: the one that was chosen, or, before `resolve`, the largest that it may choose."""
        return self.optimizer or ("soap" if self.weights == "float32" else "adamw")

    @property
    def objective(self) -> Objective:
        terms: Mapping[str, float] = {self.loss: 1.0} if isinstance(self.loss, str) else self.loss
        return Objective(
            terms, self.temperature, self.jensen_shannon_beta, self.top_k, self.top_k_tail, bool(self.compile)
        )


def require_correction_fits(config: DistillConfig) -> None:
    """Refuse a correction of the teacher that the other settings leave without effect.

    Raises: MinitronError.
    """
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
        raise MinitronError("a recorded teacher has no hidden states: set distill.intermediate=off")


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
    """Refuse a correction of the teacher that the other settings, or the text, leave without effect.

    Raises: MinitronError.
    """
    require_correction_fits(config)
    if config.correction is not None and text.source == TEACHER:
        raise RunError(
            f"distill.correction={config.correction} teaches the teacher a text that it has not written, and "
            f"data.source={TEACHER!r} is its own: leave distill.correction out, or give a text"
        )
