"""Is a model read from a GGUF file the model that the file holds? Weights, logits, sizes and tokens.

    python benchmarks/gguf_input.py --model DIR_OR_GGUF [--types F16,Q8_0,Q4_K_M] [--work DIR] [--out FILE]

The checkpoint is written as GGUF by `minitron quantize`, and each file is opened as a model. Its weights are held
against those that the gguf package makes of the file, its logits against those of transformers' own loading of a
checkpoint with these weights and the source's config.json, and against llama.cpp's on the file itself. A model that is
given as a GGUF file is written as a bfloat16 checkpoint first.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from lib.measure import header, publish, table
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM
from transformers.utils.logging import set_verbosity_error

from minitron.gguf.file import names_of
from minitron.gguf.llama_cpp import Runtime
from minitron.gguf.reader import is_gguf
from minitron.gguf.source import model_directory
from minitron.gguf.verify import HARD_TEXT
from minitron.model.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from minitron.model.writing import write_checkpoint

TOKENS = 512  # whose logits are compared
SCRIPTS = "नमस्ते दुनिया สวัสดี مرحبا ١٢٣ 漢字かな 한국어 Ελληνικά 🙂👍🏽 é Ⅷ ½ 1234567 3.14159 -0x1F"
SPACES = [" lead", "  a  b\n\n\n\tc  ", "x" + " " * 40 + "y\u00a0z\r\n", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--types", default="F16,Q8_0,Q4_K_M")
    parser.add_argument("--work", type=Path, help="a directory for checkpoint and files; default one that is removed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    set_verbosity_error()
    with tempfile.TemporaryDirectory() as made:
        work = args.work or Path(made)
        work.mkdir(exist_ok=True)
        source = as_checkpoint(args.model, work)
        command = ["minitron", "quantize", str(source), "--types", args.types, "--no-verify"]
        command += ["--quiet", "--out", str(work / "gguf")]
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
        files = [next((work / "gguf").glob(f"*-{name}.gguf")) for name in args.types.split(",")]
        rows = [compared(source, file, work) for file in files]
    columns = ["file", "sizes equal", "texts with equal tokens", "weights equal", "largest KL to what the file holds"]
    columns += ["KL to llama.cpp", "same first token", "KL to the source", "seconds to load"]
    text = f"""{header("GGUF files read as models")}
The model of `{Path(args.model).name}`, written by `minitron quantize --types {args.types}` without an importance
matrix. Weights: tensors whose values are equal to the gguf package's dequantization of the file, bit for bit. KL in
nats a token, over {TOKENS} tokens of text, in float32: the first of the model that is read against transformers' own
loading of a checkpoint with the gguf package's values, the second against llama.cpp on the file, which rounds the
inputs of products with quantized matrices, the third against the source, which is what quantization costs. Texts are of
numbers, spaces, several scripts and special tokens, with and without the tokens that begin a text.

{table(columns, rows)}
"""
    publish(text, args.out)


def as_checkpoint(model: str, work: Path) -> Path:
    """The directory of a model; of a GGUF file, one that is written with its weights in bfloat16."""
    if not is_gguf(model):
        return Path(model)
    read, out = open_checkpoint(model_directory(model)), work / Path(model).stem
    if not out.exists():
        out.mkdir()
        tensors = {name: (torch.bfloat16, stored.shape) for name, stored in read.stored.items()}
        pieces = (read.read(name).to(torch.bfloat16) for name in tensors)
        write_checkpoint(out, config=read.config, tensors=tensors, pieces=pieces, carry_from=read.path)
    return out


def compared(source: Path, file: Path, work: Path) -> list[str]:
    """A row of the table."""
    own, read = open_checkpoint(source), open_checkpoint(model_directory(str(file)))
    held = values_of(file, own)
    equal = [torch.equal(read.read(name), values) for name, values in held.items()]
    load_model(read.path)  # the first one imports the model's class
    started = time.perf_counter()
    model = load_model(read.path, torch.float32)
    seconds = time.perf_counter() - started
    texts = [HARD_TEXT, SCRIPTS, *SPACES, *specials(source), prose()]
    old, new = load_tokenizer(source), load_tokenizer(read.path)
    pairs = [(tokenizer(text, add_special_tokens=start).input_ids for tokenizer in (old, new)) for text in texts
             for start in (False, True)]  # fmt: skip
    same = [one == other for one, other in pairs]
    ids = torch.tensor(new(prose()).input_ids[:TOKENS])
    logits = logits_of(model, ids)
    direct = logits_of(by_transformers(source, held, work / "held"), ids)
    with Runtime(file, context=TOKENS, threads=torch.get_num_threads(), exact=True) as runtime:
        theirs = runtime.logits(ids).log_softmax(-1)
    original = logits_of(load_model(source, torch.float32), ids)
    row = [
        file.stem.rpartition("-")[2],
        "yes" if read.shape == own.shape and read.config["model_type"] == own.config["model_type"] else "NO",
        f"{sum(same)} of {len(same)}",
        f"{sum(equal)} of {len(read.stored)}",
        f"{divergences(logits, direct).abs().max():.1e}",
        f"{divergences(theirs, logits).mean():.1e}",
        f"{(theirs.argmax(-1) == logits.argmax(-1)).float().mean():.3f}",
        f"{divergences(logits, original).mean():.1e}",
        f"{seconds:.1f}",
    ]
    print(row, flush=True)
    return row


def values_of(file: Path, own: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a file by the names of its source, as the gguf package dequantizes them."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    table = own.architecture.gguf
    assert table is not None
    found: dict[str, Tensor] = {}
    for spec, name in names_of(own.architecture, own.config, own.shape.layers):
        values = gguf.quants.dequantize(np.array(stored[name].data), stored[name].tensor_type)
        if table.in_heads(name):  # llama.cpp's converter lays the pairs of rotary positions side by side
            half = own.shape.head_dim // 2
            values = values.reshape(-1, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if own.architecture.norm_gain_offset and spec.name.endswith("norm.weight"):
            values = values - np.float32(own.architecture.norm_gain_offset)
        found[spec.name] = torch.from_numpy(np.ascontiguousarray(values))
    return found


def by_transformers(source: Path, tensors: dict[str, Tensor], place: Path) -> Any:
    """Transformers' own loading of the source's config with other weights."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copy(source / "config.json", place)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of every next token."""
    found: Tensor = model.eval()(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    return found


def divergences(other: Tensor, reference: Tensor) -> Tensor:
    return kl_div(other, reference, log_target=True, reduction="none").sum(-1)


def specials(source: Path) -> list[str]:
    """Texts with each special token of a tokenizer, and a conversation where it has a template."""
    tokenizer = load_tokenizer(source)
    names = tokenizer.all_special_tokens
    texts = ["".join(f"a {name} b{name}\n" for name in names)]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Hi  there, 12 + 30?"}, {"role": "assistant", "content": "42"}]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    return texts


def prose() -> str:
    """Python source that every machine has."""
    return Path(argparse.__file__).read_text()[:20_000]


if __name__ == "__main__":
    main()
