"""The schedule of a training: its batch, its steps and its learning rates, resolved from settings, models and text."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from minitron.core.device import pick_device, settle_precision
from minitron.core.errors import MinitronError
from minitron.core.machine import has_compiler
from minitron.distillation.config import (
    DistillConfig,
    has_states,
    require_correction_fits,
    require_losses_fit,
    require_weights_fit,
)
from minitron.distillation.optim import OPTIMIZERS, Optimizer, Weights
from minitron.distillation.recording import DEFAULT_TOP_K
from minitron.model.architecture import Shape

# Peak learning rates as shares of the weights' root mean square.
RATE, RATE_OF_REPAIRED = 0.06, 0.03
# Tokens of the batch that these rates suit.
RATE_BATCH = 2048
# The optimizers that a training takes by default, by what they reach with the same tokens.
USUAL_OPTIMIZERS = ("soap", "soap_light", "adamw")
# The optimizer's products may take this share of a step's passes at most, or SOAP costs more time than it saves.
MOST_OF_PASSES = 0.05
# A batch holds at least so many tokens, but leaves so many steps: smaller ones cost more time than they save tokens.
LEAST_BATCH, LEAST_STEPS = 2048, 75
# The operations of a training's passes from which on it is compiled on a CPU. They take two cores about 20 minutes, in
# which steps that are a tenth shorter win back several times what compiling takes.
COMPILED_FROM = 4e14
# A periodic evaluation: its most blocks, its usual tokens, and the blocks that are trained on for each of its blocks.
EVALUATED_BLOCKS, EVALUATED_TOKENS, TRAINED_PER_EVALUATED = 64, 1 << 15, 4
# The peak of a teacher that is corrected, as a share of a plain cut's, and its warm-up, both as in P2.
SHARE_OF_CORRECTED, WARMUP_OF_CORRECTED = 0.2, 120


@dataclass(frozen=True)
class ModelSize:
    """The size of a model, from which learning rates follow.

    weights_rms: the root mean square of its weights, see `Checkpoint.weights_rms`.
    """

    shape: Shape
    weights_rms: float


@dataclass(frozen=True)
class Rates:
    """The learning rates of a training: a linear warm-up to the peak, then a cosine down to the minimum."""

    steps: int
    peak: float
    minimum: float
    warmup_steps: int

    def at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        fall = (1 + math.cos(math.pi * progress)) / 2
        return self.minimum + (self.peak - self.minimum) * fall


@dataclass(frozen=True)
class Schedule:
    """A schedule holds every number of a training.

    config: the resolved settings, from which the numbers are taken; records of the training hold them.
    seed: decides the order of the blocks, the noise of rounding, and the first weights of a student from scratch.
    teacher_rates: the rates of a teacher that is corrected in parallel; None for one that only teaches.
    initialize: the student starts from the weights of its checkpoint, or from random ones of the same shape.
    rate_key: the key of the recipe that sets the peak, for the message of a training that diverges.
    """

    config: DistillConfig
    seed: int
    block_tokens: int
    batch_blocks: int
    evaluate_steps: int
    checkpoint_steps: int
    rates: Rates
    teacher_rates: Rates | None = None
    initialize: Literal["weights", "random"] = "weights"
    rate_key: str = "distill.learning_rate"

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return self.rates.steps

    @property
    def step_tokens(self) -> int:
        """The tokens of one optimizer step."""
        return self.batch_blocks * self.block_tokens

    @classmethod
    def of_student(cls, config: DistillConfig, block_tokens: int, seed: int) -> "Schedule":
        """Make the schedule of a distillation whose settings are resolved."""
        schedule = cls._of(config, block_tokens, seed)
        if config.correction != "parallel":
            return schedule
        return replace(schedule, teacher_rates=_rates(of_correction(config), block_tokens))

    @classmethod
    def of_scratch(cls, config: DistillConfig, block_tokens: int, seed: int) -> "Schedule":
        """Make the schedule of the baseline, a model of the student's shape that starts from random weights."""
        schedule = cls._of(of_scratch(config), block_tokens, seed)
        return replace(schedule, initialize="random", rate_key="distill.scratch_learning_rate")

    @classmethod
    def of_correction(cls, config: DistillConfig, block_tokens: int, seed: int) -> "Schedule":
        """Make the schedule of a teacher that is corrected before it teaches."""
        schedule = cls._of(of_correction(config), block_tokens, seed)
        return replace(schedule, rate_key="distill.correction_learning_rate")

    @classmethod
    def _of(cls, config: DistillConfig, block_tokens: int, seed: int) -> "Schedule":
        assert config.batch_blocks and config.evaluate_steps and config.checkpoint_steps
        return cls(
            config,
            seed,
            block_tokens,
            config.batch_blocks,
            config.evaluate_steps,
            config.checkpoint_steps,
            _rates(config, block_tokens),
        )


def _rates(config: DistillConfig, block_tokens: int) -> Rates:
    assert config.tokens and config.batch_blocks and config.learning_rate
    assert config.min_learning_rate is not None and config.warmup_steps is not None
    steps = num_steps(config.tokens, config.batch_blocks, block_tokens)
    return Rates(steps, config.learning_rate, config.min_learning_rate, config.warmup_steps)


def resolve(
    config: DistillConfig,
    student: ModelSize,
    teacher: ModelSize,
    *,
    block_tokens: int,
    train_tokens: int,
    repaired: bool = False,
) -> DistillConfig:
    """Fill in the settings that follow from the shapes, the size of the weights and the number of tokens.

    Args:
        student: where it is yet to be cut, its shape with the teacher's `weights_rms`.
        train_tokens: the length of the training text.
        repaired: whether the student was repaired as it was cut.

    Learning rate: Adam moves every weight by about as much a step, so what suits a student goes with the size of its
    weights. On three teachers whose weights differ by a factor of five in size, the best rates at 0.25M tokens are 4%
    to 8% of it for a plain cut and 2% to 5% for a repaired one, which has more to lose (docs/log): 6% and 3%, with
    a batch of 2048 tokens, and with a smaller one less by the square root. Never above 0.4 / hidden, which is
    the papers' 1e-4 at hidden 3072 to 4096. Batch: 0.58 tokens^0.571 tokens, the power law of Li et al. (Step Law,
    2025) for the best batch of pretraining, at most 9.4M tokens (P2's); but at least 2048 tokens where these leave 75
    steps, else a 75th of the tokens, which is best after the same time (docs/log). The number of processes does not
    matter. Optimizer: see `usual_optimizer`. Compiled: on a CPU with a compiler, from COMPILED_FROM operations on.

    Raises: MinitronError for a budget of less than one batch, and for settings that exclude each other.
    """
    given, compiled = config.optimizer, config.compile
    config = resolve_without_student(config, teacher, block_tokens=block_tokens, train_tokens=train_tokens)
    assert config.tokens and config.batch_blocks
    tokens = config.tokens
    steps = num_steps(tokens, config.batch_blocks, block_tokens)
    batch_tokens = config.batch_blocks * block_tokens
    if config.teacher == "recorded":
        config = config.model_copy(update={"top_k": min(config.top_k or DEFAULT_TOP_K, student.shape.vocab)})
    require_losses_fit(config)
    share = RATE_OF_REPAIRED if repaired else RATE
    rate = config.learning_rate or _usual_rate(share, student, batch_tokens)
    usual_warmup = min(max(10, steps // 50), steps // 5)
    random = ModelSize(student.shape, math.inf)  # the papers' bound alone decides
    given_of_scratch = config.scratch_learning_rate or config.learning_rate
    return config.model_copy(
        update={
            "optimizer": given or usual_optimizer(config.weights, student.shape, batch_tokens, teacher.shape),
            "compile": _is_compiled(tokens, student.shape, teacher.shape) if compiled is None else compiled,
            "learning_rate": rate,
            "scratch_learning_rate": given_of_scratch or _usual_rate(RATE, random, batch_tokens),
            "min_learning_rate": rate / 10 if config.min_learning_rate is None else config.min_learning_rate,
            "warmup_steps": usual_warmup if config.warmup_steps is None else config.warmup_steps,
            "intermediate": config.intermediate or ("all" if has_states(config) else "off"),
        }
    )


def resolve_without_student(
    config: DistillConfig, teacher: ModelSize, *, block_tokens: int, train_tokens: int
) -> DistillConfig:
    """Fill in the part of `resolve` that no student's shape decides, which is all that a teacher's correction takes.

    The teacher's peak learning rate is a fifth of what `resolve` gives a plain cut of the same hidden size. P2 has a
    fifth of the peak that the teacher was pretrained with, which no checkpoint tells.
    """
    require_weights_fit(config)
    tokens = config.tokens or train_tokens
    usual_batch = round(max(min(0.58 * tokens**0.571, 9.4e6), min(LEAST_BATCH, tokens / LEAST_STEPS)) / block_tokens)
    batch = config.batch_blocks or max(1, min(usual_batch, tokens // block_tokens))
    evaluated = config.evaluate_blocks or usual_evaluate_blocks(block_tokens)
    _require_a_batch("distill.tokens", tokens, batch, block_tokens)
    steps = num_steps(tokens, batch, block_tokens)
    usual_evaluate_steps = max(1, steps // 10, -(-TRAINED_PER_EVALUATED * evaluated // batch))
    config = config.model_copy(
        update={
            "tokens": tokens,
            "batch_blocks": batch,
            "evaluate_steps": config.evaluate_steps or usual_evaluate_steps,
            "evaluate_blocks": evaluated,
            "checkpoint_steps": config.checkpoint_steps or max(1, steps // 10),
            "precision": settle_precision(config.precision) if config.weights == "float32" else "bfloat16",
            "optimizer": config.optimizer or usual_optimizer(config.weights, teacher.shape, batch * block_tokens),
            "compile": _is_compiled(tokens, teacher.shape) if config.compile is None else config.compile,
        }
    )
    require_correction_fits(config)
    if config.correction is None:
        return config
    own = config.correction_tokens or max(batch * block_tokens, min(tokens, train_tokens))
    _require_a_batch("distill.correction_tokens", own, batch, block_tokens)
    rate = _usual_rate(SHARE_OF_CORRECTED * RATE, teacher, batch * block_tokens)
    usual_warmup = min(WARMUP_OF_CORRECTED, num_steps(own, batch, block_tokens) // 5)
    given = config.correction_warmup_steps
    return config.model_copy(
        update={
            "correction_tokens": own,
            "correction_learning_rate": config.correction_learning_rate or rate,
            "correction_warmup_steps": usual_warmup if given is None else given,
        }
    )


def usual_evaluate_blocks(block_tokens: int) -> int:
    """Return the default number of held-out blocks of a periodic evaluation."""
    return max(1, min(EVALUATED_BLOCKS, EVALUATED_TOKENS // block_tokens))


def usual_optimizer(weights: Weights, trained: Shape, batch_tokens: int, teacher: Shape | None = None) -> Optimizer:
    """Return the optimizer of a training whose recipe names none.

    It is the first of USUAL_OPTIMIZERS whose products take at most MOST_OF_PASSES of those of a step's passes. An
    update costs the same whatever the batch, and what it saves in tokens must pay for it.
    """
    if weights != "float32":
        return "adamw"
    passes = _passes(batch_tokens, trained, teacher)
    for name in USUAL_OPTIMIZERS:
        if trained.layers * sum(map(OPTIMIZERS[name].flops, _matrices(trained))) <= MOST_OF_PASSES * passes:
            return name
    raise AssertionError("AdamW has no products")


def _is_compiled(tokens: int, trained: Shape, teacher: Shape | None = None) -> bool:
    """Return whether a training is compiled whose recipe leaves that open; on a GPU that was not tried yet."""
    return pick_device().type == "cpu" and has_compiler() and _passes(tokens, trained, teacher) >= COMPILED_FROM


def _passes(tokens: int, trained: Shape, teacher: Shape | None) -> int:
    """Return the operations of the passes: three of the model that is trained, and one of its teacher."""
    return 2 * tokens * (3 * _multiplied(trained) + (_multiplied(teacher) if teacher else 0))


def _multiplied(shape: Shape) -> int:
    """Return the number of weights that a token is multiplied by."""
    return shape.layers * sum(map(math.prod, _matrices(shape))) + shape.hidden * shape.vocab


def _matrices(shape: Shape) -> list[tuple[int, int]]:
    """Return the matrices of a layer, with a gated FFN; that of others has one less, which changes no share much."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return [(queries, shape.hidden), (keys, shape.hidden)] * 2 + [(shape.ffn, shape.hidden)] * 3


def _usual_rate(share: float, model: ModelSize, batch_tokens: int) -> float:
    slower = min(1.0, batch_tokens / RATE_BATCH) ** 0.5
    return float(f"{share / RATE * min(0.4 / model.shape.hidden, RATE * model.weights_rms) * slower:.2g}")


def _require_a_batch(key: str, tokens: int, batch: int, block_tokens: int) -> None:
    if tokens < batch * block_tokens:
        raise MinitronError(
            f"{key}={tokens:,} is less than one batch of {batch} blocks of {block_tokens:,} tokens: raise it, "
            "or lower distill.batch_blocks or data.block_tokens"
        )


def of_scratch(config: DistillConfig) -> DistillConfig:
    """Return the resolved settings of a training of the same shape from random weights, on text alone."""
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


# The settings that the training of a teacher shares with that of its student.
_OF_BOTH = (
    *("batch_blocks", "micro_batch_tokens", "optimizer", "weight_decay", "betas", "gradient_clip"),
    *("activation_checkpointing", "compile", "precision", "evaluate_steps", "evaluate_blocks", "checkpoint_steps"),
    "checkpoint_minutes",
)


def of_correction(config: DistillConfig) -> DistillConfig:
    """Return the resolved settings of the training of the teacher itself, on the text alone."""
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
    """Return the number of optimizer steps that read about so many tokens."""
    return max(1, round(tokens / (batch_blocks * block_tokens)))
