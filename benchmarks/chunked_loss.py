"""What does the chunked head + loss save against the plain way, and how large should its chunks be?

    python benchmarks/chunked_loss.py [--out FILE]

One step is forward KL and its gradient for the student's hidden states and head. The plain way makes both models' full
logits in float32 and leaves the rest to autograd. Every variant runs in a process of its own, several times in turn.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lib.measure import PeakMemory, header, in_fresh_process, publish, table
from torch import Tensor

from minitron.cli.process import keep_freed_memory
from minitron.core.numerics import matmul_precision
from minitron.distillation.chunked import CPU_TEMPORARIES, chunked_loss
from minitron.distillation.objective import Objective
from minitron.model.logits import LazyLogits, chunk_tokens, project

DTYPES = ("float32", "bfloat16")
PLAIN, USUAL = -1, 0  # in place of a budget: the plain way, and the default
STEPS = 1  # timed in each process, after one that is measured for memory
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the result to this Markdown file")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--teacher-hidden", type=int, default=768)
    parser.add_argument("--vocabs", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256, 1024], help="of chunks, in MiB")
    parser.add_argument("--rounds", type=int, default=3, help=f"processes per variant, each timing {STEPS} step")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(**args.child)))
        return
    cases = list(product(args.vocabs, args.dtypes))
    variants = [PLAIN, *sorted({*args.budgets, USUAL})]
    results: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    sizes = {"tokens": args.tokens, "hidden": args.hidden, "teacher_hidden": args.teacher_hidden}
    for _ in range(args.rounds):
        for (vocab, dtype), budget in product(cases, variants):
            one = in_fresh_process(__file__, vocab=vocab, dtype=dtype, budget_mib=budget, **sizes)
            results.setdefault((vocab, dtype, budget), []).append(one)
            print(vocab, dtype, budget, one, file=sys.stderr)
    publish(report(args, cases, results), args.out)


class Problem:
    """Hidden states and heads whose distributions over the vocabulary differ by a KL of about 0.03 nats."""

    def __init__(self, vocab: int, tokens: int, hidden: int, teacher_hidden: int, kl: float = 0.03):
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        # The teacher sees the student's features and some of its own; those alone make the logits differ, by a
        # variance of twice the KL.
        own = teacher_hidden - hidden
        self.hidden = draw(tokens, hidden)
        self.head = 2 * draw(vocab, hidden) / hidden**0.5
        self.teacher_hidden = torch.cat([self.hidden, draw(tokens, own)], 1)
        self.teacher_head = torch.cat([self.head, (2 * kl / own) ** 0.5 * draw(vocab, own)], 1)
        self.targets = torch.randint(0, vocab, (tokens,), generator=generator)
        self.hidden.requires_grad_()
        self.head.requires_grad_()

    def chunked(self, dtype: torch.dtype, chunk: int | None) -> Tensor:
        student, teacher = LazyLogits(self.hidden, self.head), LazyLogits(self.teacher_hidden, self.teacher_head)
        return chunked_loss(Objective(), student, teacher, self.targets, dtype=dtype, chunk=chunk)

    def plain(self) -> Tensor:
        teacher_logits = project(self.teacher_hidden, self.teacher_head)
        return Objective()(project(self.hidden, self.head), teacher_logits, self.targets).sum()

    def gradients(self, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        self.hidden.grad = self.head.grad = None
        loss().backward()
        assert self.hidden.grad is not None and self.head.grad is not None
        return self.hidden.grad, self.head.grad


def measure(vocab: int, dtype: str, budget_mib: int, **sizes: int) -> dict[str, Any]:
    """Peak memory of a first step and seconds of the following ones."""
    keep_freed_memory()
    problem, precision = Problem(vocab, **sizes), getattr(torch, dtype)

    def step() -> None:
        if budget_mib == PLAIN:
            with matmul_precision(precision):
                problem.gradients(problem.plain)
        else:
            given = chunk_tokens(vocab, CPU_TEMPORARIES, budget_bytes=budget_mib * MIB)
            chunk = None if budget_mib == USUAL else given
            problem.gradients(lambda: problem.chunked(precision, chunk))

    with PeakMemory() as memory:
        step()
    seconds, cpu_seconds = [], []
    for _ in range(STEPS):
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {"bytes": memory.peak.anonymous, "seconds": seconds, "cpu_seconds": cpu_seconds}


def gradient_errors(vocab: int, hidden: int, teacher_hidden: int) -> tuple[float, list[list[str]]]:
    """The KL per token, and for each way the error of the gradients, relative to float64, in per cent."""
    problem = Problem(vocab, 256, hidden, teacher_hidden)
    student = problem.hidden.detach().double(), problem.head.detach().double()
    log_p = (problem.teacher_hidden.double() @ problem.teacher_head.double().T).log_softmax(-1)
    log_q = (student[0] @ student[1].T).log_softmax(-1)
    slope = log_q.exp() - log_p.exp()
    exact = slope @ student[1], slope.T @ student[0]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()

    def autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = problem.hidden @ problem.head.T
            teacher_logits = problem.teacher_hidden @ problem.teacher_head.T
        return Objective()(logits.float(), teacher_logits.float(), problem.targets).sum()

    ways = {
        "plain, float32": problem.plain,
        "chunked, float32": lambda: problem.chunked(torch.float32, 64),
        "chunked, bfloat16": lambda: problem.chunked(torch.bfloat16, 64),
        "plain under autocast: logits rounded to bfloat16": autocast,
    }
    rows = []
    for name, loss in ways.items():
        found = problem.gradients(loss)
        errors = [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]
        rows.append([name, *(f"{100 * error:.2g} %" for error in errors)])
    return kl, rows


def report(
    args: argparse.Namespace,
    cases: list[tuple[int, str]],
    results: dict[tuple[int, str, int], list[dict[str, Any]]],
) -> str:
    def peak(*key: Any) -> float:
        return max(one["bytes"] for one in results[key]) / MIB

    def seconds(*key: Any) -> list[float]:
        return [value for one in results[key] for value in one["seconds"]]

    def spread(*key: Any) -> str:
        return f"{median(seconds(*key)):.2f} ({min(seconds(*key)):.2f} to {max(seconds(*key)):.2f})"

    main_rows = [
        [
            f"{vocab:,} {dtype}",
            f"{peak(vocab, dtype, PLAIN):,.0f}",
            f"{peak(vocab, dtype, USUAL):,.0f}",
            f"{peak(vocab, dtype, PLAIN) / peak(vocab, dtype, USUAL):.1f}",
            spread(vocab, dtype, PLAIN),
            spread(vocab, dtype, USUAL),
            f"{median(seconds(vocab, dtype, PLAIN)) / median(seconds(vocab, dtype, USUAL)):.2f}",
        ]
        for vocab, dtype in cases
    ]
    budget_rows = [
        [
            f"{vocab:,} {dtype}",
            *(f"{median(seconds(vocab, dtype, b)):.2f} s, {peak(vocab, dtype, b):,.0f}" for b in args.budgets),
        ]
        for vocab, dtype in cases
    ]
    kl, errors = gradient_errors(args.vocabs[0], args.hidden, args.teacher_hidden)
    return "\n".join(
        [
            header("Chunked head + loss against full logits"),
            f"{args.tokens} tokens, hidden {args.hidden} (teacher {args.teacher_hidden}), forward and backward. "
            "Weights, logits and gradients are float32; bfloat16 means that products may round their inputs to it, in "
            "both ways. `keep_freed_memory` is on in both, as in the command line. Peak: anonymous memory in MiB "
            f"beyond the inputs, gradients included. Time: median of {args.rounds} processes, taken in turn, of their "
            "second step, with the fastest and the slowest.",
            "",
            table(
                [
                    "vocab",
                    "peak, plain",
                    "peak, chunked",
                    "ratio",
                    "s/step, plain",
                    "s/step, chunked",
                    "plain / chunked",
                ],
                main_rows,
            ),
            "",
            "By the chunk's budget in MiB, median time and peak MiB. The default, above, is 256 or what the head "
            "takes in float32, whichever is more.",
            "",
            table(["vocab", *map(str, args.budgets)], budget_rows),
            "",
            f"Error of the gradient relative to float64, vocab {args.vocabs[0]:,}, KL {kl:.3f} nats:",
            "",
            table(["", "hidden", "head"], errors),
            "",
        ]
    )


if __name__ == "__main__":
    main()
