"""How many calibration samples does it take until scores, the units that stay and a repaired cut have settled?

python benchmarks/calibration_samples.py --out FILE
python benchmarks/calibration_samples.py --model MODEL --data TEXT --block-tokens 512 --counts 16,32,64,128 --out FILE

Half of the samples, as many as the largest count, are a reference of their own: the others have none of its text.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from lib.even import even_width
from lib.measure import header, publish, table

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import CalibrateConfig, Statistics
from minitron.data.config import DataConfig
from minitron.data.corpus import draw_samples
from minitron.data.writing import prepare
from minitron.evaluation.quality import measure_quality
from minitron.gguf.source import model_directory
from minitron.model.architecture import LAYER_DIMS, Shape
from minitron.model.checkpoint import load_model, open_checkpoint
from minitron.model.samples import Samples
from minitron.pruning.config import PruneConfig
from minitron.pruning.importance import Scores
from minitron.pruning.plan import choose
from minitron.pruning.repair import RepairConfig, replaces_channels, resolve_repair
from minitron.pruning.steps import Pruner, Scoring, score_units
from minitron.recipe import DEMO_TEACHER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_TEACHER))
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--name", default="The demo teacher", help="what the result calls the model")
    parser.add_argument("--counts", default="16,32,64,128,256,512,1024", help="numbers of samples, rising")
    parser.add_argument("--cuts", default="16,32,64,128,256,512,1024", help="those of which a cut is made and measured")
    parser.add_argument("--target", default="60%")
    parser.add_argument("--blocks", type=int, default=64, help="held-out blocks")
    parser.add_argument("--block-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    teacher, counts = open_checkpoint(model_directory(args.model)), [int(count) for count in args.counts.split(",")]
    config, cuts = PruneConfig(target=args.target), {int(count) for count in args.cuts.split(",") if count}
    shape = even_width(teacher, args.target)
    repairs = resolve_repair(RepairConfig(), teacher).steps or []
    pass_, basis = CalibrateConfig().as_pass(), replaces_channels(repairs)

    def collect(samples: Samples) -> Statistics:
        return measure_statistics(teacher, samples, pass_, second_moment=basis)

    with tempfile.TemporaryDirectory() as path:
        corpus = prepare(
            DataConfig(source=args.data),
            teacher.tokenizer,
            vocab=teacher.shape.vocab,
            block_tokens=args.block_tokens,
            out=Path(path),
        )
        drawn = draw_samples(corpus, 2 * counts[-1], 0)
        first, second = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
        reference = score_units(collect(second), teacher.shape, config)
        heldout, loaded = corpus.heldout.head(args.blocks), load_model(teacher.path)
        rows, known, done = [], None, 0
        for count in (min(count, len(first)) for count in counts):
            more = collect(first[done:count])
            known, done = more if known is None else added(known, more), count
            scores = score_units(known, teacher.shape, config)
            cells = [f"{count}", f"{count * args.block_tokens:,}", *agreement(scores, reference, teacher.shape, shape)]
            if count in cuts:
                pruner = Pruner(teacher, Scoring(config, first[:count], pass_, teacher.tokenizer), repairs, known)
                with tempfile.TemporaryDirectory() as out:
                    pruner.make(shape, Path(out))
                    kl = measure_quality(load_model(Path(out)), heldout, teacher=loaded).kl_to_teacher
                cells.append(f"{kl:.4f}")
            else:
                cells.append("")
            print(*cells, file=sys.stderr, flush=True)
            rows.append(cells)
    intro = f"""{args.name}: {teacher.shape}, cut to {args.target} of its parameters ({shape}).
`kept` is the share of the units that stay by these samples which stay by {len(second)} other samples too; `tau` is
Kendall's of all units' scores against the other samples'; of dims with a row for each layer the mean over layers. KL of
the cut with the default repairs to the teacher, nats per token on {args.blocks} held-out blocks.
"""
    agreements = [f"{dim} {what}" for dim in DIMS for what in (["kept"] if dim in CUT else []) + ["tau"]]
    columns = ["samples", "tokens", *agreements, "KL of the cut"]
    publish("\n".join([header("Calibration samples"), intro, table(columns, rows), ""]), args.out)


DIMS = ("hidden", *LAYER_DIMS, "layers")
CUT = ("hidden", "ffn")  # dims whose choice is compared, at the share that the cut leaves of the ffn


def added(one: Statistics, other: Statistics) -> Statistics:
    """The statistics of the samples of both."""
    tokens = one.tokens + other.tokens
    first, second = one.tokens / tokens, other.tokens / tokens

    def mixed(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> torch.Tensor | None:
        return None if mine is None or theirs is None else first * mine + second * theirs

    cosine = mixed(one.cosine, other.cosine)
    assert cosine is not None
    return replace(
        one,
        sums={site: sums + other.sums[site] for site, sums in one.sums.items()},
        cosine=cosine,
        second_moment=mixed(one.second_moment, other.second_moment),
        mean=mixed(one.mean, other.mean),
        samples=one.samples + other.samples,
        tokens=tokens,
    )


def agreement(scores: Scores, reference: Scores, teacher: Shape, student: Shape) -> list[str]:
    """The share of kept units in common and Kendall's tau, of each dim."""
    share = student.ffn / teacher.ffn
    smaller = replace(teacher, hidden=round(share * teacher.hidden), ffn=student.ffn)
    kept, other = (choose(one, teacher, smaller) for one in (scores, reference))
    cells = []
    for dim in DIMS:
        mine, theirs = getattr(scores, dim), getattr(reference, dim)
        mine, theirs = (mine, theirs) if mine.dim() == 2 else (mine[None], theirs[None])
        tau = sum(kendall(*pair) for pair in zip(mine, theirs, strict=True)) / len(mine)
        cells += [overlap(getattr(kept, dim), getattr(other, dim))] if dim in CUT else []
        cells.append(f"{tau:.3f}")
    return cells


def overlap(one: list, other: list) -> str:
    pairs = list(zip(one, other, strict=True)) if isinstance(one[0], list | tuple) else [(one, other)]
    return f"{sum(len(set(a) & set(b)) / len(a) for a, b in pairs) / len(pairs):.3f}"


def kendall(one: torch.Tensor, other: torch.Tensor) -> float:
    if len(one) < 2:
        return 1.0
    pairs = torch.triu_indices(len(one), len(one), 1)
    agree = torch.sign(one[pairs[0]] - one[pairs[1]]) * torch.sign(other[pairs[0]] - other[pairs[1]])
    return agree.mean().item()


if __name__ == "__main__":
    main()
