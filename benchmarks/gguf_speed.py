"""How fast are GGUF files written, and in how much memory? At Llama-3.1-8B's widths, with random weights in bfloat16.

    python benchmarks/gguf_speed.py [--layers 32] [--tools DIR] [--threads 2] [--rounds 3] [--scratch DIR] [--out FILE]

Conversions are held against `cp` of the same files, quantization to Q4_K_M against llama.cpp's llama-quantize (in DIR,
see benchmarks/gguf_oracle.py) with as many threads. Each step runs in a process of its own, all steps once in each
round, with the page cache dropped before where that is allowed. Peak memory is anonymous memory beyond what the
process held before.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from full_size import CASES, copy_seconds, drop_caches, sync, write_model
from lib.measure import PeakMemory, header, in_fresh_process, publish, table

from minitron.cli.process import keep_freed_memory
from minitron.gguf.file import describe_gguf
from minitron.gguf.types import mixture, write_quantized
from minitron.model.checkpoint import open_checkpoint

TYPES = ("BF16", "F16", "Q8_0", "Q4_K_M")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tools", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(write(**args.child)))
        return
    case = CASES["llama-3.1-8b"]
    case = replace(case, config=case.config | {"num_hidden_layers": args.layers})
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="minitron-bench-") as directory:
        work = Path(directory)
        write_model(case, work)
        model = work / "model"
        runs: dict[str, list[dict[str, Any]]] = {}

        def note(name: str, step: Callable[[], dict[str, Any]]) -> None:
            drop_caches()
            runs.setdefault(name, []).append(step())
            print(name, runs[name][-1], flush=True)

        for _ in range(args.rounds):
            note("cp", lambda: {"seconds": copy_seconds(model, work / "copy")})
            for kind in TYPES:
                arguments = {"model": str(model), "file": str(work / f"{kind}.gguf"), "kind": kind}
                note(kind, lambda given=arguments: in_fresh_process(__file__, threads=args.threads, **given))
            if args.tools:
                note(
                    "llama-quantize",
                    lambda: by_tool(args.tools, work / "BF16.gguf", work / "theirs.gguf", args.threads),
                )
                same = (
                    (work / "theirs.gguf").read_bytes() == (work / "Q4_K_M.gguf").read_bytes()
                    if args.layers < 8
                    else None
                )
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    publish(report(args, size, runs, same if args.tools else None), args.out)


def write(model: str, file: str, kind: str, threads: int) -> dict[str, Any]:
    keep_freed_memory()  # as every command does
    described = describe_gguf(open_checkpoint(Path(model)))
    start = time.monotonic()
    with PeakMemory() as memory:
        write_quantized(described, mixture(described, kind, informed=False), Path(file), threads=threads)
        sync(Path(file))
    return {"seconds": time.monotonic() - start, "anonymous": memory.peak.anonymous}


def by_tool(tools: Path, source: Path, file: Path, threads: int) -> dict[str, Any]:
    start = time.monotonic()
    command = [str(tools / "llama-quantize"), str(source), str(file), "Q4_K_M", str(threads)]
    subprocess.run(command, capture_output=True, check=True)
    sync(file)
    return {"seconds": time.monotonic() - start}


def report(args: argparse.Namespace, size: int, runs: dict[str, list[dict[str, Any]]], same: bool | None) -> str:
    seconds = {name: [run["seconds"] for run in some] for name, some in runs.items()}
    rows = []
    for name, some in runs.items():
        low, middle, high = min(seconds[name]), statistics.median(seconds[name]), max(seconds[name])
        against = "llama-quantize" if name == "Q4_K_M" else "cp"
        ratio = statistics.median(seconds[against]) / middle if against in seconds else None
        peak = max((run.get("anonymous", 0) for run in some), default=0)
        cells = [name, f"{middle:.1f} ({low:.1f} to {high:.1f})", f"{size / middle / 1e6:,.0f}"]
        cells += ["" if ratio is None or name == against else f"{ratio:.2f} of {against}"]
        rows.append([*cells, f"{peak / 2**20:,.0f}" if peak else ""])
    identical = "" if same is None else f" The two Q4_K_M files are {'equal' if same else 'different'} byte for byte."
    return f"""{header(f"Writing GGUF files: Llama-3.1-8B's widths, {args.layers} layers")}
{size / 1e9:.2f} GB of bfloat16 weights; {args.rounds} rounds, {args.threads} threads. Seconds: median and range, all
bytes on the disk. llama-quantize starts from our BF16 file.{identical}

{table(["step", "seconds", "MB/s of weights", "speed", "peak anonymous, MiB"], rows)}
"""


if __name__ == "__main__":
    main()
