"""One training loop, top to bottom: a student learns from a teacher's logits, and resumes bit for bit."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from minitron.config import Section
from minitron.data import Blocks, Corpus, next_rows
from minitron.device import Precision, compute_dtype, pick_device, settle_precision
from minitron.distill.losses import LOSSES, WITHOUT_TEACHER, chunked_loss
from minitron.distill.state import States
from minitron.errors import Interrupted, MinitronError
from minitron.model.architecture import Shape
from minitron.model.checkpoint import Checkpoint, load_model, open_checkpoint, write_checkpoint
from minitron.model.logits import logit_transform

Share = Annotated[float, Field(ge=0, lt=1)]


class DistillConfig(Section):
    tokens: int | None = Field(default=None, ge=1)
    """Training tokens. Default: one pass over the training text."""
    loss: Literal["forward_kl", "cross_entropy"] = "forward_kl"
    """Forward KL on logits is the papers' choice; cross_entropy ignores the teacher."""
    batch_blocks: int | None = Field(default=None, ge=1)
    """Blocks per optimizer step. Default: see `resolve`."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Tokens per forward and backward; changes memory, not the result beyond rounding."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate. Default: 0.4 / the student's hidden size, half of it for a repaired cut, see `resolve`."""
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
    precision: Precision = "auto"
    """Matrix products; weights, optimizer state and logits are float32 in any case."""
    evaluate_steps: int | None = Field(default=None, ge=1)
    """Steps between held-out evaluations. Default: a tenth of the steps."""
    evaluate_blocks: int = Field(default=64, ge=1)
    """Held-out blocks of the periodic evaluation."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """Steps between resumable checkpoints. Default: a tenth of the steps."""


def resolve(
    config: DistillConfig, student: Shape, *, block_tokens: int, train_tokens: int, repaired: bool = False
) -> DistillConfig:
    """Fill in what derives from the student's shape and the token budget.

    Learning rate: 0.4 / hidden passes through the papers' 1e-4 at hidden 3072 to 4096 and through the best of a grid on
    a 260K-parameter student (8e-3 at hidden 48). A repaired cut has more to lose: half of it is better by a sixth on a
    6.5M-parameter teacher, and as good on a 260K one (docs/LOG.md). Batch: a budget is worth about 600 steps (P1 ranks
    candidates after 400), each of at least 2048 and at most 9.4M tokens (P2's batch).
    """
    tokens = config.tokens or train_tokens
    batch = config.batch_blocks or max(1, round(min(max(tokens / 600, 2048), 9.4e6) / block_tokens))
    steps = num_steps(tokens, batch, block_tokens)
    usual = float(f"{0.4 / student.hidden:.2g}")
    rate = config.learning_rate or (usual / 2 if repaired else usual)
    return config.model_copy(
        update={
            "tokens": tokens,
            "batch_blocks": batch,
            "learning_rate": rate,
            "scratch_learning_rate": config.scratch_learning_rate or config.learning_rate or usual,
            "min_learning_rate": rate / 10 if config.min_learning_rate is None else config.min_learning_rate,
            "warmup_steps": min(max(10, steps // 50), steps // 5)
            if config.warmup_steps is None
            else config.warmup_steps,
            "evaluate_steps": config.evaluate_steps or max(1, steps // 10),
            "checkpoint_steps": config.checkpoint_steps or max(1, steps // 10),
            "precision": settle_precision(config.precision),
        }
    )


def of_scratch(config: DistillConfig) -> DistillConfig:
    """The resolved config of a training of the same shape from random weights, on text alone."""
    assert config.learning_rate and config.scratch_learning_rate and config.min_learning_rate is not None
    share = config.min_learning_rate / config.learning_rate
    rate = config.scratch_learning_rate
    return config.model_copy(update={"loss": "cross_entropy", "learning_rate": rate, "min_learning_rate": share * rate})


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
        config: resolved (see `resolve`).
        work: metrics.jsonl and resumable state; a second call with the same arguments goes on from there, and ends
            with the weights that one undisturbed call would have made.
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
    save_student(made.model, made.checkpoint, out)
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
    return made.loss_per_token.mean(judge)


@dataclass(frozen=True)
class _Made:
    """A model in training after some step."""

    model: Any
    checkpoint: Checkpoint
    loss_per_token: "_LossPerToken"
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
    """The loop. `until`: stop after this step with the state saved; the schedule is that of all steps."""
    assert config.tokens and config.batch_blocks and config.evaluate_steps and config.checkpoint_steps
    device = pick_device()
    dtype = compute_dtype(config.precision, device)
    checkpoint = open_checkpoint(student)
    model = _load_student(checkpoint, initialize, seed).to(device).train()
    guide = (
        None if config.loss in WITHOUT_TEACHER or teacher is None else _load_teacher(teacher, checkpoint, dtype, device)
    )
    optimizer = _optimizer(model, config)
    steps = num_steps(config.tokens, config.batch_blocks, corpus.block_tokens)
    states = States(work, model, optimizer, config.batch_blocks, corpus.block_tokens, warn)
    step, seen_tokens = states.resume()
    end = steps if until is None else min(until, steps)
    blocks, heldout = corpus.train, corpus.heldout.head(config.evaluate_blocks)
    loss_per_token = _LossPerToken(model, guide, config.loss, dtype, device)
    start, first = time.monotonic(), step

    with graceful_stop() as stop:
        while step < end:
            rate = learning_rate(step, steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            drawn = seen_tokens // corpus.block_tokens
            rows = next_rows(len(blocks), seed=seed, drawn=drawn, count=config.batch_blocks)
            tokens = torch.from_numpy(blocks.select(rows)).to(device)
            loss = 0.0
            for micro in tokens.split(max(1, config.micro_batch_tokens // corpus.block_tokens)):
                part = loss_per_token.sum(micro) / predicted_tokens(tokens)
                part.backward()
                loss += part.item()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip).item()
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise MinitronError(
                    f"training diverged at step {step + 1}: loss {loss}, gradient norm {norm}; "
                    f"lower distill.learning_rate (now {config.learning_rate})"
                )
            optimizer.step()
            optimizer.zero_grad()
            step, seen_tokens = step + 1, seen_tokens + tokens.numel()
            states.log({"step": step, "tokens": seen_tokens, "loss": loss, "learning_rate": rate, "grad_norm": norm})
            last = step == end
            if step % config.evaluate_steps == 0 or step == steps:
                states.log({"step": step, "tokens": seen_tokens, "heldout_loss": loss_per_token.mean(heldout)})
            if last or stop.requested or step % config.checkpoint_steps == 0:
                states.save(step, seen_tokens)
            if stop.requested and not last:
                raise Interrupted(
                    f"stopped at step {step} of {steps}; the state is saved, run the same command to go on"
                )
            speed = (step - first) * tokens.numel() / (time.monotonic() - start)
            progress(step, steps, f"{config.loss} {loss:.3f}, {speed:,.0f} tokens/s")
    return _Made(model, checkpoint, loss_per_token, step, seen_tokens, time.monotonic() - start)


def learning_rate(step: int, steps: int, config: DistillConfig) -> float:
    """Linear warm-up, then a cosine from the peak to the minimum; `step` counts from 0."""
    assert config.learning_rate is not None and config.min_learning_rate is not None and config.warmup_steps is not None
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    fall = (1 + math.cos(math.pi * progress)) / 2
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * fall


def predicted_tokens(tokens: Tensor) -> int:
    """Each block predicts all its tokens but the first."""
    return tokens.shape[0] * (tokens.shape[1] - 1)


def save_student(model: Any, checkpoint: Checkpoint, out: Path) -> None:
    """Write a trained model in the dtypes of the checkpoint it started from."""
    state = model.state_dict()
    write_checkpoint(
        out,
        config=checkpoint.config,
        tensors={
            spec.name: (checkpoint.stored[spec.name].dtype, spec.shape(checkpoint.shape)) for spec in checkpoint.specs()
        },
        pieces=(state[spec.name].to("cpu", checkpoint.stored[spec.name].dtype) for spec in checkpoint.specs()),
        carry_from=checkpoint.path,
    )


class _LossPerToken:
    """The training loss of a batch, and its mean over held-out blocks."""

    def __init__(self, model: Any, teacher: Any, loss: str, dtype: torch.dtype, device: torch.device):
        self.model, self.teacher, self.loss, self.dtype, self.device = model, teacher, LOSSES[loss], dtype, device
        self.transforms = (logit_transform(model), logit_transform(model if teacher is None else teacher))

    def sum(self, tokens: Tensor) -> Tensor:
        with self._autocast():
            hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        teacher_hidden = teacher_head = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_hidden = self.teacher.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            teacher_hidden = teacher_hidden[:, :-1].flatten(0, 1)
            teacher_head = self.teacher.get_output_embeddings().weight
        return chunked_loss(
            self.loss,
            hidden[:, :-1].flatten(0, 1),
            self.model.get_output_embeddings().weight,
            teacher_hidden,
            teacher_head,
            tokens[:, 1:].flatten(),
            transforms=self.transforms,
            dtype=self.dtype,
        )

    @torch.no_grad()
    def mean(self, blocks: Any) -> float:
        self.model.eval()
        total, count = 0.0, 0
        for start in range(0, len(blocks), 8):
            tokens = torch.from_numpy(blocks.select(slice(start, start + 8))).to(self.device)
            total += self.sum(tokens).item()
            count += predicted_tokens(tokens)
        self.model.train()
        return total / count

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


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


def _load_student(checkpoint: Checkpoint, initialize: str, seed: int) -> Any:
    if initialize == "weights":
        return load_model(checkpoint.path, torch.float32)
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.path), dtype=torch.float32)


def _load_teacher(path: Path, student: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    require_same_vocabulary(open_checkpoint(path), student)
    return load_model(path, dtype).to(device).requires_grad_(False)


def require_same_vocabulary(teacher: Checkpoint, student: Checkpoint) -> None:
    """Raises: MinitronError if logits of the two models cannot be compared."""
    if teacher.shape.vocab != student.shape.vocab:
        raise MinitronError(
            f"teacher and student vocabularies differ: {teacher.path} has {teacher.shape.vocab} tokens, "
            f"{student.path} has {student.shape.vocab}; KL compares logits token by token, so they must be the same"
        )


def _optimizer(model: Any, config: DistillConfig) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=config.betas, fused=True)
