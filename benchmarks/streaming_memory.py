"""Do calibrating and cutting hold more than one decoder layer of weights, plus the embeddings, at a time?

    python benchmarks/streaming_memory.py [--out FILE]

Two random bfloat16 models that differ only in their number of layers (about 1 GB and 4 GB) are written to a temporary
directory, then calibrated and cut, each step in a process of its own. Peaks are beyond what the process held after
its imports. They must not grow with the number of layers.
"""

import argparse
import json
import runpy
import sys
import tempfile
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (lazily imported otherwise, and counted as memory held)
from lib.measure import PeakMemory, header, in_fresh_process, publish, save_byte_tokenizer, table
from transformers import LlamaConfig

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import Statistics
from minitron.model.architecture import Shape
from minitron.model.checkpoint import open_checkpoint
from minitron.model.families.llama import LLAMA
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.model.writing import write_checkpoint
from minitron.pruning.cut import cut
from minitron.pruning.importance import activation_scores
from minitron.pruning.plan import choose, with_sizes

TEACHER = Shape(layers=0, hidden=2048, ffn=5632, heads=32, kv_heads=8, head_dim=64, vocab=32000)
STUDENT = {"hidden": 1024, "ffn": 2816}
LAYERS = (8, 41)  # 1.0 and 4.0 GB
SAMPLES, BLOCK_TOKENS, BATCH = 4, 512, 2
SHARD_BYTES = 500_000_000
MIB = 1 << 20
STEPS = {
    "calibrate": "`measure_statistics`, bfloat16",
    "calibrate-float32": "`measure_statistics`, float32",
    "cut": "`cut`",
    "command-calibrate": "`minitron calibrate`",
    "command-prune": "`minitron prune`",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the result to this Markdown file")
    parser.add_argument("--scratch", type=Path, help="where the models go; needs 7 GB; default the system's")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(**args.child)))
        return
    sizes, peaks = {}, {}
    for layers in LAYERS:
        with tempfile.TemporaryDirectory(dir=args.scratch, prefix="minitron-bench-") as directory:
            work = Path(directory)
            sizes[layers] = write_model(work / "model", layers)
            for step in STEPS:
                peaks[layers, step] = in_fresh_process(__file__, step=step, work=str(work))
                print(layers, step, peaks[layers, step], file=sys.stderr)
    publish(report(sizes, peaks), args.out)


def write_model(path: Path, layers: int) -> dict[str, int]:
    """A random model with a byte tokenizer; returns its bytes by part."""
    shape = with_sizes(TEACHER, layers=layers)
    config = LLAMA.config_for(LlamaConfig(dtype="bfloat16").to_dict() | {"model_type": "llama"}, shape, [])
    specs = list(LLAMA.specs(config, layers))
    generator = torch.Generator().manual_seed(layers)

    def draw(name: str) -> torch.Tensor:
        size = tensors[name][1]
        return (torch.randn(size, generator=generator) / size[-1] ** 0.5 if len(size) > 1 else torch.ones(size)).to(
            torch.bfloat16
        )

    tensors = {spec.name: (torch.bfloat16, spec.shape(shape)) for spec in specs}
    path.mkdir()
    write_checkpoint(
        path, config=config, tensors=tensors, pieces=map(draw, tensors), carry_from=path, shard_bytes=SHARD_BYTES
    )
    save_byte_tokenizer(path)
    elements = {spec.name: torch.Size(spec.shape(shape)).numel() for spec in specs}
    return {
        "model": 2 * sum(elements.values()),
        "layer": 2 * sum(elements[spec.name] for spec in specs if spec.layer == 0),
        "embedding": 2 * elements[LLAMA.embedding],
        "states": 2 * SAMPLES * BLOCK_TOKENS * shape.hidden,
    }


def measure(step: str, work: str) -> dict[str, int]:
    """Run one step; its peaks in bytes."""
    path = Path(work)
    with PeakMemory() as memory:
        {"calibrate": run_calibrate, "cut": run_cut, "command": run_command}[step.partition("-")[0]](path, step)
    return vars(memory.peak)


def run_calibrate(work: Path, step: str) -> None:
    tokens = torch.randint(0, TEACHER.vocab, (SAMPLES, BLOCK_TOKENS), generator=torch.Generator().manual_seed(0))
    dtype = torch.float32 if step.endswith("float32") else torch.bfloat16
    statistics = measure_statistics(open_checkpoint(work / "model"), Samples(tokens), Pass(dtype, batch=BATCH))
    (work / step).mkdir()
    statistics.save(work / step)


def run_cut(work: Path, step: str) -> None:
    checkpoint = open_checkpoint(work / "model")
    scores = activation_scores(Statistics.load(work / "calibrate"), checkpoint.shape, "mean", "l2")
    plan = choose(scores, checkpoint.shape, with_sizes(checkpoint.shape, **STUDENT))
    (work / step).mkdir()
    cut(checkpoint, plan, work / step, shard_bytes=SHARD_BYTES)


def run_command(work: Path, step: str) -> None:
    """`python -m minitron ...`, in this process so that its imports are not counted."""
    text = work / "text.txt"
    text.write_text(Path(runpy.__file__).read_text() * 2)
    verb = step.partition("-")[2]
    command = f"minitron {verb} {work / 'model'} --out {work / step} "
    if verb == "calibrate":
        command += f"--data {text} --samples {SAMPLES} --block-tokens {BLOCK_TOKENS}"
    else:
        command += f"--statistics {work / 'command-calibrate'} --shape hidden=1024,ffn=2816"
    sys.argv = command.split()
    try:
        runpy.run_module("minitron", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, end.code


def report(sizes: dict[int, dict[str, int]], peaks: dict[tuple[int, str], dict[str, int]]) -> str:
    small, large = LAYERS
    parts = [
        [name, *(f"{sizes[layers][part] / MIB:,.0f}" for layers in LAYERS)]
        for part, name in (
            ("model", "model"),
            ("layer", "one layer"),
            ("embedding", "embedding (the output projection is as large)"),
            ("states", "hidden states of the samples, bfloat16"),
        )
    ]
    rows = [
        [
            title,
            *(
                f"{peaks[layers, step][kind] / MIB:,.0f}"
                for layers in LAYERS
                for kind in ("anonymous", "mapped", "total")
            ),
        ]
        for step, title in STEPS.items()
    ]
    growth = max(peaks[large, step]["total"] - peaks[small, step]["total"] for step in STEPS)
    return "\n".join(
        [
            header("Peak memory of calibrating and cutting, one decoder layer at a time"),
            f"hidden {TEACHER.hidden}, ffn {TEACHER.ffn}, vocab {TEACHER.vocab}, bfloat16 on disk; {SAMPLES} samples "
            f"of {BLOCK_TOKENS} tokens; cut to hidden {STUDENT['hidden']}, ffn {STUDENT['ffn']}. MiB:",
            "",
            table(["", *(f"{layers} layers" for layers in LAYERS)], parts),
            "",
            "Peaks beyond what the process held after its imports, MiB. Anonymous memory is sampled every 2 ms; mapped "
            "is resident pages of the checkpoint's files, which the system can take back at any time; total is the "
            "kernel's high-water mark of both.",
            "",
            table(
                [
                    "step",
                    *(f"{layers} layers: {kind}" for layers in LAYERS for kind in ("anonymous", "mapped", "total")),
                ],
                rows,
            ),
            "",
            f"Largest growth of a total from {small} to {large} layers: {growth / MIB:,.0f} MiB, where the model grew "
            f"by {(sizes[large]['model'] - sizes[small]['model']) / MIB:,.0f} MiB.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
