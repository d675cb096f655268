"""One training loop, top to bottom: a student learns from a teacher's logits, and resumes bit for bit."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field

from minitron import parallel
from minitron.config import Section
from minitron.data import Blocks, Corpus, batch_rows, next_rows
from minitron.device import Precision, compute_dtype, pick_device, settle_precision
from minitron.distill.intermediate import DEEP_CUT, IntermediateLoss, default_pairs
from minitron.distill.lessons import DEFAULT_TOP_K, RecordedTeacher
from minitron.distill.losses import ON_LOGITS, LossName, Objective
from minitron.distill.optimizer import Weights, hold_weights, make_optimizer
from minitron.distill.pupil import Pupil
from minitron.distill.state import States
from minitron.distill.teacher import OnlineTeacher, Teacher
from minitron.distill.trackers import Row, TrackerName, tracked
from minitron.errors import Interrupted, MinitronError
from minitron.model.architecture import Shape
from minitron.model.checkpoint import Checkpoint, load_model, open_checkpoint, write_checkpoint
from minitron.packing import Batch

# Peak learning rates as shares of the weights' root mean square.
RATE, RATE_OF_REPAIRED = 0.04, 0.02
EVALUATION_BLOCKS = 8  # in one forward pass
Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(gt=0)]


class DistillConfig(Section):
    tokens: int | None = Field(default=None, ge=1)
    """Training tokens. Default: one pass over the training text."""
    loss: LossName | dict[LossName, Weight] = "forward_kl"
    """What the student learns from the teacher's logits, or a mixture with weights, such as {forward_kl: 1, mse: 0.1}.
    Forward KL alone is the papers' choice; cross_entropy looks at the text only."""
    teacher: Literal["online", "recorded"] = "online"
    """Whether the teacher runs beside the student, or says everything before, in a pass with one layer in memory at a
    time, and is then gone; what is recorded is its `top_k` likeliest tokens and the rest."""
    temperature: float = Field(default=1.0, gt=0)
    """Of both models' distributions in forward_kl, reverse_kl and jensen_shannon."""
    jensen_shannon_beta: float = Field(default=0.5, gt=0, lt=1)
    """Share of the teacher in the mixture that jensen_shannon compares both with."""
    top_k: int | None = Field(default=None, ge=1)
    """Compare only the teacher's likeliest tokens, and all others as one. Default: the whole vocabulary, or 64 of a
    recorded teacher."""
    top_k_tail: bool = True
    """Whether the others count at all; without them the likeliest are scaled up to 1, and the loss is biased."""
    intermediate: bool | None = None
    """Whether states between layers are to agree too: the embedding's and those of the last layer but two, at a weight
    that makes them count as much as the logits. Default: where two thirds of the layers or fewer stay (P1)."""
    batch_blocks: int | None = Field(default=None, ge=1)
    """Blocks per optimizer step. Default: see `resolve`."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Tokens per forward and backward; changes memory, not the result beyond rounding."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate. Default: 4% of the weights' size, half of it for a repaired cut; more in `resolve`."""
    scratch_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the same shape from random weights. Default: 0.4 / hidden, or `learning_rate` if given."""
    min_learning_rate: float | None = Field(default=None, ge=0)
    """Learning rate at the end of the cosine. Default: a tenth of the peak."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Linear warm-up. Default: 2% of the steps, at least 10 and at most a fifth."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay on matrices; vectors have none."""
    betas: tuple[Share, Share] = Field(default=(0.9, 0.95), strict=False)
    """AdamW's moment decays."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    activation_checkpointing: bool = False
    """Keep only the states between layers for the backward pass, and compute the rest again: a third more time."""
    compile: bool = False
    """Compile each layer with torch.compile, which pays on a GPU."""
    weights: Weights = "float32"
    """Of the student and its optimizer in training: 16 bytes a parameter in float32, gradient included; 10 in bfloat16
    with Kahan summation, 8 with stochastic rounding, both with matrix products in bfloat16."""
    precision: Precision = "auto"
    """Matrix products; logits are float32 in any case."""
    evaluate_steps: int | None = Field(default=None, ge=1)
    """Steps between held-out evaluations. Default: a tenth of the steps."""
    evaluate_blocks: int = Field(default=64, ge=1)
    """Held-out blocks of the periodic evaluation."""
    stop_at_loss: float | None = Field(default=None, gt=0)
    """End when the held-out loss has come down to this at an evaluation. With the default loss it is a KL in nats."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """Steps between resumable checkpoints. Default: a tenth of the steps."""
    log_to: list[TrackerName] = Field(default=[])
    """Where the rows of metrics.jsonl go too: tensorboard, wandb, trackio. A training that goes on may change it."""

    @property
    def of_record(self) -> dict[str, Any]:
        """What a training is; what only watches it is no part of that."""
        return self.model_dump(mode="json", exclude={"log_to"})

    @property
    def objective(self) -> Objective:
        terms: Mapping[LossName, float] = {self.loss: 1.0} if isinstance(self.loss, str) else self.loss
        return Objective(terms, self.temperature, self.jensen_shannon_beta, self.top_k, self.top_k_tail)


def resolve(
    config: DistillConfig,
    student: Shape,
    teacher: Shape,
    *,
    weights_rms: float,
    block_tokens: int,
    train_tokens: int,
    repaired: bool = False,
) -> DistillConfig:
    """Fill in what derives from the shapes, the size of the weights and the token budget.

    Args:
        weights_rms: of the student or, where it is yet to be cut, of the teacher: `Checkpoint.weights_rms`.

    Learning rate: Adam moves every weight by about as much a step, so what suits a student goes with the size of its
    weights. On three teachers whose weights differ by a factor of five in size, the best rates at 0.25M to 1M tokens
    are 2.6% to 6% of it for a plain cut and 2% to 3% for a repaired one, which has more to lose (docs/LOG.md): 4% and
    2%. Never above 0.4 / hidden, which is the papers' 1e-4 at hidden 3072 to 4096. Batch: a budget is worth about 600
    steps (P1 ranks candidates after 400), each of at least 2048 and at most 9.4M tokens (P2's batch).

    Raises: MinitronError for a budget of less than one batch, and for settings that exclude each other.
    """
    tokens = config.tokens or train_tokens
    usual_batch = round(min(max(tokens / 600, 2048), 9.4e6) / block_tokens)
    batch = config.batch_blocks or max(1, min(usual_batch, tokens // block_tokens))
    if tokens < batch * block_tokens:
        raise MinitronError(
            f"distill.tokens={tokens:,} is less than one batch of {batch} blocks of {block_tokens:,} tokens: raise it, "
            "or lower distill.batch_blocks or data.block_tokens"
        )
    if config.teacher == "recorded":
        config = config.model_copy(update={"top_k": min(config.top_k or DEFAULT_TOP_K, student.vocab)})
    _require_losses_fit(config)
    _require_weights_fit(config)
    steps = num_steps(tokens, batch, block_tokens)
    most, share = 0.4 / student.hidden, RATE_OF_REPAIRED if repaired else RATE
    rate = config.learning_rate or float(f"{share / RATE * min(most, RATE * weights_rms):.2g}")
    return config.model_copy(
        update={
            "tokens": tokens,
            "batch_blocks": batch,
            "learning_rate": rate,
            "scratch_learning_rate": config.scratch_learning_rate or config.learning_rate or float(f"{most:.2g}"),
            "min_learning_rate": rate / 10 if config.min_learning_rate is None else config.min_learning_rate,
            "warmup_steps": min(max(10, steps // 50), steps // 5)
            if config.warmup_steps is None
            else config.warmup_steps,
            "evaluate_steps": config.evaluate_steps or max(1, steps // 10),
            "checkpoint_steps": config.checkpoint_steps or max(1, steps // 10),
            "precision": settle_precision(config.precision) if config.weights == "float32" else "bfloat16",
            "intermediate": _deep_cut(config, student, teacher) if config.intermediate is None else config.intermediate,
        }
    )


def _deep_cut(config: DistillConfig, student: Shape, teacher: Shape) -> bool:
    has_states = config.teacher == "online" and config.objective.needs_teacher
    return has_states and student.layers <= DEEP_CUT * teacher.layers


def _require_losses_fit(config: DistillConfig) -> None:
    on_logits = sorted(config.objective.terms.keys() & ON_LOGITS.keys())
    if config.top_k is not None and on_logits:
        raise MinitronError(
            f"distill.loss {on_logits[0]} compares all logits, and distill.top_k={config.top_k} leaves only some: "
            "leave one of them out"
        )
    if config.teacher == "recorded" and config.intermediate:
        raise MinitronError("a recorded teacher has no states between layers: leave distill.intermediate out")


def _require_weights_fit(config: DistillConfig) -> None:
    if config.weights != "float32" and config.precision == "float32":
        raise MinitronError(
            f"distill.weights={config.weights} computes matrix products in bfloat16, and distill.precision=float32 "
            "asks for another format: leave one of them out"
        )


def of_scratch(config: DistillConfig) -> DistillConfig:
    """The resolved config of a training of the same shape from random weights, on text alone."""
    assert config.learning_rate and config.scratch_learning_rate and config.min_learning_rate is not None
    share = config.min_learning_rate / config.learning_rate
    rate = config.scratch_learning_rate
    return config.model_copy(
        update={
            "loss": "cross_entropy",
            "intermediate": False,
            "stop_at_loss": None,
            "learning_rate": rate,
            "min_learning_rate": share * rate,
        }
    )


def num_steps(tokens: int, batch_blocks: int, block_tokens: int) -> int:
    return max(1, round(tokens / (batch_blocks * block_tokens)))


@dataclass(frozen=True)
class Trained:
    steps: int
    tokens: int
    seconds: float  # of this process; a resumed run did more


def distill(
    student: Path,
    teacher: Path | None,
    corpus: Corpus,
    config: DistillConfig,
    *,
    seed: int,
    work: Path,
    out: Path,
    initialize: Literal["weights", "random"] = "weights",
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    warn: Callable[[str], None] = warnings.warn,
) -> Trained:
    """Train the student and write it to the existing directory `out` in the dtypes of its checkpoint.

    Args:
        teacher: a checkpoint, or where `config.teacher` is `recorded` its lessons, see `minitron.distill.lessons`.
        config: resolved (see `resolve`).
        work: metrics.jsonl, what trackers keep, and resumable state; a second call with the same arguments goes on from
            there, and ends with the weights that one undisturbed call would have made.
        initialize: `random` draws fresh weights of the student's shape from `seed`, the from-scratch baseline.
        warn: told of each state in `work` that is damaged, and from which step training goes on instead.

    A second call with another batch reads on behind the blocks that were read: within a pass none is left out or read
    twice. Its step is the step of the new batch that is nearest to the tokens seen, and from there on the schedule is
    the new one. So is that of another number of tokens; one that is already reached leaves the student as it is.

    Raises: Interrupted after SIGINT or SIGTERM, with the state saved; RunError if the state is of another student or
        block length, or cannot be written, with the one before still there.

    Paper: P1 and P2, "Retraining"; logits only, as where depth is kept.
    """
    options: dict[str, Any] = {"initialize": initialize, "progress": progress, "warn": warn}
    made = _train(student, teacher, corpus, config, seed=seed, work=work, **options)
    save_student(made.pupil.model, made.checkpoint, out)
    return Trained(made.step, made.tokens, made.seconds)


def distill_until(
    step: int,
    judge: Blocks,
    student: Path,
    teacher: Path,
    corpus: Corpus,
    config: DistillConfig,
    *,
    seed: int,
    work: Path,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    warn: Callable[[str], None] = warnings.warn,
) -> float:
    """The first `step` steps of what `distill` with the same arguments does, with the state left in `work`.

    `distill`, or a further call, goes on from there under the same schedule, and ends with the bits of one undisturbed
    run. 0 steps leave the student as it is.

    Returns the mean training loss per predicted token over the blocks `judge`, in nats.

    Raises: Interrupted after SIGINT or SIGTERM, with the state saved.
    """
    made = _train(student, teacher, corpus, config, seed=seed, work=work, progress=progress, warn=warn, until=step)
    assert made.step == step, f"{work} holds step {made.step}, which is beyond step {step}"
    return mean_loss(made.pupil, made.teacher, judge)


@dataclass(frozen=True)
class _Made:
    """A model in training after some step."""

    pupil: Pupil
    teacher: Teacher | None
    checkpoint: Checkpoint
    step: int
    tokens: int
    seconds: float  # of this process


def _train(
    student: Path,
    teacher: Path | None,
    corpus: Corpus,
    config: DistillConfig,
    *,
    seed: int,
    work: Path,
    initialize: Literal["weights", "random"] = "weights",
    progress: Callable[[int, int, str], None],
    warn: Callable[[str], None],
    until: int | None = None,
) -> _Made:
    """The loop. `until`: stop after this step with the state saved; the schedule is that of all steps.

    Trackers see a training that goes to its end, and with it the steps up to an `until` before.
    """
    assert config.tokens and config.batch_blocks and config.evaluate_steps and config.checkpoint_steps
    here = parallel.joined()
    if config.batch_blocks % here.size:
        raise MinitronError(
            f"distill.batch_blocks={config.batch_blocks} cannot be divided among {here.size} processes: "
            "choose a multiple of their number"
        )
    device = pick_device()
    dtype = compute_dtype(config.precision, device)
    checkpoint = open_checkpoint(student)
    guide = None if teacher is None else _teacher(teacher, checkpoint, config, dtype, device)
    pupil = _pupil(checkpoint, teacher, config, initialize, seed, dtype)
    parallel.shard(pupil, pupil.layers(checkpoint), dtype, device)
    pupil.to(device).train()
    optimizer = make_optimizer(
        pupil.parameters(), config.weights, betas=config.betas, weight_decay=config.weight_decay, seed=seed
    )
    steps = num_steps(config.tokens, config.batch_blocks, corpus.block_tokens)
    states = States(work, pupil, optimizer, config.batch_blocks, corpus.block_tokens, warn)
    step, seen_tokens = states.resume()
    end = steps if until is None else min(until, steps)
    blocks, heldout = corpus.train, corpus.heldout.head(config.evaluate_blocks)
    start, first = time.monotonic(), step

    def reached(heldout_loss: float) -> bool:
        return config.stop_at_loss is not None and heldout_loss <= config.stop_at_loss

    if step > 0 and config.stop_at_loss is not None and reached(mean_loss(pupil, guide, heldout)):
        end = step  # where the run before ended

    def log(row: Row) -> None:
        states.log(row)
        track(row)

    trackers = config.log_to if until is None else []
    with (
        tracked(trackers, work, states.rows(), config.of_record) as track,
        graceful_stop() as stop,
        parallel.computing_together(),
    ):
        while step < end:
            rate = learning_rate(step, steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            drawn = seen_tokens // corpus.block_tokens
            rows = next_rows(len(blocks), seed=seed, drawn=drawn, count=config.batch_blocks)
            batch = Batch(torch.from_numpy(blocks.select(rows)).to(device), blocks.separator)
            num_predicted, loss = batch.num_predicted, torch.zeros((), dtype=torch.float64)
            own = Batch(batch.tokens[here.rank :: here.size], batch.separator)
            for number, micro in enumerate(own.split(max(1, config.micro_batch_tokens // corpus.block_tokens))):
                lesson = None if guide is None else guide(micro)
                if drawn == number == 0 and lesson is not None:
                    pupil.fit_maps(micro, lesson)
                minimised, objective = pupil(micro, lesson)
                (minimised / num_predicted).backward()
                loss += objective.item() / num_predicted
            parallel.all_reduce_sum(loss)
            norm = parallel.whole(torch.nn.utils.clip_grad_norm_(pupil.parameters(), config.gradient_clip)).item()
            if not loss.isfinite() or not math.isfinite(norm):
                raise MinitronError(
                    f"training diverged at step {step + 1}: loss {loss:g}, gradient norm {norm}, on training blocks "
                    f"{', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}; the last good state is kept: "
                    f"lower distill.learning_rate (now {config.learning_rate})"
                )
            optimizer.step()
            optimizer.zero_grad()
            step, seen_tokens = step + 1, seen_tokens + batch.tokens.numel()
            log(
                {
                    "step": step,
                    "tokens": seen_tokens,
                    "loss": loss.item(),
                    "learning_rate": rate,
                    "grad_norm": norm,
                }
            )
            if step % config.evaluate_steps == 0 or step == steps:
                heldout_loss = mean_loss(pupil, guide, heldout)
                log({"step": step, "tokens": seen_tokens, "heldout_loss": heldout_loss})
                if reached(heldout_loss):
                    end = step
            last = step == end
            stopping = parallel.any_of(stop.requested)
            if last or stopping or step % config.checkpoint_steps == 0:
                states.save(step, seen_tokens)
            if stopping and not last:
                raise Interrupted(
                    f"stopped at step {step} of {steps}; the state is saved, run the same command to go on"
                )
            speed = (step - first) * batch.tokens.numel() / (time.monotonic() - start)
            progress(step, steps, f"loss {loss.item():.3f}, {speed:,.0f} tokens/s")
    return _Made(pupil, guide, checkpoint, step, seen_tokens, time.monotonic() - start)


def learning_rate(step: int, steps: int, config: DistillConfig) -> float:
    """Linear warm-up, then a cosine from the peak to the minimum; `step` counts from 0."""
    assert config.learning_rate is not None and config.min_learning_rate is not None and config.warmup_steps is not None
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    fall = (1 + math.cos(math.pi * progress)) / 2
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * fall


def blocks_read(corpus: Corpus, config: DistillConfig, seed: int) -> Int[np.ndarray, "blocks tokens"]:
    """The blocks that `distill` with the same arguments reads, for training and for its evaluations."""
    assert config.tokens and config.batch_blocks
    steps = num_steps(config.tokens, config.batch_blocks, corpus.block_tokens)
    drawn = min(steps, -(-len(corpus.train) // config.batch_blocks))  # by then every block was
    batches = [batch_rows(len(corpus.train), seed=seed, step=step, batch=config.batch_blocks) for step in range(drawn)]
    rows = np.unique(np.concatenate(batches))
    heldout = corpus.heldout.head(config.evaluate_blocks)
    return np.concatenate([corpus.train.select(rows), heldout.select(slice(None))])


def save_student(model: Any, checkpoint: Checkpoint, out: Path) -> None:
    """Write a trained model in the dtypes of the checkpoint it started from; the first of several processes does."""
    state = model.state_dict()
    pieces = (
        parallel.whole(state[spec.name]).to("cpu", checkpoint.stored[spec.name].dtype) for spec in checkpoint.specs()
    )
    if parallel.joined().rank > 0:
        for _ in pieces:
            pass
        return
    write_checkpoint(
        out,
        config=checkpoint.config,
        tensors={
            spec.name: (checkpoint.stored[spec.name].dtype, spec.shape(checkpoint.shape)) for spec in checkpoint.specs()
        },
        pieces=pieces,
        carry_from=checkpoint.path,
    )


@torch.no_grad()
def mean_loss(pupil: Pupil, teacher: Teacher | None, blocks: Blocks) -> float:
    """The objective's mean per predicted token, in nats where it is a divergence or the cross-entropy."""
    device, here = next(pupil.parameters()).device, parallel.joined()
    pupil.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # losses, tokens
    for start in range(0, len(blocks), EVALUATION_BLOCKS * here.size):
        own = start + here.rank * EVALUATION_BLOCKS
        # The processes go in step: one that has nothing left runs a block that does not count.
        rows = slice(own, own + EVALUATION_BLOCKS) if own < len(blocks) else slice(0, 1)
        batch = Batch(torch.from_numpy(blocks.select(rows)).to(device), blocks.separator)
        loss = pupil(batch, None if teacher is None else teacher(batch))[1].item()
        if own < len(blocks):
            sums += torch.tensor([loss, batch.num_predicted])
    parallel.all_reduce_sum(sums)
    pupil.train()
    return (sums[0] / sums[1]).item()


@dataclass
class StopRequest:
    requested: bool = False


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Inside, a first SIGINT or SIGTERM only asks to stop; a second one acts as usual."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: Any) -> None:
        request.requested = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _teacher(
    path: Path, student: Checkpoint, config: DistillConfig, dtype: torch.dtype, device: torch.device
) -> Teacher | None:
    if not config.objective.needs_teacher:
        return None
    if config.teacher == "recorded":
        return _recorded(path, student, config, device)
    return OnlineTeacher(path, student, dtype, device, states=bool(config.intermediate))


def _recorded(path: Path, student: Checkpoint, config: DistillConfig, device: torch.device) -> Teacher:
    recorded = RecordedTeacher(path, device)
    facts = {"vocab": student.shape.vocab, "temperature": config.temperature, "top_k": config.top_k}
    for name, wanted in facts.items():
        if recorded.facts[name] != wanted:
            raise MinitronError(
                f"the lessons in {path} have {name} {recorded.facts[name]}, and {wanted} is wanted: write them again"
            )
    return recorded


def _pupil(
    checkpoint: Checkpoint,
    teacher: Path | None,
    config: DistillConfig,
    initialize: Literal["weights", "random"],
    seed: int,
    dtype: torch.dtype,
) -> Pupil:
    architecture, shape = checkpoint.architecture, checkpoint.shape
    model = _load_student(checkpoint, initialize, seed)
    hold_weights(model, config.weights)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for layer in range(shape.layers):
            model.get_submodule(architecture.layer.format(layer=layer)).compile()
    intermediate = None
    if config.intermediate:
        assert teacher is not None, "states between layers are a teacher's"
        of_teacher = open_checkpoint(teacher).shape
        if shape.hidden != of_teacher.hidden and parallel.joined().size > 1:
            raise MinitronError(
                "states between layers of another width are compared in one process only: "
                "set distill.intermediate=false, or start without torchrun"
            )
        pairs = default_pairs(shape, of_teacher)
        intermediate = IntermediateLoss(pairs, shape, of_teacher, centred=architecture.centred_norms)
    return Pupil(model, config.objective, intermediate, dtype)


def _load_student(checkpoint: Checkpoint, initialize: Literal["weights", "random"], seed: int) -> Any:
    if initialize == "weights":
        return load_model(checkpoint.path, torch.float32)
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.path), dtype=torch.float32)
