"""What a distillation is asked for, and what its settings resolve to: learning rates, batch, steps."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from minitron.core.config import Section
from minitron.core.device import Precision, settle_precision
from minitron.core.errors import MinitronError, RunError
from minitron.core.text import either
from minitron.data.config import DataConfig
from minitron.data.sources import TEACHER
from minitron.distillation.hidden_loss import Places
from minitron.distillation.losses import LOSSES, LossName, Objective
from minitron.distillation.optim import OPTIMIZERS, Optimizer, Weights
from minitron.distillation.recording import DEFAULT_TOP_K
from minitron.distillation.trackers import TrackerName
from minitron.model.architecture import Shape

# Peak learning rates as shares of the weights' root mean square.
RATE, RATE_OF_REPAIRED = 0.06, 0.03
# Tokens of the batch that they suit.
RATE_BATCH = 2048
# Of a teacher that is corrected: the peak as a share of what a plain cut would have, and the warm-up, both P2's.
SHARE_OF_CORRECTED, WARMUP_OF_CORRECTED = 0.2, 120
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


def resolve(
    config: DistillConfig,
    student: Shape,
    teacher: Shape,
    *,
    weights_rms: float,
    teacher_weights_rms: float | None = None,
    block_tokens: int,
    train_tokens: int,
    repaired: bool = False,
) -> DistillConfig:
    """Fill in what derives from the shapes, the size of the weights and the token budget.

    Args:
        weights_rms: of the student or, where it is yet to be cut, of the teacher: `Checkpoint.weights_rms`.
        teacher_weights_rms: the same of the teacher, if it is another number.

    Learning rate: Adam moves every weight by about as much a step, so what suits a student goes with the size of its
    weights. On three teachers whose weights differ by a factor of five in size, the best rates at 0.25M tokens are 4%
    to 8% of it for a plain cut and 2% to 5% for a repaired one, which has more to lose (docs/log): 6% and 3%, with
    a batch of 2048 tokens, and with a smaller one less by the square root. Never above 0.4 / hidden, which is
    the papers' 1e-4 at hidden 3072 to 4096. Batch: 0.58 tokens^0.571 tokens, the power law of Li et al. (Step Law,
    2025) for the best batch of pretraining, which fits at 0.25M tokens here; at most 9.4M tokens (P2's). The number of
    processes does not matter.

    Raises: MinitronError for a budget of less than one batch, and for settings that exclude each other.
    """
    config = resolve_without_student(
        config,
        teacher,
        teacher_weights_rms=teacher_weights_rms or weights_rms,
        block_tokens=block_tokens,
        train_tokens=train_tokens,
    )
    assert config.tokens and config.batch_blocks
    steps, batch_tokens = (
        num_steps(config.tokens, config.batch_blocks, block_tokens),
        config.batch_blocks * block_tokens,
    )
    if config.teacher == "recorded":
        config = config.model_copy(update={"top_k": min(config.top_k or DEFAULT_TOP_K, student.vocab)})
    _require_losses_fit(config)
    share = RATE_OF_REPAIRED if repaired else RATE
    rate = config.learning_rate or _usual_rate(share, student, weights_rms, batch_tokens)
    given_of_scratch = config.scratch_learning_rate or config.learning_rate
    return config.model_copy(
        update={
            "learning_rate": rate,
            "scratch_learning_rate": given_of_scratch or _usual_rate(RATE, student, math.inf, batch_tokens),
            "min_learning_rate": rate / 10 if config.min_learning_rate is None else config.min_learning_rate,
            "warmup_steps": min(max(10, steps // 50), steps // 5)
            if config.warmup_steps is None
            else config.warmup_steps,
            "intermediate": config.intermediate or ("all" if _has_states(config) else "off"),
        }
    )


def resolve_without_student(
    config: DistillConfig, teacher: Shape, *, teacher_weights_rms: float, block_tokens: int, train_tokens: int
) -> DistillConfig:
    """The part of `resolve` that no student's shape decides: all that correcting the teacher takes.

    The teacher's peak learning rate is a fifth of what `resolve` gives a plain cut of the same hidden size. P2 has a
    fifth of the peak that the teacher was pretrained with, which no checkpoint tells.
    """
    _require_weights_fit(config)
    tokens = config.tokens or train_tokens
    usual_batch = round(min(0.58 * tokens**0.571, 9.4e6) / block_tokens)
    batch = config.batch_blocks or max(1, min(usual_batch, tokens // block_tokens))
    _require_a_batch("distill.tokens", tokens, batch, block_tokens)
    steps = num_steps(tokens, batch, block_tokens)
    config = config.model_copy(
        update={
            "tokens": tokens,
            "batch_blocks": batch,
            "evaluate_steps": config.evaluate_steps or max(1, steps // 10, -(-config.evaluate_blocks // batch)),
            "checkpoint_steps": config.checkpoint_steps or max(1, steps // 10),
            "precision": settle_precision(config.precision) if config.weights == "float32" else "bfloat16",
            "optimizer": config.optimizer_name,
        }
    )
    require_correction_fits(config)
    if config.correction is None:
        return config
    own = config.correction_tokens or max(batch * block_tokens, min(tokens, train_tokens))
    _require_a_batch("distill.correction_tokens", own, batch, block_tokens)
    rate = _usual_rate(SHARE_OF_CORRECTED * RATE, teacher, teacher_weights_rms, batch * block_tokens)
    usual_warmup = min(WARMUP_OF_CORRECTED, num_steps(own, batch, block_tokens) // 5)
    given = config.correction_warmup_steps
    return config.model_copy(
        update={
            "correction_tokens": own,
            "correction_learning_rate": config.correction_learning_rate or rate,
            "correction_warmup_steps": usual_warmup if given is None else given,
        }
    )


def _usual_rate(share: float, shape: Shape, weights_rms: float, batch_tokens: int) -> float:
    slower = min(1.0, batch_tokens / RATE_BATCH) ** 0.5
    return float(f"{share / RATE * min(0.4 / shape.hidden, RATE * weights_rms) * slower:.2g}")


def _require_a_batch(key: str, tokens: int, batch: int, block_tokens: int) -> None:
    if tokens < batch * block_tokens:
        raise MinitronError(
            f"{key}={tokens:,} is less than one batch of {batch} blocks of {block_tokens:,} tokens: raise it, "
            "or lower distill.batch_blocks or data.block_tokens"
        )


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


def _has_states(config: DistillConfig) -> bool:
    return config.teacher == "online" and config.objective.needs_teacher


def _require_losses_fit(config: DistillConfig) -> None:
    on_logits = sorted(name for name in config.objective.terms if LOSSES[name].reads == "logits")
    if config.top_k is not None and on_logits:
        raise MinitronError(
            f"distill.loss {on_logits[0]} compares all logits, and distill.top_k={config.top_k} leaves only some: "
            "leave one of them out"
        )
    if config.teacher == "recorded" and config.intermediate not in (None, "off"):
        raise MinitronError("a recorded teacher has no states between layers: set distill.intermediate=off")


def _require_weights_fit(config: DistillConfig) -> None:
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


def of_scratch(config: DistillConfig) -> DistillConfig:
    """The resolved config of a training of the same shape from random weights, on text alone."""
    assert config.learning_rate and config.scratch_learning_rate and config.min_learning_rate is not None
    share = config.min_learning_rate / config.learning_rate
    rate = config.scratch_learning_rate
    return config.model_copy(
        update={
            "loss": "cross_entropy",
            "intermediate": "off",
            "correction": None,
            "correction_tokens": None,
            "correction_learning_rate": None,
            "correction_warmup_steps": None,
            "stop_at_loss": None,
            "learning_rate": rate,
            "min_learning_rate": share * rate,
        }
    )


# What the training of a teacher has in common with that of its student.
_OF_BOTH = (
    *("batch_blocks", "micro_batch_tokens", "optimizer", "weight_decay", "betas", "gradient_clip"),
    *("activation_checkpointing", "compile", "precision", "evaluate_steps", "evaluate_blocks", "checkpoint_steps"),
)


def of_correction(config: DistillConfig) -> DistillConfig:
    """The resolved config of the training of the teacher itself, on the text alone; see `resolve_without_student`."""
    assert config.correction_learning_rate is not None
    return DistillConfig(
        **{name: getattr(config, name) for name in _OF_BOTH},
        tokens=config.correction_tokens,
        loss="cross_entropy",
        learning_rate=config.correction_learning_rate,
        min_learning_rate=config.correction_learning_rate / 10,
        warmup_steps=config.correction_warmup_steps,
    )


def num_steps(tokens: int, batch_blocks: int, block_tokens: int) -> int:
    return max(1, round(tokens / (batch_blocks * block_tokens)))


def require_correctable(config: DistillConfig, text: DataConfig) -> None:
    """Raises: MinitronError where a correction of the teacher would have no effect."""
    require_correction_fits(config)
    if config.correction is not None and text.source == TEACHER:
        raise RunError(
            f"distill.correction={config.correction} teaches the teacher a text that it has not written, and "
            f"data.source={TEACHER!r} is its own: leave distill.correction out, or give a text"
        )
