"""Which layers to drop: criteria compared at equal depth, right after the cut and after a short distillation.

python benchmarks/depth.py --out FILE
python benchmarks/depth.py --model DIR --data text.jsonl --task questions.jsonl --name "a 3M Llama" --out FILE
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from lib.measure import header, publish, table

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import CalibrateConfig
from minitron.core.device import compute_dtype, pick_device
from minitron.data.config import DataConfig
from minitron.data.corpus import Corpus, draw_samples
from minitron.data.writing import prepare
from minitron.distillation.config import DistillConfig
from minitron.distillation.schedule import ModelSize, Schedule, resolve
from minitron.distillation.teachers import TeacherSource
from minitron.distillation.train import Training, distill
from minitron.evaluation.quality import measure_quality
from minitron.evaluation.tasks.questions import read_questions
from minitron.model.checkpoint import Checkpoint, load_model, open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.model.tokenizer import load_tokenizer
from minitron.pruning.cut import cut
from minitron.pruning.depth import Measure, Variant, by_loss, by_task, contiguous_blocks, leave_one_out
from minitron.pruning.given import Given
from minitron.pruning.importance import block_influence, even_scores
from minitron.pruning.plan import choose
from minitron.recipe import DEMO_TEACHER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_TEACHER)
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--task", help="a .jsonl file of multiple-choice questions; default: no task criterion")
    parser.add_argument("--name", default="The demo teacher", help="what the result calls the model")
    parser.add_argument("--drop", type=int, nargs="+", default=[1, 2, 3], help="numbers of layers")
    parser.add_argument("--distill", type=int, nargs="*", default=[2, 3], help="those of them to distil")
    parser.add_argument("--samples", type=int, default=128, help="calibration blocks")
    parser.add_argument("--blocks", type=int, default=64, help="held-out blocks")
    parser.add_argument("--block-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=250_000, help="distillation tokens of each student")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    with tempfile.TemporaryDirectory() as path:
        work = Path(path)
        (work / "corpus").mkdir()
        corpus = prepare(
            DataConfig(source=args.data),
            load_tokenizer(args.model),
            vocab=checkpoint.shape.vocab,
            block_tokens=args.block_tokens,
            out=work / "corpus",
        )
        tokens = draw_samples(corpus, args.samples, seed=0).tokens
        scores = layer_scores(checkpoint, tokens, args.task)
        sections = [section(args, checkpoint, corpus, tokens, scores, count, work) for count in args.drop]
    scored = [[name, *(f"{value:.3f}" for value in of.tolist())] for name, of in scores.items()]
    intro = f"""{args.name}: {checkpoint.shape}.
Layers are scored on {args.samples} blocks of {args.block_tokens} tokens, students measured on {args.blocks} held-out
blocks, in nats per token, and distilled on {args.tokens:,} tokens each, with the same blocks in the same order.

{table(["score of layer", *map(str, range(checkpoint.shape.layers))], scored)}
"""
    publish("\n".join([header("Which layers to drop"), intro, *sections]), args.out)


def layer_scores(checkpoint: Checkpoint, tokens: torch.Tensor, task: str | None) -> dict[str, torch.Tensor]:
    """The criteria whose scores do not depend on how many layers are dropped."""
    num_layers = checkpoint.shape.layers
    dtype = compute_dtype("auto", pick_device())
    found = {
        "block influence": block_influence(
            measure_statistics(checkpoint, Samples(tokens), CalibrateConfig().as_pass())
        ),
        "loss": leave_one_out(by_loss(checkpoint, Samples(tokens), Pass(dtype)), num_layers),
    }
    if task is not None:
        tokenizer, questions = load_tokenizer(checkpoint.path), read_questions(task)
        found["task"] = leave_one_out(
            by_task(checkpoint, questions, tokenizer, tokens.shape[1], Pass(dtype)), num_layers
        )
    return found


def lowest(scores: torch.Tensor, count: int) -> Variant:
    return frozenset(scores.argsort(stable=True)[:count].tolist())


def one_by_one(measure: Measure, num_layers: int, count: int) -> Variant:
    """Drop the layer that costs the least loss, then score again without it: as many iterations as layers."""
    dropped: Variant = frozenset()
    for _ in range(count):
        candidates = [dropped | {layer} for layer in range(num_layers) if layer not in dropped]
        dropped = candidates[int(measure(candidates).argmin())]
    return dropped


def section(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    corpus: Corpus,
    tokens: torch.Tensor,
    scores: dict[str, torch.Tensor],
    count: int,
    work: Path,
) -> str:
    """The table of one number of dropped layers."""
    num_layers = checkpoint.shape.layers
    measure = by_loss(checkpoint, Samples(tokens), Pass(compute_dtype("auto", pick_device())))
    chosen = {name: lowest(of, count) for name, of in scores.items()}
    chosen["loss one by one"] = one_by_one(measure, num_layers, count)
    chosen["contiguous"] = lowest(contiguous_blocks(measure, num_layers, count), count)
    every = [frozenset(layers) for layers in combinations(range(num_layers), count)]
    losses = measure(every)
    chosen["best of all by loss"] = every[int(losses.argmin())]
    by_layers: dict[Variant, list[str]] = {}
    for name, layers in chosen.items():
        by_layers.setdefault(layers, []).append(name)
    rows = []
    for layers, names in by_layers.items():
        numbers = ", ".join(map(str, sorted(layers)))
        rows.append(
            [", ".join(names), numbers, *measured(args, checkpoint, corpus, layers, work, count in args.distill)]
        )
        print(rows[-1], file=sys.stderr)
    rows.sort(key=lambda row: float(row[2]))
    columns = ["criteria", "dropped layers", "loss after the cut", "KL", "loss after distilling", "KL"]
    if count not in args.distill:
        rows, columns = [row[:4] for row in rows], columns[:4]
    rest = f"All {len(every)} choices of {count} layers, on the calibration blocks: loss {losses.min():.3f} to "
    rest += f"{losses.max():.3f}, mean {losses.mean():.3f}, median {losses.median():.3f}."
    return f"## {count} of {num_layers} layers dropped\n\n{table(columns, rows)}\n\n{rest}\n"


def measured(
    args: argparse.Namespace, checkpoint: Checkpoint, corpus: Corpus, dropped: Variant, work: Path, distilled: bool
) -> list[str]:
    """Loss and KL after the cut, and after distilling."""
    kept = tuple(layer for layer in range(checkpoint.shape.layers) if layer not in dropped)
    shape = checkpoint.shape
    plan = choose(even_scores(shape), shape, replace(shape, layers=len(kept)), Given(layers=kept))
    teacher, heldout = load_model(checkpoint.path), corpus.heldout.head(args.blocks)
    with tempfile.TemporaryDirectory(dir=work) as path:
        pruned, student, state = (Path(path) / name for name in ("pruned", "student", "state"))
        for directory in (pruned, student, state):
            directory.mkdir()
        cut(checkpoint, plan, pruned)
        before = measure_quality(load_model(pruned), heldout, teacher=teacher)
        values = [before.lm_loss, before.kl_to_teacher]
        if distilled:
            weights_rms = checkpoint.weights_rms
            config = resolve(
                DistillConfig(tokens=args.tokens),
                ModelSize(plan.student, weights_rms),
                ModelSize(checkpoint.shape, weights_rms),
                block_tokens=corpus.block_tokens,
                train_tokens=corpus.train_tokens,
            )
            schedule = Schedule.of_student(config, corpus.block_tokens, 0)
            distill(Training(pruned, TeacherSource(checkpoint.path), corpus, schedule, state), student)
            after = measure_quality(load_model(student), heldout, teacher=teacher)
            values += [after.lm_loss, after.kl_to_teacher]
    return [f"{value or 0.0:.3f}" for value in values] + [""] * (4 - len(values))


if __name__ == "__main__":
    main()
