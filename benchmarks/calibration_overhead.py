"""What do calibrating and repairing cost over a plain forward pass of the same tokens?

    python benchmarks/calibration_overhead.py [--model DIR] [--ffn N] [--out FILE]

A random Llama of 1.1 billion parameters in bfloat16, or the model given, fits in memory, so transformers can run it
whole: that is the plain pass, without logits. Calibrating streams the same model from its files, in the same dtype and
batches; so does the cut with --ffn, which repairs the MLPs in closed form (ffn_obs). Its pass is what it takes to go
through the teacher and to sum the products that the repair is solved from. The variants take turns in one process,
after a warm-up on one batch each.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from lib.measure import header, publish, table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from minitron.calibration.collect import measure_statistics
from minitron.cli.process import keep_freed_memory
from minitron.model.checkpoint import load_model, open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass, Stream, default_batch
from minitron.pruning.importance import activation_scores
from minitron.pruning.plan import choose, with_sizes
from minitron.pruning.repair.writer import Evidence, repaired_cut

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
BLOCKS, BLOCK_TOKENS, REPETITIONS = 40, 1024, 5
DTYPE = torch.bfloat16
PLAIN = "plain forward pass"
REPAIR = "the cut of the FFN, with its repair"
FEEDING = "of it, the pass that feeds the repair"
SCORES, MOMENT = "`measure_statistics`", "`measure_statistics`, with the second moment"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the result to this Markdown file")
    parser.add_argument("--scratch", type=Path, help="where the model goes; needs 2.3 GB; default the system's")
    parser.add_argument("--model", type=Path, help="the directory of a checkpoint in the place of random weights")
    parser.add_argument("--ffn", type=int, help="also cut the FFN to so many neurons, with its repair")
    parser.add_argument("--block-tokens", type=int, default=BLOCK_TOKENS)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    args = parser.parse_args()
    keep_freed_memory()  # as the command line does
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="minitron-bench-") as directory:
        path = args.model or Path(directory)
        if args.model is None:
            write_model(path, args.layers)
        vocab, generator = open_checkpoint(path).shape.vocab, torch.Generator().manual_seed(0)
        tokens = torch.randint(0, vocab, (args.blocks, args.block_tokens), generator=generator)
        publish(report(path, tokens, measure(path, tokens, args.repetitions, args.ffn), args), args.out)


def write_model(path: Path, layers: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"num_hidden_layers": layers}, dtype=DTYPE)
    LlamaForCausalLM._from_config(config, dtype=DTYPE).save_pretrained(path)
    gc.collect()


def measure(path: Path, tokens: Tensor, repetitions: int, ffn: int | None) -> dict[str, list[float]]:
    """Seconds of each variant, repetition by repetition."""
    checkpoint = open_checkpoint(path)
    batch = default_batch(checkpoint.shape, tokens.shape[1], DTYPE)
    model = load_model(path, DTYPE).model

    @torch.no_grad()
    def plain(tokens: Tensor) -> None:
        for rows in tokens.split(batch):
            model(input_ids=rows, use_cache=False)

    variants: dict[str, Callable[[Tensor], object]] = {
        PLAIN: plain,
        SCORES: lambda tokens: measure_statistics(checkpoint, Samples(tokens), Pass(DTYPE, batch=batch)),
        MOMENT: lambda tokens: measure_statistics(
            checkpoint, Samples(tokens), Pass(DTYPE, batch=batch), second_moment=True
        ),
    }
    for run in variants.values():
        run(tokens[:batch])
    if ffn is not None:
        statistics_ = measure_statistics(checkpoint, Samples(tokens[:batch]), Pass(DTYPE, batch=batch))
        scores = activation_scores(statistics_, checkpoint.shape)
        plan = choose(scores, checkpoint.shape, with_sizes(checkpoint.shape, ffn=ffn))

        def repaired(tokens: Tensor) -> None:
            evidence = Evidence(statistics_, scores, Samples(tokens))
            with tempfile.TemporaryDirectory(prefix="minitron-bench-") as out:
                repaired_cut(checkpoint, plan, Path(out), ["ffn_obs"], evidence, Pass(DTYPE, batch=batch))

        variants[REPAIR] = repaired
    seconds: dict[str, list[float]] = {name: [] for name in [*variants, *([FEEDING] if ffn else [])]}
    for _ in range(repetitions):
        for name, run in variants.items():
            with _timed_passes() as passes:
                started = time.perf_counter()
                run(tokens)
                seconds[name].append(time.perf_counter() - started)
            print(name, f"{seconds[name][-1]:.2f} s", file=sys.stderr)
            if name == REPAIR:
                seconds[FEEDING].append(sum(passes))
    return seconds


@contextmanager
def _timed_passes() -> Iterator[list[float]]:
    """In the block each layer of a streamed pass adds its seconds to a list, with those of what measures it."""
    seconds: list[float] = []
    advance = Stream.advance

    def timed(self: Stream, index: int, layer: torch.nn.Module, states: Tensor | None = None) -> None:
        started = time.perf_counter()
        advance(self, index, layer, states)
        seconds.append(time.perf_counter() - started)

    with patch.object(Stream, "advance", timed):
        yield seconds


def report(path: Path, tokens: Tensor, seconds: dict[str, list[float]], args: argparse.Namespace) -> str:
    checkpoint = open_checkpoint(path)
    weights = "random" if args.model is None else f"{args.model.name}'s"
    cut_to = "" if args.ffn is None else f" The cut leaves {args.ffn:,} of {checkpoint.shape.ffn:,} neurons."
    rows = []
    for name, times in seconds.items():
        ratios = [one / plain for one, plain in zip(times, seconds[PLAIN], strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        rows.append([name, f"{statistics.median(times):.1f}", f"{statistics.median(ratios):.3f}", spread])
    return "\n".join(
        [
            header("Time of calibrating over a plain forward pass"),
            f"{checkpoint.shape}, bfloat16, {checkpoint.parameters.total:,} parameters, {weights}; "
            f"{tokens.shape[0]} blocks of {tokens.shape[1]} tokens in batches of "
            f"{default_batch(checkpoint.shape, tokens.shape[1], DTYPE)}. "
            f"{len(seconds[PLAIN])} repetitions, the variants in turn; a ratio is to the plain pass of its repetition. "
            f"Calibrating includes reading the weights from the disk, past the page cache.{cut_to}",
            "",
            table(["", "median, s", "median ratio", "ratios"], rows),
            "",
        ]
    )


if __name__ == "__main__":
    main()
