"""How much faster is a student than its teacher? The demo pair, and the published pairs 8B to 4B at a sixteenth.

    python benchmarks/speed.py [--rounds 5] [--threads 1] [--scratch DIR] [--out FILE]

Llama-3.1-8B against Llama-3.1-Minitron-4B-Width and -Depth has random weights in bfloat16 at the real widths, with one
in sixteen layers and one in sixteen tokens of the vocabulary: every matrix product of a step is as large as in the real
model, or there are sixteen times fewer of them, so that a ratio of times is that of the real models but for what a step
costs besides. Both engines: transformers on the weights as stored, llama.cpp on GGUF files of them.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from full_size import CASES, write_model
from lib.measure import header, publish, table

from minitron import api
from minitron.core.text import rate, short_count, shown, size, with_range
from minitron.evaluation.engines import SpeedOptions, measure_speed
from minitron.gguf.config import QuantizeConfig
from minitron.model.checkpoint import open_checkpoint
from minitron.pruning.cut import cut
from minitron.pruning.importance import even_scores
from minitron.pruning.plan import choose, with_sizes
from minitron.recipe import DEMO_TEACHER

PART = 16
DEMO_SHAPE = {"hidden": 160, "ffn": 448}
LLAMA = CASES["llama-3.1-8b"]
WHOLE = {"num_hidden_layers": 32 // PART, "vocab_size": 128256 // PART}
MODELS = {
    "teacher": WHOLE,
    "width": WHOLE | {"hidden_size": 3072, "intermediate_size": 9216},
    "depth": WHOLE | {"num_hidden_layers": 16 // PART},
}
PUBLISHED = {"width": 1.8, "depth": 2.7}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options: dict[str, Any] = {"rounds": args.rounds, "threads": args.threads}
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="minitron-bench-") as directory:
        work = Path(directory)
        parts = [*of_demo(work, options), *of_published(work, options)]
    publish("\n".join([header("Speed: student against teacher"), INTRODUCTION, *parts]), args.out)


INTRODUCTION = f"""
Median over the rounds, slowest to fastest in brackets; a ratio is the median of the rounds' ratios, each of teacher and
student measured one after the other. Memory is resident memory beyond what the process held before it loaded the model.

The pairs 8B to 4B have one in {PART} layers and one in {PART} tokens of the vocabulary, at the real widths, with random
weights. The papers' figures, {PUBLISHED["width"]}x for width and {PUBLISHED["depth"]}x for depth, are of TensorRT-LLM
in FP8 on an H100, and stand here for orientation: other hardware, other software, other number formats.

Of the last layer llama.cpp computes the MLP for the last token only. So its prefill ratio of the depth pair, two layers
to one at a sixteenth, is not that of 32 layers to 16.
"""


def of_demo(work: Path, options: dict[str, Any]) -> list[str]:
    teacher, student = DEMO_TEACHER, work / "demo-student"
    checkpoint = open_checkpoint(teacher)
    shape = with_sizes(checkpoint.shape, **DEMO_SHAPE)
    student.mkdir()
    cut(checkpoint, choose(even_scores(checkpoint.shape), checkpoint.shape, shape), student)  # which units is no matter
    grid = {"batches": [1, 8], "contexts": [128, 448], "new_tokens": 32}
    pairs = {"transformers, bfloat16": (teacher, student)}
    pairs["llama.cpp, BF16"] = (gguf(teacher, "BF16", work), gguf(student, "BF16", work))
    return [section(f"The demo, {engine}", pair, None, grid | options) for engine, pair in pairs.items()]


def of_published(work: Path, options: dict[str, Any]) -> list[str]:
    made = {}
    for name, changes in MODELS.items():
        place = work / name
        place.mkdir()
        write_model(replace(LLAMA, config=LLAMA.config | changes), place)
        made[name] = place / "model"
        for file in made[name].glob("tokenizer*"):
            file.unlink()  # of bytes, without the merges that llama.cpp asks of one
    grid = {"batches": [1, 8], "contexts": [128, 512], "new_tokens": 12}
    files = {name: gguf(path, "Q4_K_M", work, f"{name}-gguf") for name, path in made.items()}
    return [
        section(f"8B to 4B by {how}, {engine}", (some["teacher"], some[how]), PUBLISHED[how], grid | options)
        for engine, some in (("transformers, bfloat16", made), ("llama.cpp, Q4_K_M", files))
        for how in PUBLISHED
    ]


def gguf(model: Path, kind: str, work: Path, name: str | None = None) -> Path:
    out = work / (name or f"{model.name}-gguf")
    api.quantize(str(model), QuantizeConfig(types=[kind], verify=False), out=out)
    (file,) = out.glob("*.gguf")
    return file


def section(title: str, pair: tuple[Path, Path], published: float | None, options: dict[str, Any]) -> str:
    facts = measure_speed(str(pair[1]), str(pair[0]), SpeedOptions(**options)).to_dict()
    rows = []
    for row in facts["rows"]:
        for name in ("teacher", "student", "ratio"):
            form = "{:.2f}".format if name == "ratio" else rate
            rates = [with_range(row[name][kind], row[name][f"{kind}_range"], form) for kind in ("prefill", "decode")]
            memory = shown(row[name].get("peak_memory_bytes"), size)
            rows.append([f"{row['batch']} x {row['context']}", name, *rates, memory])
    teacher, student = (facts["models"][name] for name in ("teacher", "student"))
    before, after = facts["load_average"]
    busy = " Other work had its share of the machine." if max(before, after) > facts["threads"] + 0.5 else ""
    papers = f" The papers' ratio: {published}x." if published else ""
    large, small = (f"{short_count(one['parameters'])} ({size(one['weight_bytes'])})" for one in (teacher, student))
    text = f"""
## {title}

{large} parameters to {small}; {facts["new_tokens"]} new tokens, {facts["rounds"]} rounds, {facts["threads"]} threads;
load average {before:.1f} before, {after:.1f} after.{busy}{papers}

{table(["batch x context", "", "prefill, tokens/s", "decode, tokens/s", "peak memory"], rows)}
"""
    print(text, flush=True)  # already now: all of them take long
    return text


if __name__ == "__main__":
    main()
