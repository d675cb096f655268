"""One training loop, top to bottom: a student learns from a teacher's logits, and resumes bit for bit."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from minitron.core import parallel
from minitron.core.device import compute_dtype, failed_allocations, give_back_memory, pick_device
from minitron.core.errors import Interrupted, MinitronError, RunError
from minitron.core.interrupts import graceful_stop
from minitron.core.progress import SILENT, Listener, Pace
from minitron.data.corpus import Blocks, Corpus, batch_rows, next_rows
from minitron.distillation.hidden_loss import share_at
from minitron.distillation.schedule import Schedule
from minitron.distillation.setup import require_compiler
from minitron.distillation.state import States
from minitron.distillation.step import add_gradients, blocks_at_once, clipped, set_up
from minitron.distillation.student import StudentModule
from minitron.distillation.teachers import LearningTeacher, Teacher, TeacherSource
from minitron.distillation.trackers import tracked
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.samples import Batch
from minitron.model.writing import write_checkpoint

CORRECTED = "corrected"  # directory of the teacher that is corrected in parallel, beside its training's states
LESS_MEMORY = (
    "the last state is kept, and the same command goes on where there is more memory; in a new directory "
    "distill.activation_checkpointing=true, a smaller distill.micro_batch_tokens or data.block_tokens takes less"
)
EVALUATION_BLOCKS = 8  # in one forward pass, unless those of a micro-batch are fewer


@dataclass(frozen=True)
class Training:
    """A training: its student, its teacher, its text and its schedule.

    student: the checkpoint to start from.
    schedule: of a teacher that is corrected before, `Schedule.of_correction`, and the teacher is the student here.
    work: the directory of metrics.jsonl, of what trackers keep, and of the states to resume from. A second call for the
        same training goes on from there, and ends with the weights that one undisturbed call would have made.
    listener: hears the progress, and of each state in `work` that is damaged, and from which step training goes on.
    """

    student: Path
    teacher: TeacherSource
    corpus: Corpus
    schedule: Schedule
    work: Path
    listener: Listener = SILENT


@dataclass(frozen=True)
class Trained:
    """A training that has ended.

    tokens: seen by the student, over all calls.
    seconds: of this process; a training that was resumed took more.
    """

    steps: int
    tokens: int
    seconds: float


def distill(training: Training, out: Path) -> Trained:
    """Train the student and write it to the existing directory `out` in the dtypes of its checkpoint.

    With `distill.correction` `parallel` the teacher is trained too, and in the end written to `work / CORRECTED`.

    A second call with another batch reads on behind the blocks that were read: within a pass none is left out or read
    twice. Its step is the step of the new batch that is nearest to the tokens seen, and from there on the schedule is
    the new one. So is that of another number of tokens; one that is already reached leaves the student as it is.

    Raises: Interrupted after SIGINT, SIGTERM or SIGHUP, with the state saved; RunError if the state is of another
        student or block length, or cannot be written, with the one before still there.

    Paper: P1 and P2, "Retraining"; logits only, as where depth is kept.
    """
    made = _train(training, training.schedule.steps)
    if isinstance(made.teacher, LearningTeacher):
        corrected = training.work / CORRECTED
        corrected.mkdir(exist_ok=True)
        save_trained(made.teacher.module.model, made.teacher.checkpoint, corrected)
    save_trained(made.student.model, made.checkpoint, out)
    return Trained(made.step, made.tokens, made.seconds)


def distill_until(training: Training, step: int, judge: Blocks) -> float:
    """Train the first `step` steps of what `distill` does, and leave the state in `work`.

    `distill`, or a further call, goes on from there under the same schedule, and ends with the bits of one undisturbed
    run. 0 steps leave the student as it is.

    Returns the mean training loss per predicted token over the blocks `judge`, in nats.

    Raises: Interrupted after SIGINT, SIGTERM or SIGHUP, with the state saved.
    """
    made = _train(training, min(step, training.schedule.steps), to_its_end=False)
    assert made.step == step, f"{training.work} holds step {made.step}, which is beyond step {step}"
    return mean_loss(made.student, made.teacher, judge, training.schedule.config.micro_batch_tokens)


@dataclass(frozen=True)
class _Made:
    """The models of a training after some step."""

    student: StudentModule
    teacher: Teacher | None
    checkpoint: Checkpoint  # of the student
    step: int
    tokens: int
    seconds: float  # of this process


def _train(training: Training, end: int, *, to_its_end: bool = True) -> _Made:
    """Train up to the step `end`, with the state saved there.

    Trackers see only a training that goes to its end, and with it the steps before.
    """
    schedule, corpus, listener = training.schedule, training.corpus, training.listener
    config, steps = schedule.config, schedule.steps
    device = pick_device()
    dtype = compute_dtype(config.precision, device)
    if config.compile:
        require_compiler(device)
    checkpoint = open_checkpoint(training.student)
    source = training.teacher
    learners = set_up(checkpoint, source.opened(), schedule, dtype, device, recording=source.recording)
    student, teacher, learner, optimizer = learners.student, learners.teacher, learners.learner, learners.optimizer
    of_teacher = learner.parameters() if learner is not None else {}
    # What made the loss of hidden states as large as the objective in the step before: P1's dynamic weight. The first
    # step, at the bottom of the warm-up, goes without.
    states_weight = torch.zeros((), dtype=torch.float64)
    extra = {f"teacher.{name}": parameter for name, parameter in of_teacher.items()}
    extra |= {"states_weight": states_weight} if student.intermediate else {}
    sizes = schedule.batch_blocks, schedule.block_tokens
    states = States(training.work, student, optimizer, *sizes, listener.warn, extra, learners.holders)
    step, seen_tokens = states.resume()
    blocks, heldout = corpus.train, corpus.heldout.head(config.evaluate_blocks)
    start, pace = time.monotonic(), Pace()
    saved_at, micro_batch_tokens = start, config.micro_batch_tokens

    def heldout_loss_now() -> float:
        return mean_loss(student, teacher, heldout, micro_batch_tokens)

    def reached(heldout_loss: float) -> bool:
        return config.stop_at_loss is not None and heldout_loss <= config.stop_at_loss

    if step > 0 and config.stop_at_loss is not None and reached(heldout_loss_now()):
        end = step  # where the run before ended
    courses = {"student": schedule.rates}
    if learner is not None:
        assert schedule.teacher_rates is not None
        courses["teacher"] = schedule.teacher_rates

    def log(row: dict[str, int | float]) -> None:
        states.log(row)
        track(row)

    with (
        tracked(config.log_to if to_its_end else [], training.work, states.rows(), config.for_record) as track,
        graceful_stop() as stop,
        parallel.computing_together(),
        _readable_allocation_errors(),
    ):
        while step < end:
            rates = {name: rates.at(step) for name, rates in courses.items() if step < rates.steps}
            teacher_learns = learner is not None and "teacher" in rates
            for group in optimizer.param_groups:
                group["lr"] = rates.get(group["of"], 0.0)
            drawn = seen_tokens // corpus.block_tokens
            rows = next_rows(len(blocks), seed=schedule.seed, drawn=drawn, count=schedule.batch_blocks)
            random = states.random()
            micros, num_predicted = _batch(blocks, rows, micro_batch_tokens, device)
            sums = None
            with failed_allocations() as failed:
                if drawn == 0 and teacher is not None:
                    student.fit_maps((micro, teacher(micro), weight) for micro, weight in micros)
                sums = add_gradients(
                    learners,
                    micros,
                    num_predicted,
                    between_weight=(states_weight * share_at(step, steps)).item(),
                    teacher_learns=teacher_learns,
                    stop=lambda: parallel.any_of(stop.requested)[0],
                )
            if failed:
                at_once = len(micros[0][0].tokens)
                optimizer.zero_grad()
                micros.clear()
                give_back_memory(device)
                states.set_random(random)
                alone = parallel.joined().size == 1  # else the others wait in the middle of the step
                if alone:
                    states.save(step, seen_tokens, random)
                if at_once == 1 or not alone:
                    raise RunError(f"{_too_much(step, at_once, failed[0])}; {LESS_MEMORY}")
                micro_batch_tokens = at_once // 2 * corpus.block_tokens
                listener.warn(f"{_too_much(step, at_once, failed[0])}: from here on half as many, and the batch stays")
                continue
            if sums is None:
                states.save(step, seen_tokens, random)
                raise _stopped(step, steps)
            sums = sums.cpu()
            parallel.all_reduce_sum(sums)
            if sums[1] > 0:
                states_weight.copy_(sums[0] / sums[1])
            loss, _, loss_of_teacher = (sums / num_predicted).tolist()
            facts = {}
            if teacher_learns:  # first, for what it says when it diverges is no fault of the student's
                norm = clipped(of_teacher.values(), config.gradient_clip).item()
                too_high = f"distill.correction_learning_rate (now {config.correction_learning_rate})"
                _require_finite("training of the teacher", step, loss_of_teacher, norm, rows, too_high)
                facts = {"teacher_loss": loss_of_teacher, "teacher_learning_rate": rates["teacher"]}
            norm = clipped(student.parameters(), config.gradient_clip).item()
            _require_finite("training", step, loss, norm, rows, f"{schedule.rate_key} (now {config.learning_rate})")
            facts = {"loss": loss, "learning_rate": rates["student"], "grad_norm": norm} | facts
            optimizer.step()
            optimizer.zero_grad()
            step, seen_tokens = step + 1, seen_tokens + schedule.step_tokens
            log({"step": step, "tokens": seen_tokens, **facts})
            if step % schedule.evaluate_steps == 0 or step == steps:
                heldout_loss = heldout_loss_now()
                log({"step": step, "tokens": seen_tokens, "heldout_loss": heldout_loss})
                if reached(heldout_loss):
                    end = step
            last = step == end
            due = time.monotonic() - saved_at >= 60 * config.checkpoint_minutes
            stopping, due = parallel.any_of(stop.requested, due)
            if last or stopping or due or step % schedule.checkpoint_steps == 0:
                states.save(step, seen_tokens)
                saved_at = time.monotonic()
            if stopping and not last:
                raise _stopped(step, steps)
            pace.report(seen_tokens, time.monotonic())
            speed = "" if pace.per_second is None else f", {pace.per_second:,.0f} tokens/s"
            listener.progress(step, steps, f"loss {loss:.3f}{speed}")
    return _Made(student, teacher, checkpoint, step, seen_tokens, time.monotonic() - start)


@contextmanager
def _readable_allocation_errors() -> Iterator[None]:
    with failed_allocations() as failed:
        yield
    if failed:
        raise RunError(f"the training takes more memory than there is ({failed[0]}); {LESS_MEMORY}")


def _too_much(step: int, at_once: int, said: str) -> str:
    return f"step {step + 1} with {at_once} block{'s' * (at_once > 1)} at once takes more memory than there is ({said})"


def _stopped(step: int, steps: int) -> Interrupted:
    return Interrupted(f"stopped at step {step} of {steps}; the state is saved, run the same command to go on")


def _batch(
    blocks: Blocks, rows: Int[np.ndarray, " blocks"], micro_batch_tokens: int, device: torch.device
) -> tuple[list[tuple[Batch, float]], int]:
    """Read this process's blocks of a batch, in micro-batches, each with the weight of its losses.

    All processes have as many micro-batches, for they go in step: one that has no blocks left runs the first one with
    weight 0. So a batch need not be a multiple of the processes.

    Returns the micro-batches, and the number of predicted tokens of the whole batch, of all processes together.
    """
    here, size = parallel.joined(), blocks_at_once(micro_batch_tokens, blocks.tokens.shape[1])
    mine = rows[here.rank :: here.size]
    own = Batch(torch.from_numpy(blocks.select(mine if len(mine) else rows[:1])), blocks.separator)
    num_predicted = len(rows) * (blocks.tokens.shape[1] - 1)
    if blocks.separator is not None:
        counted = torch.tensor([own.num_predicted if len(mine) else 0])
        parallel.all_reduce_sum(counted)
        num_predicted = int(counted)
    pieces = []
    for start in range(0, -(-len(rows) // here.size), size):
        part = own.tokens[start : start + size] if start < len(mine) else own.tokens[:1]
        pieces.append((Batch(part.to(device), blocks.separator), 1.0 if start < len(mine) else 0.0))
    return pieces, num_predicted


def _require_finite(what: str, step: int, loss: float, norm: float, rows: np.ndarray, too_high: str) -> None:
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise MinitronError(
            f"{what} diverged at step {step + 1}: loss {loss:g}, gradient norm {norm}, on training blocks "
            f"{', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}; the last good state is kept: "
            f"lower {too_high}"
        )


def blocks_read(corpus: Corpus, schedule: Schedule) -> Int[np.ndarray, "blocks tokens"]:
    """Return the blocks that a training under the schedule reads, to learn from and for its evaluations."""
    batch = schedule.batch_blocks
    drawn = min(schedule.steps, -(-len(corpus.train) // batch))  # by then every block was
    batches = [batch_rows(len(corpus.train), seed=schedule.seed, step=step, batch=batch) for step in range(drawn)]
    rows = np.unique(np.concatenate(batches))
    heldout = corpus.heldout.head(schedule.config.evaluate_blocks)
    return np.concatenate([corpus.train.select(rows), heldout.select(slice(None))])


def save_trained(model: Any, checkpoint: Checkpoint, out: Path) -> None:
    """Write a trained model in the dtypes of the checkpoint it started from; the first of several processes does."""
    state = model.state_dict()
    pieces = (
        parallel.full(state[spec.name]).to("cpu", checkpoint.stored[spec.name].written_dtype)
        for spec in checkpoint.specs()
    )
    if parallel.joined().rank > 0:
        for _ in pieces:
            pass
        return
    write_checkpoint(
        out,
        config=checkpoint.config,
        tensors={
            spec.name: (checkpoint.stored[spec.name].written_dtype, spec.shape(checkpoint.shape))
            for spec in checkpoint.specs()
        },
        pieces=pieces,
        carry_from=checkpoint.path,
    )


@torch.no_grad()
def mean_loss(student: StudentModule, teacher: Teacher | None, blocks: Blocks, micro_batch_tokens: int) -> float:
    """Return the objective's mean per predicted token, in nats where it is a divergence or the cross-entropy."""
    device, here = next(student.parameters()).device, parallel.joined()
    at_once = min(EVALUATION_BLOCKS, blocks_at_once(micro_batch_tokens, blocks.tokens.shape[1]))
    student.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # losses, tokens
    for start in range(0, len(blocks), at_once * here.size):
        own = start + here.rank * at_once
        # The processes go in step: one that has nothing left runs a block that does not count.
        rows = slice(own, own + at_once) if own < len(blocks) else slice(0, 1)
        batch = Batch(torch.from_numpy(blocks.select(rows)).to(device), blocks.separator)
        loss = student(batch, None if teacher is None else teacher(batch))[0].item()
        if own < len(blocks):
            sums += torch.tensor([loss, batch.num_predicted])
    parallel.all_reduce_sum(sums)
    student.train()
    return (sums[0] / sums[1]).item()
