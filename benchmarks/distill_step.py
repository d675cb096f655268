"""What does a distillation step cost over its floor, and beside the same step of others?

    python benchmarks/distill_step.py --environments DIRECTORY [--out FILE]

Every contender (see distill_contenders.py) trains the same student, half as wide as the teacher, from the same random
weights, or with --teacher and --student the student of a real pair, on the same batch, with forward KL at temperature
1, AdamW and clipped gradients. Each lives in a process of its own, and they take turns. TRL and ModelOpt have
environments of their own, made below DIRECTORY from the package index where they are missing: 1.5 and 1.8 GB with a
CPU build of torch. Losses of the first step must agree, or nothing is compared. Memory of the loss alone is measured
by chunked_loss.py, on the CPU.

Contenders that are `compiled` use torch.compile: minitron and the plain loop for the layers of both models and the
loss, the other two as transformers' Trainer does it, for the student.

On a GPU, with the share of its peak that each step achieves:

    python benchmarks/distill_step.py --environments DIRECTORY --device cuda --peak-tflops 989 \\
        --hidden 2048 --ffn 8192 --layers 16 --heads 32 --vocab 128256 --batch 4 --block-tokens 2048
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from chunked_loss import PLAIN, USUAL
from distill_contenders import CONTENDERS, Sizes
from lib.measure import header, in_fresh_process, publish, save_byte_tokenizer, table
from transformers import AutoConfig, LlamaForCausalLM

from minitron.model.checkpoint import open_checkpoint

MIB = 1 << 20
OTHERS = ("plain", "trl", "modelopt")
COMPILED = "_compiled"  # ends the name of a contender that uses torch.compile
TOLERANCE = 0.01  # between losses, relative: the others round logits to bfloat16
FIRST_STEPS = 2  # in the second one the optimizer has its state
LOSS_VOCAB, LOSS_TOKENS = 128_256, 2048
# What minitron.cli.process.keep_freed_memory sets, for processes that do not have it.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(256 << 20), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, help="directory of the environments of TRL and ModelOpt")
    parser.add_argument("--out", type=Path, help="also write the result to this Markdown file")
    parser.add_argument("--teacher", type=Path, help="directory of a checkpoint in the place of random weights")
    parser.add_argument("--student", type=Path, help="directory of a checkpoint that was cut from it")
    parser.add_argument("--scratch", type=Path, help="where the models go; default the system's")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS), help="these contenders")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn, after one that is not")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of matrix products")
    parser.add_argument("--default-malloc", action="store_true", help="do not keep freed memory for the others' sake")
    parser.add_argument("--peak-tflops", type=float, help="what the device can do in that dtype")
    parser.add_argument("--skip-loss", action="store_true", help="do not measure the memory of the loss alone")
    for name, size in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help=f"default {size}")
    args = parser.parse_args()
    apart = [name for name in args.only if CONTENDERS[name].packages]
    if apart and args.environments is None:
        parser.error(f"{' and '.join(apart)} need environments of their own: say where with --environments")
    if (args.teacher is None) != (args.student is None):
        parser.error("--teacher and --student go together")
    if args.teacher is not None and args.peak_tflops:
        parser.error("--peak-tflops counts the operations of the random pair: leave it out with --teacher")
    if args.teacher is not None:
        args.vocab = AutoConfig.from_pretrained(args.teacher).vocab_size
    sizes = Sizes(**{name: getattr(args, name) for name in asdict(Sizes())})
    pythons = {
        name: environment(args.environments / name.removesuffix(COMPILED), CONTENDERS[name].packages)
        if name in apart
        else Path(sys.executable)
        for name in args.only
    }
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="minitron-bench-") as directory:
        if args.teacher is None:
            write_models(Path(directory), sizes)
        else:
            for name in ("teacher", "student"):
                (Path(directory) / name).symlink_to(getattr(args, name).resolve())
        task = {"models": directory, "sizes": asdict(sizes), "dtype": args.dtype, "device": args.device}
        results = measure(args, pythons, task)
    publish(report(args, sizes, results, None if args.skip_loss else loss_memory()), args.out)


def environment(directory: Path, packages: tuple[str, ...]) -> Path:
    """The interpreter of a virtual environment that has these packages and this process's torch."""
    python, ready = directory / "bin" / "python", directory / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
        torch_here = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([python, "-m", "pip", "install", "--quiet", torch_here, *packages], check=True)
        ready.touch()
    return python


def write_models(path: Path, sizes: Sizes) -> None:
    for seed, (name, divisor, dtype) in enumerate((("teacher", 1, torch.bfloat16), ("student", 2, torch.float32))):
        torch.manual_seed(seed)
        LlamaForCausalLM._from_config(sizes.config(divisor), dtype=dtype).save_pretrained(path / name)
    save_byte_tokenizer(path / "student")  # TRL does not start without one


class Process:
    """A contender's."""

    def __init__(self, python: Path, environment: dict[str, str], **task: Any):
        self.task = task
        command = [python, Path(__file__).with_name("distill_contenders.py"), json.dumps(task)]
        self.process = subprocess.Popen(
            command, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def turn(self, steps: int, *, memory: bool = False) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([steps, memory]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.task['contender']} ended with status {self.process.wait()}; see above")
        print(self.task["contender"], answer, end="", file=sys.stderr)
        return json.loads(answer)

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(args: argparse.Namespace, pythons: dict[str, Path], task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each contender: the answer to its first turn, and `turns`, the answers to the others."""
    processes: dict[str, Process] = {}
    results: dict[str, dict[str, Any]] = {}
    try:
        for name, python in pythons.items():
            tuned = not (args.default_malloc and name.removesuffix(COMPILED) in OTHERS)
            processes[name] = Process(python, KEEP_FREED_MEMORY if tuned else {}, contender=name, **task)
            results[name] = processes[name].turn(FIRST_STEPS, memory=True) | {"turns": []}
        for _ in range(args.repetitions):
            for name, process in processes.items():
                results[name]["turns"].append(process.turn(1 + args.steps))
    finally:
        for process in processes.values():
            process.end()
    return results


def loss_memory() -> dict[str, int]:
    """Peak bytes of the loss and its gradients alone, by chunked_loss.py."""
    script = str(Path(__file__).with_name("chunked_loss.py"))
    budgets = {"minitron": USUAL, "plain": PLAIN}
    shape = {"vocab": LOSS_VOCAB, "dtype": "bfloat16", "tokens": LOSS_TOKENS, "hidden": 512, "teacher_hidden": 768}
    return {name: in_fresh_process(script, budget_mib=mib, **shape)["bytes"] for name, mib in budgets.items()}


def flops(sizes: Sizes, name: str) -> float:
    """Of one step's matrix products and causal attention: teacher forward, student forward and twice that backward."""

    def forward(divisor: int) -> float:
        config = sizes.config(divisor)
        attention = 2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
        weights = config.num_hidden_layers * config.hidden_size * (attention + 3 * config.intermediate_size)
        if name != "floor":
            weights += config.hidden_size * config.vocab_size
        # Each token sees half of its block on average, in the product with the keys and in that with the values.
        seen = config.num_hidden_layers * config.num_attention_heads * config.head_dim * sizes.block_tokens
        return 2 * (weights + seen) * sizes.batch * sizes.block_tokens

    return forward(1) + 3 * forward(2)


def report(
    args: argparse.Namespace, sizes: Sizes, results: dict[str, dict[str, Any]], loss_bytes: dict[str, int] | None
) -> str:
    def of_turns(name: str, kind: str = "seconds") -> list[float]:
        return [median(turn[kind][1:]) for turn in results[name]["turns"]]

    def ratios(name: str, base: str) -> list[float]:
        return [one / other for one, other in zip(of_turns(name), of_turns(base), strict=True)]

    def row(name: str) -> list[str]:
        seconds = median(of_turns(name))
        cells = [CONTENDERS[name].title, spread(of_turns(name)), f"{median(of_turns(name, 'cpu_seconds')):.2f}"]
        cells.append(spread(ratios(name, "floor")) if "floor" in results else "")
        cells.append(f"{results[name]['bytes'] / MIB:,.0f}")
        if args.peak_tflops:
            cells.append(f"{100 * flops(sizes, name) / seconds / args.peak_tflops / 1e12:.1f} %")
        losses = [results[name]["losses"][0], results[name]["turns"][-1]["losses"][-1]]
        return cells + ([f"{loss:.5f}" for loss in losses] if CONTENDERS[name].loss_is_kl else ["", ""])

    columns = ["", "s/step", "CPU s/step", "ratio to the floor", "peak, MiB", "first loss", "last loss"]
    if args.peak_tflops:
        columns.insert(5, f"of {args.peak_tflops:g} TFLOP/s")
    packages = sorted({(name, number) for one in results.values() for name, number in one["versions"].items()})
    malloc = "glibc's default in the plain loop, TRL and ModelOpt" if args.default_malloc else "the same for all"
    return "\n".join(
        [
            header("Time and memory of a distillation step"),
            f"{models_text(args, sizes)} {sizes.batch} x {sizes.block_tokens} tokens a step on {args.device}, whole; "
            f"products in {args.dtype}, student and optimizer state in float32, teacher in {args.dtype}. "
            f"{args.repetitions} turns each, of {args.steps} timed steps after one that is not; of a turn its median "
            "step, of the turns their median with the fastest and the slowest; a ratio is to the floor's turn of the "
            f"same round. Peak: of the first {FIRST_STEPS} steps, beyond the two models' weights. Freed memory: kept, "
            f"as minitron's command line does; {malloc}.",
            "",
            "The floor computes no head but one column of the student's. The second floor has all products with both "
            "heads in addition, and no softmax. " + utilisation_text(args),
            "",
            table(columns, [row(name) for name in results]),
            "",
            *(f"- {line}" for line in comparisons(results, ratios, loss_bytes)),
            "",
            "Versions: " + ", ".join(f"{name} {number}" for name, number in packages) + ".",
            "",
        ]
    )


def models_text(args: argparse.Namespace, sizes: Sizes) -> str:
    if args.teacher is None:
        return (
            f"Teacher: Llama, hidden {sizes.hidden}, ffn {sizes.ffn}, {sizes.layers} layers, vocab {sizes.vocab:,}; "
            "student: half of each width."
        )
    teacher, student = (
        ", ".join(f"{name} {size:,}" for name, size in asdict(open_checkpoint(path).shape).items())
        for path in (args.teacher, args.student)
    )
    return f"Teacher: {args.teacher.name}, {teacher}; student: {student}."


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def utilisation_text(args: argparse.Namespace) -> str:
    if not args.peak_tflops:
        return ""
    return (
        "The share of the peak counts what a step must compute: products and causal attention, the teacher's once and "
        "the student's three times, with the heads for all but the floor."
    )


def comparisons(results: dict[str, dict[str, Any]], ratios: Any, loss_bytes: dict[str, int] | None) -> list[str]:
    """Ratios of minitron to the contenders that there are."""
    lines = []
    losses = {name: one["losses"][0] for name, one in results.items() if CONTENDERS[name].loss_is_kl}
    if losses:
        apart = max(losses.values()) / min(losses.values()) - 1
        agree = "the same computation" if apart <= TOLERANCE else "NOT the same computation: the comparison is void"
        lines.append(f"First losses are at most {100 * apart:.2g} % apart: {agree}.")
    for ours in ("minitron", "minitron" + COMPILED):
        if ours not in results:
            continue
        title = CONTENDERS[ours].title
        for base in ("floor", "floor_with_heads"):
            if base in results:
                value = median(ratios(ours, base))
                lines.append(f"{title} over the {CONTENDERS[base].title}: {value:.3f}.")
        # What compiles is held against all, what does not against its like.
        ends = ("", COMPILED) if ours.endswith(COMPILED) else ("",)
        others = [name + end for name in OTHERS for end in ends if name + end in results]
        if others:
            value, best = max((median(ratios(ours, name)), name) for name in others)
            lines += [
                f"{title} over the fastest other, {CONTENDERS[best].title}: {value:.3f}.",
                f"Its peak memory over the least of those others: "
                f"{results[ours]['bytes'] / min(results[name]['bytes'] for name in others):.2f}.",
            ]
    if loss_bytes:
        value = loss_bytes["minitron"] / loss_bytes["plain"]
        lines.append(
            f"The loss and its gradients alone, vocab {LOSS_VOCAB:,}, {LOSS_TOKENS} tokens, bfloat16 "
            f"(chunked_loss.py): {loss_bytes['minitron'] / MIB:,.0f} MiB against {loss_bytes['plain'] / MIB:,.0f} with "
            f"full logits: {value:.3f}."
        )
    return lines


if __name__ == "__main__":
    main()
