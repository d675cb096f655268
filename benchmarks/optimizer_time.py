"""Which optimizer and batch give the lowest KL after the same wall time?

    python benchmarks/optimizer_time.py --cache DIR --seconds 60 120 [--out FILE]
    python benchmarks/optimizer_time.py --cache DIR --seconds 300 600 --model TEACHER --student PRUNED --data TEXT
        --heldout TEXT [--optimizers soap adamw] [--batches 2 4 8] [--rates 0.5,1,2] [--out FILE]

The seconds of a step are measured first, on a quiet machine: those of the passes by the trainings' own steps in each
batch, and those of an update by itself. From them follow the steps that each candidate makes in the same time. It is
then trained for so many steps by `distill`, with a schedule of its own that ends there. Machine load changes nothing in
that part, and the cache keeps measured seconds and finished trainings: a run that was interrupted goes on from there.

The student is cut with repair, as by default: by the script to about half of the teacher's parameters, or by the user.
The KL is that of the training's last evaluation on held-out text. A row says `default` where the default rule gives its
optimizer and its batch for its tokens.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lib.distillations import BLOCK_TOKENS, STARTS, Bench, arguments, integers, numbers, opened, published, to_do
from lib.measure import header, table
from torch import Tensor

from minitron.core.device import compute_dtype, pick_device
from minitron.core.progress import SILENT, Listener, Silent
from minitron.distillation.config import DistillConfig
from minitron.distillation.optim import OPTIMIZERS, OptimizerOptions, OptimizerRow, make_optimizer, soap_row
from minitron.distillation.optim.low_precision import Group
from minitron.distillation.optim.soap import AXES_STEPS, Turning
from minitron.distillation.schedule import ModelSize, Schedule, resolve
from minitron.distillation.teachers import TeacherSource
from minitron.distillation.train import Training, distill
from minitron.model.checkpoint import load_model, open_checkpoint
from minitron.model.hidden_states import decoder_layers

LAYERS = 2  # whose update is timed, for all
STEPS = 4  # of a training whose passes are timed
CYCLE = 50  # updates, after which all candidates have changed their axes equally often
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Muon(torch.optim.Optimizer):
    """torch's Muon for layers' matrices, with steps of the size of AdamW's, and torch's AdamW for all else."""

    def __init__(self, groups: Iterable[Group], *, betas: tuple[float, float]):
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "weight_decay": 0.0})
        makers: dict[bool, Callable[..., torch.optim.Optimizer]] = {
            True: partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
            False: partial(torch.optim.AdamW, betas=betas, fused=True),
        }
        self.pairs = [(group, makers[group["turned"]]([_of_torch(group)])) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group, own in self.pairs:
            own.param_groups[0]["lr"] = group["lr"]
            own.step()


def _of_torch(group: Group) -> Group:
    return {name: group[name] for name in ("params", "weight_decay")}


# What the product does not offer.
TRIED = {
    "muon": OptimizerRow(Muon, "torch.optim.Muon", is_turned=lambda shape: True),
    "soap_rounded": soap_row(Turning(rounded=True), "products in bfloat16, results too"),
    "soap_one_sided": soap_row(Turning(longer_sides=False), "the shorter sides alone"),
    "soap_seldom": soap_row(Turning(moment_steps=5, axes_every=5, rounded=True), "both sides, axes seldom"),
}


@dataclass(frozen=True)
class Candidate:
    """An optimizer and a batch; `rate` is a factor of the default learning rate."""

    optimizer: str
    batch_blocks: int
    rate: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {self.batch_blocks * BLOCK_TOKENS:,}"


@dataclass(frozen=True)
class Update:
    """Seconds of an optimizer's updates: of the first AXES_STEPS together, and of a later one in the mean."""

    first: float
    later: float


@dataclass
class Clocked(Silent):
    """Notes the time at the end of each step of a training."""

    clock: Callable[[], float]
    times: list[float] = field(default_factory=list)

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.times.append(self.clock())


@dataclass(frozen=True)
class Pair:
    """A teacher with its text, and a student that is cut from it."""

    bench: Bench
    student: Path
    heldout_blocks: int
    work: Path

    def config(self, optimizer: str | None, batch_blocks: int | None, tokens: int, rate: float = 1.0) -> DistillConfig:
        teacher, student = self.bench.teacher, open_checkpoint(self.student)
        config = resolve(
            DistillConfig(
                tokens=tokens,
                optimizer=optimizer,
                batch_blocks=batch_blocks,
                evaluate_steps=1 << 40,  # the last step is evaluated in any case
                evaluate_blocks=self.heldout_blocks,
                checkpoint_steps=1 << 40,
            ),
            ModelSize(student.shape, student.weights_rms),
            ModelSize(teacher.shape, teacher.weights_rms),
            block_tokens=BLOCK_TOKENS,
            train_tokens=self.bench.corpus.train_tokens,
            repaired=True,
        )
        peak = (config.learning_rate or 0) * rate
        return config.model_copy(update={"learning_rate": peak, "min_learning_rate": peak / 10})

    def train(self, config: DistillConfig, seed: int = 0, listener: Listener = SILENT) -> float:
        """Return the held-out KL of a training's end, in nats."""
        schedule = Schedule.of_student(config, BLOCK_TOKENS, seed)
        with tempfile.TemporaryDirectory(dir=self.work) as path:
            (Path(path) / "student").mkdir()
            source = TeacherSource(self.bench.teacher.path)
            training = Training(self.student, source, self.bench.corpus, schedule, Path(path) / "distill", listener)
            distill(training, Path(path) / "student")
            last = (Path(path) / "distill" / "metrics.jsonl").read_text().splitlines()[-1]
        return float(json.loads(last)["heldout_loss"])

    def step_seconds(self, batch_blocks: int, clock: Callable[[], float]) -> float:
        """Return the least seconds of a step with AdamW, the first one left out."""
        clocked = Clocked(clock)
        steps = STEPS + 1  # and a last one, with its evaluation
        config = self.config("adamw", batch_blocks, steps * batch_blocks * BLOCK_TOKENS)
        self.train(config.model_copy(update={"evaluate_blocks": 1}), listener=clocked)
        return min(end - start for start, end in pairwise(clocked.times[:-1]))

    def update(self, optimizer: str, clock: Callable[[], float]) -> Update:
        """Return the seconds of the layers' updates, from those of some layers."""
        checkpoint = open_checkpoint(self.student)
        layers = decoder_layers(load_model(self.student, torch.float32), checkpoint)[:LAYERS]
        trained = [parameter for layer in layers for parameter in layer.parameters()]
        dtype = compute_dtype("auto", pick_device())
        options = OptimizerOptions("float32", betas=(0.9, 0.95), weight_decay=0.1, dtype=dtype, seed=0)
        own = make_optimizer({"student": trained}, optimizer, options, vocabulary=[])
        seconds = [_step_seconds(own, trained, clock) for _ in range(AXES_STEPS + CYCLE)]
        share = checkpoint.shape.layers / LAYERS
        return Update(share * sum(seconds[:AXES_STEPS]), share * sum(seconds[AXES_STEPS:]) / CYCLE)


def _step_seconds(own: torch.optim.Optimizer, trained: list[Tensor], clock: Callable[[], float]) -> float:
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    start = clock()
    own.step()
    return clock() - start


class Speeds:
    """The measured seconds, kept in the cache."""

    def __init__(self, file: Path):
        self.file = file
        self.known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"steps": {}, "updates": {}}

    def measure(self, pair: Pair, batches: list[int], optimizers: list[str], args: argparse.Namespace) -> None:
        """Measure what is not known, in turns, of which the fastest counts."""
        clock, steps, updates = CLOCKS[args.clock], self.known["steps"], self.known["updates"]
        new_batches = [blocks for blocks in batches if str(blocks) not in steps]
        new_optimizers = [name for name in ("adamw", *optimizers) if name not in updates]
        for _ in range(args.turns):
            for blocks in new_batches:
                steps[str(blocks)] = min(pair.step_seconds(blocks, clock), steps.get(str(blocks), float("inf")))
            for name in new_optimizers:
                found = vars(pair.update(name, clock))
                updates[name] = {key: min(own, updates.get(name, found)[key]) for key, own in found.items()}
        self.file.write_text(json.dumps(self.known, indent=1))

    def update(self, optimizer: str) -> Update:
        return Update(**self.known["updates"][optimizer])

    def passes(self, batch_blocks: int) -> float:
        """Seconds of a step without the update of the layers."""
        return float(self.known["steps"][str(batch_blocks)] - self.update("adamw").later)

    def steps_in(self, seconds: float, candidate: Candidate) -> int:
        """The steps that a candidate makes in so many seconds."""
        passes, update = self.passes(candidate.batch_blocks), self.update(candidate.optimizer)
        until_axes = AXES_STEPS * passes + update.first
        if seconds < until_axes:
            return int(AXES_STEPS * seconds / until_axes)
        return AXES_STEPS + int((seconds - until_axes) / (passes + update.later))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--student", type=Path, help="a repaired cut; else the script makes one")
    parser.add_argument("--heldout-blocks", type=int, default=64)
    parser.add_argument("--seconds", type=float, nargs="+", required=True)
    parser.add_argument("--optimizers", nargs="+", default=[*OPTIMIZERS], choices=[*OPTIMIZERS, *TRIED])
    parser.add_argument("--batches", type=integers, default=[2, 4, 8], help="blocks of a batch")
    parser.add_argument("--rates", type=numbers, default=[1.0], help="factors of the default learning rate")
    parser.add_argument("--turns", type=int, default=2, help="in which seconds are measured")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where the machine is not quiet")
    args = parser.parse_args()
    with also_offered(TRIED):
        bench = opened(args)
        pair = Pair(bench, args.student or cut(bench), args.heldout_blocks, args.cache)
        speeds = Speeds(args.cache / "speeds.json")
        speeds.measure(pair, args.batches, args.optimizers, args)
        for job in to_do(args, grid(args)):
            run(pair, speeds, *job)
        published(bench, report(pair, speeds, args), args)


@contextmanager
def also_offered(rows: dict[str, OptimizerRow]) -> Iterator[None]:
    """Let recipes name what only this script offers."""
    OPTIMIZERS.update(rows)
    try:
        yield
    finally:
        for name in rows:
            del OPTIMIZERS[name]


def cut(bench: Bench) -> Path:
    student = bench.cache / "pruned"
    if not student.exists():
        unfinished = bench.cache / "pruned.partial"
        unfinished.mkdir(exist_ok=True)
        bench.cut(bench.shape("width"), STARTS["best"], unfinished)
        unfinished.rename(student)
    return student


def grid(args: argparse.Namespace) -> Iterator[tuple[float, Candidate, int]]:
    for seconds in args.seconds:
        for seed in integers(args.seeds):
            for rate in sorted(args.rates, key=lambda rate: abs(rate - 1)):
                for optimizer in args.optimizers:
                    for blocks in args.batches:
                        yield seconds, Candidate(optimizer, blocks, rate), seed


def key_of(seconds: float, candidate: Candidate, seed: int) -> dict[str, Any]:
    return {"seconds": seconds, "seed": seed, **vars(candidate)}


def run(pair: Pair, speeds: Speeds, seconds: float, candidate: Candidate, seed: int) -> None:
    """Train a candidate for the steps that it makes in the time, unless the cache has it."""
    key = key_of(seconds, candidate, seed)
    steps = speeds.steps_in(seconds, candidate)
    if pair.bench.has(key) or steps < 1:
        return
    tokens = steps * candidate.batch_blocks * BLOCK_TOKENS
    config = pair.config(candidate.optimizer, candidate.batch_blocks, tokens, candidate.rate)
    kl = pair.train(config, seed)
    pair.bench.record({"key": key, "tokens": tokens, "steps": steps, "learning_rate": config.learning_rate, "kl": kl})


def report(pair: Pair, speeds: Speeds, args: argparse.Namespace) -> str:
    lines = [
        header(f"Optimizers and batches after the same time on {args.name}"),
        f"KL to the teacher on {args.heldout_blocks} held-out blocks of {BLOCK_TOKENS} tokens, in nats, after so many "
        f"seconds of training ({args.clock} time), a mean of seeds {args.seeds}. The seconds of a step are those of "
        "its passes and of an update, axes included.",
        "",
    ]
    for seconds in args.seconds:
        rates = [f"KL at {rate:g} x" for rate in args.rates]
        columns = ["optimizer, batch in tokens", "passes, s", "update, s", "tokens", *rates]
        lines += [f"## {seconds:g} seconds", "", table(columns, [*_rows(pair, speeds, args, seconds)]), ""]
    return "\n".join(lines)


def _rows(pair: Pair, speeds: Speeds, args: argparse.Namespace, seconds: float) -> Iterator[list[str]]:
    for optimizer in args.optimizers:
        for blocks in args.batches:
            candidates = [Candidate(optimizer, blocks, rate) for rate in args.rates]
            found = [_kls(pair.bench, seconds, candidate, integers(args.seeds)) for candidate in candidates]
            if any(found):
                tokens = speeds.steps_in(seconds, candidates[0]) * blocks * BLOCK_TOKENS
                update = speeds.update(optimizer).later
                usual = pair.config(None, None, tokens)
                is_usual = (usual.optimizer, usual.batch_blocks) == (optimizer, blocks)
                yield [
                    candidates[0].name + (", default" if is_usual else ""),
                    f"{speeds.passes(blocks):.2f}",
                    f"{update:.2f}",
                    f"{tokens:,}",
                    *(f"{sum(kls) / len(kls):.4f}" if kls else "" for kls in found),
                ]


def _kls(bench: Bench, seconds: float, candidate: Candidate, seeds: list[int]) -> list[float]:
    keys = [key_of(seconds, candidate, seed) for seed in seeds]
    return [row["kl"] for row in bench.rows if row["key"] in keys]


if __name__ == "__main__":
    main()
