"""What does each GGUF type cost a model, with and without an importance matrix, and do mixtures of our own cost less?

    python benchmarks/ladder.py --model DIR --name NAME [--data D] [--types ...] [--against Q4_K_M,IQ4_XS,Q3_K_M]
        [--threads N] [--out FILE]

Every file is run in llama.cpp over held-out text and held against transformers' logits of the unquantized model in
float32. Mixtures of our own get the bits per weight of the types in --against.
"""

import argparse
import json
import tempfile
from pathlib import Path

from lib.measure import header, publish, table

from minitron import api
from minitron.data.config import DataConfig
from minitron.gguf.config import GGUF_TYPES, QuantizeConfig
from minitron.gguf.file import bits_per_weight, describe_gguf
from minitron.gguf.quantize import TABLE
from minitron.gguf.types import mixture
from minitron.model.checkpoint import open_checkpoint
from minitron.recipe import DEMO_TEACHER

AGAINST = "Q4_K_M,IQ4_XS,Q3_K_M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_TEACHER)
    parser.add_argument("--name", default="the demo teacher")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--heldout")
    parser.add_argument("--types", default=",".join(name for name in GGUF_TYPES if name not in ("F32", "BF16", "F16")))
    parser.add_argument("--against", default=AGAINST)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--threads", type=int, help="default all cores")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, against = describe_gguf(open_checkpoint(args.model)), args.against.split(",")
    bits = {kind: bits_per_weight(model, mixture(model, kind, informed=True).types) for kind in against}
    # The label of a mixture is its bits, so those of the types are said to a hundredth, rounded down.
    floors = {kind: int(100 * value) / 100 for kind, value in bits.items()}
    config = QuantizeConfig(
        types=args.types.split(","),
        bits_per_weight=sorted(set(floors.values()), reverse=True),
        samples=args.samples,
        blocks=args.blocks,
        threads=args.threads,
    )
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "files"
        data = DataConfig(source=args.data, heldout=args.heldout, block_tokens=256)
        api.quantize(str(args.model), config, data, out=out)
        files = {row["name"]: row for row in json.loads((out / TABLE).read_text())["files"]}
    publish(report(args, model.checkpoint.parameters.total, files, bits, floors), args.out)


def report(
    args: argparse.Namespace,
    parameters: int,
    files: dict[str, dict],
    bits: dict[str, float],
    floors: dict[str, float],
) -> str:
    rows = []
    for name, row in files.items():
        seen, other = row["measured"], row["kl_of_other"]
        kls = {row["informed"]: seen["kl"]} | ({not row["informed"]: other} if other is not None else {})
        kls = {key: f"{kl:.5f}" for key, kl in kls.items()}
        cells = [name, f"{row['bytes']:,}", f"{row['bits_per_weight']:.2f}", kls.get(True, ""), kls.get(False, "")]
        rows.append([*cells, f"{seen['top1']:.1%}", f"{seen['perplexity']:.3f}", str(row["fallbacks"])])
    seen = next(iter(files.values()))["measured"]
    compared = []
    for kind, floor in floors.items():
        theirs, ours = files[kind]["measured"]["kl"], files[f"{floor:g}bpw"]["measured"]["kl"]
        cells = [kind, f"{bits[kind]:.3f}", f"{files[f'{floor:g}bpw']['bits_per_weight']:.3f}"]
        compared.append([*cells, f"{theirs:.5f}", f"{ours:.5f}", f"{ours / theirs:.2f}"])
    heads = ["type", "bytes", "bits/weight", "KL, imatrix", "KL, none", "top-1", "perplexity", "fallbacks"]
    return f"""{header(f"The ladder of GGUF files: {args.name}")}
{parameters:,} parameters. KL to the unquantized model in nats a token, over {seen["tokens"]:,} tokens of held-out text
in llama.cpp; the unquantized model's perplexity is {seen["reference_perplexity"]:.3f}. The importance matrix is of
{args.samples} blocks of 256 tokens. Top-1 agreement and perplexity are those of the better of the two files. Fallbacks:
matrices whose rows make no whole blocks of the type they were to have.

{table(heads, rows)}

Mixtures of our own, at no more bits per weight than llama.cpp's mixture with the better of the two files. The
ratio is of our KL to its KL.

{table(["llama.cpp's", "its bits", "our bits", "its KL", "our KL", "ratio"], compared)}
"""


if __name__ == "__main__":
    main()
