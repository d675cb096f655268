"""Which of P1's nine aggregators, and which criterion, keeps the most right after a width cut?

python benchmarks/aggregators.py --out FILE
python benchmarks/aggregators.py --model DIR --data text.jsonl --name "a 3M Llama" --out FILE
"""

import argparse
import statistics
import sys
import tempfile
from itertools import product
from pathlib import Path

from lib.even import even_width
from lib.measure import header, publish, table

from minitron.calibration.collect import Statistics, measure_statistics
from minitron.calibration.statistics import CalibrateConfig
from minitron.data.config import DataConfig
from minitron.data.corpus import Corpus, draw_samples
from minitron.data.writing import prepare
from minitron.evaluation.quality import Evaluation, measure_quality
from minitron.model.architecture import Shape
from minitron.model.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from minitron.pruning.config import PruneConfig
from minitron.pruning.cut import cut
from minitron.pruning.plan import choose
from minitron.pruning.steps import score_units
from minitron.recipe import DEMO_TEACHER

# P1's ablation, Nemotron-4 15B -> 8B: (batch, sequence) -> zero-shot LM loss.
PAPER = {
    ("l2", "mean"): 7.18,
    ("mean", "mean"): 7.21,
    ("mean", "variance"): 7.94,
    ("l2", "variance"): 8.18,
    ("mean", "l2"): 8.41,
    ("variance", "mean"): 8.72,
    ("l2", "l2"): 8.73,
    ("variance", "l2"): 9.01,
    ("variance", "variance"): 10.55,
}
TARGETS = ("70%", "50%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_TEACHER)
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--name", default="The demo teacher", help="what the result calls the model")
    parser.add_argument("--samples", type=int, default=256, help="calibration blocks")
    parser.add_argument("--draws", type=int, default=3, help="draws of the calibration blocks, and of random scores")
    parser.add_argument("--blocks", type=int, default=64, help="held-out blocks")
    parser.add_argument("--block-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    with tempfile.TemporaryDirectory() as path:
        corpus = prepare(
            DataConfig(source=args.data),
            load_tokenizer(args.model),
            vocab=checkpoint.shape.vocab,
            block_tokens=args.block_tokens,
            out=Path(path),
        )
        drawn = [draw(checkpoint, corpus, args.samples, seed) for seed in range(args.draws)]
        sections = [section(checkpoint, corpus, drawn, target, args.blocks) for target in TARGETS]
    intro = f"""{args.name}: {checkpoint.shape}.
Held-out LM loss and KL to the teacher right after a cut in width by the default rule, in nats per token, on
{args.blocks} blocks of {args.block_tokens} tokens. Means of {args.draws} draws of {args.samples} calibration blocks (of
`random`: of {args.draws} seeds), with the lowest and the highest.
"""
    publish("\n".join([header("Aggregators and criteria right after the cut"), intro, *sections]), args.out)


def draw(checkpoint: Checkpoint, corpus: Corpus, samples: int, seed: int) -> Statistics:
    return measure_statistics(checkpoint, draw_samples(corpus, samples, seed), CalibrateConfig().as_pass())


def section(checkpoint: Checkpoint, corpus: Corpus, drawn: list[Statistics], target: str, blocks: int) -> str:
    """The table of one target, best loss first."""
    shape = even_width(checkpoint, target)
    configs = {
        (batch, sequence): PruneConfig(batch_aggregate=batch, sequence_aggregate=sequence)  # type: ignore[arg-type]
        for batch, sequence in product(("mean", "l2", "variance"), repeat=2)
    }
    baselines = {("magnitude", ""): PruneConfig(criterion="magnitude"), ("random", ""): PruneConfig(criterion="random")}
    teacher, rows = load_model(checkpoint.path), []
    for name, config in (configs | baselines).items():
        draws = drawn[:1] if name[0] == "magnitude" else drawn
        measured = [
            after_cut(checkpoint, corpus, one, config.model_copy(update={"seed": seed}), shape, blocks, teacher)
            for seed, one in enumerate(draws)
        ]
        losses, divergences = [m.lm_loss for m in measured], [m.kl_to_teacher or 0.0 for m in measured]
        print(target, name, losses, file=sys.stderr)
        rows.append(
            (statistics.mean(losses), [", ".join(filter(None, name)), spread(losses), spread(divergences)], name)
        )
    rows.sort(key=lambda row: row[0])
    order = [name for _, _, name in rows if name in PAPER]
    cells = [[*texts, str(order.index(name) + 1) if name in PAPER else "", paper(name)] for _, texts, name in rows]
    count = checkpoint.architecture.count(shape, checkpoint.config).non_embedding
    columns = ["batch, sequence", "LM loss", "KL", "place", "P1: LM loss, place"]
    share = count / checkpoint.parameters.non_embedding
    agreement = f"Rank correlation with P1's order (Spearman): {spearman(order):.2f}."
    return f"## {share:.0%} of the non-embedding parameters\n\n{shape}\n\n{table(columns, cells)}\n\n{agreement}\n"


def after_cut(
    checkpoint: Checkpoint,
    corpus: Corpus,
    statistics_: Statistics,
    config: PruneConfig,
    shape: Shape,
    blocks: int,
    teacher: object,
) -> Evaluation:
    scores = score_units(statistics_, checkpoint.shape, config)
    with tempfile.TemporaryDirectory() as path:
        cut(checkpoint, choose(scores, checkpoint.shape, shape), Path(path))
        return measure_quality(load_model(Path(path)), corpus.heldout.head(blocks), teacher=teacher)


def spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.3f}" + (f" ({low:.3f} to {high:.3f})" if high > low else "")


def paper(name: tuple[str, str]) -> str:
    return f"{PAPER[name]:.2f}, {list(PAPER).index(name) + 1}" if name in PAPER else ""


def spearman(order: list[tuple[str, str]]) -> float:
    n = len(order)
    squares = sum((place - list(PAPER).index(name)) ** 2 for place, name in enumerate(order))
    return 1 - 6 * squares / (n * (n * n - 1))


if __name__ == "__main__":
    main()
