"""What does repairing at the cut cost on a large model: seconds a layer, and memory?

    python benchmarks/repair_cost.py [--layers 3] [--out FILE]

Random bfloat16 weights of Llama-3.1-8B's layers and vocabulary, but few layers: memory does not depend on their number
and time is proportional to it. The model is calibrated and cut to Llama-3.1-Minitron-4B-Width's hidden and ffn sizes
with each repair, each step in a process of its own. Least squares over 14336 neurons needs as many tokens at least.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from full_size import CASES, GIB, Case, write_model
from lib.measure import PeakMemory, header, in_fresh_process, publish, table

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import Statistics
from minitron.model.checkpoint import open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.pruning.importance import activation_scores
from minitron.pruning.plan import choose, with_sizes
from minitron.pruning.repair import Step
from minitron.pruning.repair.writer import Evidence, repaired_cut

SAMPLES, BLOCK_TOKENS, BATCH = 28, 512, 2
VARIANTS: dict[str, list[Step]] = {
    "plain": [],
    "basis": ["basis"],
    "ffn_least_squares": ["ffn_least_squares"],
    "ffn_obs": ["ffn_obs"],
    "basis, ffn_obs": ["basis", "ffn_obs"],
    "basis, ffn_obs, refit": ["basis", "ffn_obs", "refit"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="these repairs")
    parser.add_argument("--out", type=Path, help="also write the result to this Markdown file")
    parser.add_argument("--scratch", type=Path, help="where the models go; default the system's")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(**args.child)))
        return
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="minitron-bench-") as directory:
        llama = CASES["llama-3.1-8b"]
        write_model(Case(llama.title, llama.config | {"num_hidden_layers": args.layers}, {}, None), Path(directory))
        found = {name: in_fresh_process(__file__, work=directory, name=name) for name in ("calibrate", *args.only)}
        publish(report(found, args.layers), args.out)


def measure(work: str, name: str) -> dict[str, Any]:
    checkpoint = open_checkpoint(Path(work) / "model")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, checkpoint.shape.vocab, (SAMPLES, BLOCK_TOKENS), generator=generator)
    statistics_dir = Path(work) / "statistics"
    with PeakMemory() as memory:
        started = time.monotonic()
        if name == "calibrate":
            found = measure_statistics(
                checkpoint, Samples(tokens), Pass(torch.bfloat16, batch=BATCH), second_moment=True
            )
            statistics_dir.mkdir()
            found.save(statistics_dir)
        else:
            statistics = Statistics.load(statistics_dir)
            scores = activation_scores(statistics, checkpoint.shape)
            plan = choose(scores, checkpoint.shape, with_sizes(checkpoint.shape, hidden=3072, ffn=9216))
            with tempfile.TemporaryDirectory(dir=work) as out:
                repaired_cut(
                    checkpoint,
                    plan,
                    Path(out),
                    VARIANTS[name],
                    Evidence(statistics, scores, Samples(tokens)),
                    Pass(torch.bfloat16, BATCH, scratch=Path(work)),
                )
        seconds = time.monotonic() - started
    return {"seconds": seconds, "anonymous": memory.peak.process}


def report(found: dict[str, Any], layers: int) -> str:
    plain = found["plain"]["seconds"] if "plain" in found else 0.0
    rows = [
        [
            name,
            f"{one['seconds']:.0f}",
            "" if name in ("calibrate", "plain") else f"{(one['seconds'] - plain) / layers:.0f}",
            f"{one['anonymous'] / GIB:.2f}",
        ]
        for name, one in found.items()
    ]
    columns = ["step", "seconds", "seconds a layer beyond the plain cut", "peak of anonymous memory, GiB"]
    return "\n".join(
        [
            header("What repairing at the cut costs"),
            f"Random bfloat16 weights of Llama-3.1-8B's sizes with {layers} layers, cut from hidden 4096 to 3072 and "
            f"ffn 14336 to 9216; {SAMPLES} samples of {BLOCK_TOKENS} tokens. Embedding and output projection, of "
            "128256 rows each, are part of the seconds. Memory is that of the whole process.",
            "",
            table(columns, rows),
            "",
        ]
    )


if __name__ == "__main__":
    main()
