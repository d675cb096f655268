"""What does SOAP add to a step of training?

    python benchmarks/optimizer_step.py [--hidden 1024 ...] [--tokens 1024 4096 16384] [--out FILE]

A student half as wide as its teacher, both with random weights, as in distill_step.py: forward and backward for some
tokens, then the optimizer's step, in turns of ten steps for AdamW and SOAP, of which one changes SOAP's axes.
"""

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from distill_contenders import Sizes, Task, minitron
from distill_step import write_models
from lib.measure import header, publish, table

from minitron.cli.process import keep_freed_memory
from minitron.distillation.optim import OptimizerOptions, make_optimizer, vocabulary_of
from minitron.distillation.optim.soap import AXES_STEPS

OPTIMIZERS = ("adamw", "soap")


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the result to this Markdown file")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="of a step")
    parser.add_argument("--repetitions", type=int, default=3, help="turns of each optimizer")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    sizes = asdict(Sizes())
    for name in ("hidden", "ffn", "layers", "heads", "vocab"):
        parser.add_argument(f"--{name}", type=int, default=sizes[name], help=f"of the teacher, default {sizes[name]}")
    args = parser.parse_args()
    sizes |= {name: getattr(args, name) for name in ("hidden", "ffn", "layers", "heads", "vocab")}
    rows = []
    with tempfile.TemporaryDirectory(prefix="minitron-bench-") as path:
        write_models(Path(path), Sizes(**sizes))
        task = Task(Path(path), Sizes(**sizes | {"batch": 1}), torch.bfloat16, torch.device(args.device))
        seconds = {name: steps(task, name, args.repetitions) for name in OPTIMIZERS}
        for tokens in args.tokens:
            blocks = tokens // sizes["block_tokens"]
            rest = passes(Task(task.models, Sizes(**sizes | {"batch": blocks}), task.dtype, task.device))
            whole = {name: rest + mean(seconds[name]) for name in OPTIMIZERS}
            cells = [f"{tokens:,}", f"{rest:.2f}", *(f"{whole[name]:.2f}" for name in OPTIMIZERS)]
            rows.append([*cells, f"{whole['soap'] / whole['adamw']:.2f}"])
    publish(report(sizes, seconds, rows, args), args.out)


def passes(task: Task) -> float:
    """Seconds of the forward and backward passes of a step, the default's: the median of three after one."""
    model = task.student()
    loss = minitron(task, model, task.teacher(), task.tokens().to(task.device), places="all")
    taken = [timed(lambda: loss().backward(), task.device) for _ in range(4)]
    return median(taken[1:])


def steps(task: Task, optimizer: Any, repetitions: int) -> list[float]:
    """Mean seconds of the optimizer's own steps in turns of ten, after one turn."""
    model = task.student()
    options = OptimizerOptions("float32", betas=(0.9, 0.95), weight_decay=0.1, dtype=task.dtype, seed=0)
    own = make_optimizer({"student": [*model.parameters()]}, optimizer, options, vocabulary=vocabulary_of(model))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    turns = [[timed(own.step, task.device) for _ in range(AXES_STEPS)] for _ in range(1 + repetitions)]
    return [mean(turn) for turn in turns[1:]]


def timed(work: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report(sizes: dict[str, int], seconds: dict[str, list[float]], rows: list[list[str]], args: Any) -> str:
    own = "; ".join(
        f"{name} {median(each):.3f} s ({min(each):.3f} to {max(each):.3f})" for name, each in seconds.items()
    )
    columns = ["tokens a step", "passes, s", *(f"step with {name}, s" for name in OPTIMIZERS), "soap / adamw"]
    return "\n".join(
        [
            header("SOAP in a step of training"),
            f"Teacher: hidden {sizes['hidden']}, ffn {sizes['ffn']}, {sizes['layers']} layers, vocabulary "
            f"{sizes['vocab']:,}; student: half of each width. Products in bfloat16, hidden states compared, "
            f"blocks of {sizes['block_tokens']} tokens on {args.device}. The optimizer's own step, a mean of "
            f"{AXES_STEPS} of which one changes the axes, median of {args.repetitions} turns: {own}.",
            "",
            table(columns, rows),
            "",
        ]
    )


if __name__ == "__main__":
    main()
