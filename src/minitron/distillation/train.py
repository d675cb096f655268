"""One training loop, top to bottom: a student learns from a teacher's logits, and resumes bit for bit."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from minitron.core import parallel
from minitron.core.device import compute_dtype, pick_device
from minitron.core.errors import Interrupted, MinitronError
from minitron.data.corpus import Blocks, Corpus, batch_rows, next_rows
from minitron.distillation.compiling import compile_layers, require_compiler
from minitron.distillation.config import DistillConfig, num_steps, of_correction
from minitron.distillation.correction import LearningTeacher
from minitron.distillation.hidden_loss import HiddenLoss, pairs_of, share_at
from minitron.distillation.optim import OPTIMIZERS, hold_weights, make_optimizer, vocabulary_of
from minitron.distillation.recording import RecordedTeacher
from minitron.distillation.state import States
from minitron.distillation.student import StudentModule
from minitron.distillation.teachers import OnlineTeacher, Teacher, require_same_vocabulary
from minitron.distillation.trackers import Row, tracked
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.hidden_states import decoder_layers
from minitron.model.hub import new_model
from minitron.model.samples import Batch
from minitron.model.sharded import load_for_training, shard_into
from minitron.model.writing import write_checkpoint

CORRECTED = "corrected"  # directory of the teacher that learnt in parallel, beside its training's states
EVALUATION_BLOCKS = 8  # in one forward pass


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
    rate_key: str = "distill.learning_rate",
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    warn: Callable[[str], None] = warnings.warn,
) -> Trained:
    """Train the student and write it to the existing directory `out` in the dtypes of its checkpoint.

    With `config.correction` `parallel` the teacher is trained too, and in the end written to `work / CORRECTED`. With
    `before` it was: the teacher given here is the one that `distill` made of the first, without a teacher, by
    `of_correction(config)`.

    Args:
        teacher: a checkpoint, or where `config.teacher` is `recorded` its lessons, see
            `minitron.distillation.recording`. None trains on the text alone.
        config: resolved (see `resolve`).
        work: metrics.jsonl, what trackers keep, and resumable state; a second call with the same arguments goes on from
            there, and ends with the weights that one undisturbed call would have made.
        initialize: `random` draws fresh weights of the student's shape from `seed`, the from-scratch baseline.
        rate_key: what the user calls the learning rate, for the message of a training that diverged.
        warn: told of each state in `work` that is damaged, and from which step training goes on instead.

    A second call with another batch reads on behind the blocks that were read: within a pass none is left out or read
    twice. Its step is the step of the new batch that is nearest to the tokens seen, and from there on the schedule is
    the new one. So is that of another number of tokens; one that is already reached leaves the student as it is.

    Raises: Interrupted after SIGINT, SIGTERM or SIGHUP, with the state saved; RunError if the state is of another
        student or block length, or cannot be written, with the one before still there.

    Paper: P1 and P2, "Retraining"; logits only, as where depth is kept.
    """
    options: dict[str, Any] = {"initialize": initialize, "rate_key": rate_key, "progress": progress, "warn": warn}
    made = _train(student, teacher, corpus, config, seed=seed, work=work, **options)
    if isinstance(made.teacher, LearningTeacher):
        corrected = work / CORRECTED
        corrected.mkdir(exist_ok=True)
        save_trained(made.teacher.reader.model, made.teacher.checkpoint, corrected)
    save_trained(made.pupil.model, made.checkpoint, out)
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

    Raises: Interrupted after SIGINT, SIGTERM or SIGHUP, with the state saved.
    """
    made = _train(student, teacher, corpus, config, seed=seed, work=work, progress=progress, warn=warn, until=step)
    assert made.step == step, f"{work} holds step {made.step}, which is beyond step {step}"
    return mean_loss(made.pupil, made.teacher, judge)


@dataclass(frozen=True)
class _Made:
    """A model in training after some step."""

    pupil: StudentModule
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
    rate_key: str = "distill.learning_rate",
    progress: Callable[[int, int, str], None],
    warn: Callable[[str], None],
    until: int | None = None,
) -> _Made:
    """The loop. `until`: stop after this step with the state saved; the schedule is that of all steps.

    Trackers see a training that goes to its end, and with it the steps up to an `until` before.
    """
    assert config.tokens and config.batch_blocks and config.evaluate_steps and config.checkpoint_steps
    device = pick_device()
    dtype = compute_dtype(config.precision, device)
    if config.compile:
        require_compiler(device)
    checkpoint = open_checkpoint(student)
    guide = None if teacher is None else _teacher(teacher, checkpoint, config, dtype, device)
    pupil = _pupil(checkpoint, teacher, config, initialize, seed, dtype)
    shard_into(pupil, pupil.model, pupil.layers, checkpoint, dtype, device)
    pupil.train()
    learner = guide if isinstance(guide, LearningTeacher) else None
    of_teacher = learner.parameters() if learner is not None else {}
    trained = {"student": [*pupil.parameters()]} | ({"teacher": [*of_teacher.values()]} if of_teacher else {})
    optimizer = make_optimizer(
        trained,
        config.optimizer_name,
        config.weights,
        vocabulary=[*vocabulary_of(pupil.model), *(vocabulary_of(learner.reader.model) if learner else ())],
        betas=config.betas,
        weight_decay=config.weight_decay,
        dtype=dtype,
        seed=seed,
    )
    steps = num_steps(config.tokens, config.batch_blocks, corpus.block_tokens)
    # What made the loss of states between layers as large as the objective in the step before: P1's dynamic weight. The
    # first step, at the bottom of the warm-up, goes without.
    states_weight = torch.zeros((), dtype=torch.float64)
    extra = {f"teacher.{name}": parameter for name, parameter in of_teacher.items()}
    extra |= {"states_weight": states_weight} if pupil.intermediate else {}
    holders = OPTIMIZERS[config.optimizer_name].holders(optimizer)
    states = States(work, pupil, optimizer, config.batch_blocks, corpus.block_tokens, warn, extra, holders)
    step, seen_tokens = states.resume()
    end = steps if until is None else min(until, steps)
    blocks, heldout = corpus.train, corpus.heldout.head(config.evaluate_blocks)
    start, first = time.monotonic(), step

    def reached(heldout_loss: float) -> bool:
        return config.stop_at_loss is not None and heldout_loss <= config.stop_at_loss

    if step > 0 and config.stop_at_loss is not None and reached(mean_loss(pupil, guide, heldout)):
        end = step  # where the run before ended
    courses = {"student": (steps, config)}
    if learner is not None:
        assert config.correction_tokens
        own_steps = num_steps(config.correction_tokens, config.batch_blocks, corpus.block_tokens)
        courses["teacher"] = own_steps, of_correction(config)

    def log(row: Row) -> None:
        states.log(row)
        track(row)

    trackers = config.log_to if until is None else []
    with (
        tracked(trackers, work, states.rows(), config.for_record) as track,
        graceful_stop() as stop,
        parallel.computing_together(),
    ):
        while step < end:
            rates = {name: learning_rate(step, *course) for name, course in courses.items() if step < course[0]}
            learning = learner if "teacher" in rates else None
            for group in optimizer.param_groups:
                group["lr"] = rates.get(group["of"], 0.0)
            drawn = seen_tokens // corpus.block_tokens
            rows = next_rows(len(blocks), seed=seed, drawn=drawn, count=config.batch_blocks)
            batch = Batch(torch.from_numpy(blocks.select(rows)).to(device), blocks.separator)
            micros = micro_batches(batch, max(1, config.micro_batch_tokens // corpus.block_tokens))
            if drawn == 0 and guide is not None:
                pupil.fit_maps((micro, guide(micro), weight) for micro, weight in micros)
            between_weight = (states_weight * share_at(step, steps)).item()
            # Of the student's objective, of its states between layers, and of the teacher that learns.
            sums = torch.zeros(3, dtype=torch.float64)
            for micro, weight in micros:
                if learning is None:
                    lesson, read = None if guide is None else guide(micro), 0.0
                else:
                    lesson, read = learning.learn(micro, weight, batch.num_predicted)
                objective, between = pupil(micro, lesson)
                (weight * (objective + between_weight * between) / batch.num_predicted).backward()
                sums += weight * torch.tensor([objective.item(), between.item(), read], dtype=torch.float64)
            parallel.all_reduce_sum(sums)
            if sums[1] > 0:
                states_weight.copy_(sums[0] / sums[1])
            loss, _, loss_of_teacher = (sums / batch.num_predicted).tolist()
            facts = {}
            if learning is not None:  # first, for what it says when it diverges is no fault of the student's
                norm = _clip(of_teacher.values(), config)
                too_high = f"distill.correction_learning_rate (now {config.correction_learning_rate})"
                _require_finite("training of the teacher", step, loss_of_teacher, norm, rows, too_high)
                facts = {"teacher_loss": loss_of_teacher, "teacher_learning_rate": rates["teacher"]}
            norm = _clip(pupil.parameters(), config)
            _require_finite("training", step, loss, norm, rows, f"{rate_key} (now {config.learning_rate})")
            facts = {"loss": loss, "learning_rate": rates["student"], "grad_norm": norm} | facts
            optimizer.step()
            optimizer.zero_grad()
            step, seen_tokens = step + 1, seen_tokens + batch.tokens.numel()
            log({"step": step, "tokens": seen_tokens, **facts})
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
            progress(step, steps, f"loss {loss:.3f}, {speed:,.0f} tokens/s")
    return _Made(pupil, guide, checkpoint, step, seen_tokens, time.monotonic() - start)


def micro_batches(batch: Batch, size: int) -> list[tuple[Batch, float]]:
    """This process's part of a batch, in pieces of at most `size` blocks, each with the weight of its losses.

    All processes have as many pieces, for they go in step: one that has no blocks left runs the batch's first one with
    weight 0. So a batch need not be a multiple of the processes.
    """
    here = parallel.joined()
    mine = batch.tokens[here.rank :: here.size]
    pieces = []
    for start in range(0, -(-len(batch.tokens) // here.size), size):
        blocks = mine[start : start + size]
        weight = 1.0 if len(blocks) else 0.0
        pieces.append((Batch(blocks if len(blocks) else batch.tokens[:1], batch.separator), weight))
    return pieces


def _clip(parameters: Iterable[Tensor], config: DistillConfig) -> float:
    """Scale the gradients down to the largest norm that the config allows; returns what it was."""
    return parallel.full(torch.nn.utils.clip_grad_norm_(list(parameters), config.gradient_clip)).item()


def _require_finite(what: str, step: int, loss: float, norm: float, rows: np.ndarray, too_high: str) -> None:
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise MinitronError(
            f"{what} diverged at step {step + 1}: loss {loss:g}, gradient norm {norm}, on training blocks "
            f"{', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}; the last good state is kept: "
            f"lower {too_high}"
        )


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


def save_trained(model: Any, checkpoint: Checkpoint, out: Path) -> None:
    """Write a trained model in the dtypes of the checkpoint it started from; the first of several processes does."""
    state = model.state_dict()
    pieces = (
        parallel.full(state[spec.name]).to("cpu", checkpoint.stored[spec.name].dtype) for spec in checkpoint.specs()
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
def mean_loss(pupil: StudentModule, teacher: Teacher | None, blocks: Blocks) -> float:
    """The objective's mean per predicted token, in nats where it is a divergence or the cross-entropy."""
    device, here = next(pupil.parameters()).device, parallel.joined()
    pupil.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # losses, tokens
    for start in range(0, len(blocks), EVALUATION_BLOCKS * here.size):
        own = start + here.rank * EVALUATION_BLOCKS
        # The processes go in step: one that has nothing left runs a block that does not count.
        rows = slice(own, own + EVALUATION_BLOCKS) if own < len(blocks) else slice(0, 1)
        batch = Batch(torch.from_numpy(blocks.select(rows)).to(device), blocks.separator)
        loss = pupil(batch, None if teacher is None else teacher(batch))[0].item()
        if own < len(blocks):
            sums += torch.tensor([loss, batch.num_predicted])
    parallel.all_reduce_sum(sums)
    pupil.train()
    return (sums[0] / sums[1]).item()


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# torchrun and batch systems pass a signal on to processes that had it themselves: within this time it is the same one.
SAME_SIGNAL_SECONDS = 2.0


@dataclass
class StopRequest:
    number: int | None = None  # of the signal that asked
    since: float = 0.0

    @property
    def requested(self) -> bool:
        return self.number is not None


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Inside, a first signal to stop only asks; a later one acts as usual, and at the end the first if nobody heard."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]  # as nohup has it

    def ask(number: int, _: Any) -> None:
        if not request.requested:
            request.number, request.since = number, time.monotonic()
        elif time.monotonic() - request.since >= SAME_SIGNAL_SECONDS:
            act_as_usual()
            signal.raise_signal(number)

    def act_as_usual() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        act_as_usual()
    if request.number is not None:
        signal.raise_signal(request.number)


def _teacher(
    path: Path, student: Checkpoint, config: DistillConfig, dtype: torch.dtype, device: torch.device
) -> Teacher | None:
    if not config.objective.needs_teacher:
        return None
    if config.teacher == "recorded":
        return _recorded(path, student, config, device)
    teacher = open_checkpoint(path)
    places = [theirs for _, theirs in pairs_of(config.intermediate or "off", student.shape, teacher.shape)]
    if config.correction == "parallel":
        require_same_vocabulary(teacher, student)
        return LearningTeacher(_trained_model(teacher, config), teacher, dtype, device, places=places)
    return OnlineTeacher(path, student, dtype, device, places=places, compiled=config.compile)


def _recorded(path: Path, student: Checkpoint, config: DistillConfig, device: torch.device) -> Teacher:
    recorded = RecordedTeacher(path, device)
    facts = {"vocab": student.shape.vocab, "temperature": config.temperature, "top_k": config.top_k}
    for name, wanted in facts.items():
        found = getattr(recorded.facts, name)
        if found != wanted:
            raise MinitronError(f"the lessons in {path} have {name} {found}, and {wanted} is wanted: write them again")
    return recorded


def _pupil(
    checkpoint: Checkpoint,
    teacher: Path | None,
    config: DistillConfig,
    initialize: Literal["weights", "random"],
    seed: int,
    dtype: torch.dtype,
) -> StudentModule:
    architecture, shape = checkpoint.architecture, checkpoint.shape
    model = _trained_model(checkpoint, config, initialize, seed)
    intermediate = None
    if config.intermediate not in (None, "off"):
        assert teacher is not None, "states between layers are a teacher's"
        of_teacher = open_checkpoint(teacher).shape
        pairs = pairs_of(config.intermediate, shape, of_teacher)
        intermediate = HiddenLoss(pairs, shape, of_teacher, centred=architecture.centred_norms)
        hold_weights(intermediate, config.weights)  # FSDP divides parameters of one format only
    return StudentModule(model, decoder_layers(model, checkpoint), config.objective, intermediate, dtype)


def _trained_model(
    checkpoint: Checkpoint,
    config: DistillConfig,
    initialize: Literal["weights", "random"] = "weights",
    seed: int = 0,
) -> Any:
    """A model set up to be trained."""
    model = _load(checkpoint, initialize, seed)
    hold_weights(model, config.weights)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        compile_layers(decoder_layers(model, checkpoint))
    return model


def _load(checkpoint: Checkpoint, initialize: Literal["weights", "random"], seed: int) -> Any:
    if initialize == "weights":
        return load_for_training(checkpoint, torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return new_model(checkpoint.config, torch.float32)
