"""Are our GGUF files those of llama.cpp's own tools? Quantized bytes, the mixtures' rules, and the importance matrix.

    python benchmarks/gguf_oracle.py --tools DIR [--golden tests/golden/quantized.json] [--out FILE]

DIR holds llama-quantize and llama-imatrix, built from the llama.cpp in the sdist of llama-cpp-python:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DGGML_NATIVE=OFF -DLLAMA_CURL=OFF
    cmake --build build --target llama-quantize llama-imatrix

Both quantize the same float32 files, of small models whose rows make whole blocks or do not, with and without the same
importance matrix. --golden writes what llama.cpp made for the tests to hold ours against.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as BlockType
from lib.measure import header, publish, table

from minitron.calibration.collect import measure_statistics
from minitron.core.errors import GgufError
from minitron.gguf.config import GGUF_TYPES
from minitron.gguf.file import GgufModel, describe_gguf, plain_types, write_gguf
from minitron.gguf.imatrix import ImportanceMatrix, importance_of, read_importance, write_importance
from minitron.gguf.types import file_keys, mixture, write_quantized
from minitron.model.checkpoint import open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.model.tokenizer import load_tokenizer
from minitron.recipe import DEMO_TEACHER

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
import golden_models

TYPES = [name for name in GGUF_TYPES if name != "F32"]  # which is what both start from
CHUNK, CHUNKS = 512, 20  # of text, for the importance matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--golden", type=Path)
    parser.add_argument("--text", type=Path, help="for the importance matrix; default Python's own LICENSE text")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows, golden = [], {}
    with tempfile.TemporaryDirectory() as directory:
        for name in golden_models.MODELS:
            work = Path(directory) / name.replace(" ", "-").replace(",", "")
            work.mkdir()
            model = golden_models.model(name, work)
            facts, golden[name] = compared(model, golden_models.importance(model), work, args.tools)
            rows.append([name, *facts])
        matrix = importance_compared(Path(directory), args.tools, args.text)
    if args.golden:
        args.golden.parent.mkdir(exist_ok=True)
        args.golden.write_text(json.dumps(golden, indent=1))
    text = f"""{header("GGUF files against llama.cpp's own tools")}
llama-quantize of llama.cpp as vendored by llama-cpp-python 0.3.36; ours with the quantizer of the xllamacpp wheel. Each
type of {len(TYPES)} with and without an importance matrix: files that are equal byte for byte, of those that both make,
and types that both refuse without one.

{table(["model", "files", "equal", "refused by both", "differing"], rows)}

Importance matrix of the demo teacher in float32 over the same {CHUNKS} chunks of {CHUNK} tokens, ours against
llama-imatrix: {matrix}
"""
    publish(text, args.out)


def compared(
    model: GgufModel, importance: ImportanceMatrix, work: Path, tools: Path
) -> tuple[list[str], dict[str, Any]]:
    """Counts for the table, and llama.cpp's types and a digest of its tensors by file type."""
    plain, matrix, ours, theirs = (work / name for name in ("f32.gguf", "imatrix.gguf", "ours.gguf", "theirs.gguf"))
    write_gguf(model, plain, plain_types(model, BlockType.F32), keys=file_keys("F32", None, ""))
    write_importance(importance, matrix)
    golden: dict[str, Any] = {}
    made = equal = refused = 0
    differing: list[str] = []
    for file_type in TYPES:
        for informed in (False, True):
            label = f"{file_type}{' with importance' if informed else ''}"
            options = ["--imatrix", str(matrix)] if informed else []
            command = [str(tools / "llama-quantize"), *options, str(plain), str(theirs), file_type, "2"]
            theirs.unlink(missing_ok=True)
            failed = subprocess.run(command, capture_output=True).returncode != 0
            try:
                mixed = mixture(model, file_type, informed=informed)
                used = importance if informed else None
                write_quantized(model, mixed, ours, importance=used, importance_file=str(matrix), threads=2)
            except GgufError:
                refused += failed
                differing += [] if failed else [f"{label} refused by ours alone"]
                continue
            made += 1
            if failed:
                differing.append(f"{label} refused by theirs alone")
                continue
            same = ours.read_bytes() == theirs.read_bytes()
            equal += same
            differing += [] if same else [label]
            kinds = [BlockType(tensor.tensor_type).name for tensor in gguf.GGUFReader(theirs).tensors]
            golden[label] = {"types": " ".join(kinds), "sha256": golden_models.digest(theirs)}
            print(f"{model.name}: {label} {'equal' if same else 'DIFFERS'}", file=sys.stderr, flush=True)
    return [str(made), str(equal), str(refused), ", ".join(differing) or "none"], golden


def importance_compared(work: Path, tools: Path, text: Path | None) -> str:
    checkpoint = open_checkpoint(DEMO_TEACHER)
    model, plain = describe_gguf(checkpoint), work / "demo.gguf"
    write_gguf(model, plain, plain_types(model, BlockType.F32), keys=file_keys("F32", None, ""))
    source, theirs = work / "text.txt", work / "theirs.gguf"
    source.write_text(text.read_text() if text else _text())
    tokens = load_tokenizer(checkpoint.path)(source.read_text())["input_ids"]
    assert len(tokens) >= CHUNK * CHUNKS, f"{len(tokens)} tokens are fewer than {CHUNK * CHUNKS}"
    options = ["-c", str(CHUNK), "--chunks", str(CHUNKS), "--no-ppl", "-t", "2"]
    command = [str(tools / "llama-imatrix"), "-m", str(plain), "-f", str(source), "-o", str(theirs), *options]
    subprocess.run(command, capture_output=True, check=True)
    chunks = torch.tensor(tokens[: CHUNK * CHUNKS]).view(CHUNKS, CHUNK)
    statistics = measure_statistics(checkpoint, Samples(chunks), Pass(torch.float32))
    ours = importance_of(
        checkpoint,
        statistics.column_squares(),
        samples=statistics.samples,
        tokens=statistics.tokens,
        source="text",
    )
    found = read_importance(theirs)
    assert found.sums.keys() == ours.sums.keys()
    gaps = [((ours.sums[name] - found.sums[name]).norm() / found.sums[name].norm()).item() for name in ours.sums]
    return (
        f"{len(gaps)} matrices, relative difference of the sums {max(gaps):.1e} at most, counts "
        f"{'equal' if found.counts == ours.counts else 'different'} ({statistics.tokens:,})."
    )


def _text() -> str:
    """Python source that every machine has."""
    return "\n".join(Path(module).read_text() for module in (argparse.__file__, subprocess.__file__, tempfile.__file__))


if __name__ == "__main__":
    main()
