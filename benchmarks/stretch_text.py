"""Stretch a text that is too short for a benchmark with samples of the model, as many tokens as asked for.

    python benchmarks/stretch_text.py --model DIR --data train.jsonl --tokens 1.7M --out text.jsonl

The same model, text and number give the same file. The samples begin at the model's start token, at temperature 1, and
have at most a block's tokens each. Documents held out must come from a file of their own (`--heldout` of the
benchmarks), for a benchmark on samples would measure what the model says by itself.
"""

import argparse
import sys
from pathlib import Path

from lib.distillations import BLOCK_TOKENS, token_counts

from minitron.cli.process import keep_freed_memory
from minitron.data.config import DataConfig
from minitron.data.sampling import sample_text
from minitron.model.checkpoint import open_checkpoint

SAMPLE_BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a .jsonl file with a field `text`")
    parser.add_argument("--tokens", required=True, help="to sample")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    keep_freed_memory()
    (tokens,) = token_counts(args.tokens)
    # `heldout` says that all samples are for training.
    config = DataConfig(source="teacher", heldout=str(args.data), max_tokens=tokens, sample_batch=SAMPLE_BATCH)
    samples = args.out.with_suffix(".samples.jsonl")
    rows = sample_text(
        open_checkpoint(args.model),
        config,
        samples,
        block_tokens=BLOCK_TOKENS,
        seed=0,
        progress=lambda done, total, note: print(f"\r{done:,} of {total:,} {note}", end="", file=sys.stderr),
    )
    args.out.write_text(args.data.read_text() + samples.read_text())
    print(f"\n{args.out}: {args.data} and {len(rows):,} sampled documents", file=sys.stderr)


if __name__ == "__main__":
    main()
