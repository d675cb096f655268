"""The proof of a GGUF file: llama.cpp's logits, compared with transformers' of the unquantized model.

llama.cpp runs in a process of its own, because it answers some faults by ending its process.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as BlockType
from jaxtyping import Float, Int
from torch import Tensor

from minitron.core.errors import CheckpointError, GgufError
from minitron.core.worker import Child, ChildEnded
from minitron.gguf.file import describe_gguf
from minitron.gguf.layouts import Measured
from minitron.gguf.llama_cpp import Runtime
from minitron.model.checkpoint import load_model, open_checkpoint
from minitron.model.logits import logit_transform
from minitron.model.quality_sums import QualitySums, perplexity_of
from minitron.model.samples import Batch
from minitron.model.tokenizer import load_tokenizer
from minitron.model.tokens import prompt_ids, text_ids

# Text in which tokenizers differ: cases, digits, spaces, lines, code, accents, and scripts without spaces.
HARD_TEXT = (
    "It's 12345 o'clock; I'LL pay 3.50 (or 4,999)!\n\n  def f(x_1):\n\treturn x_1**2  # ok?\r\n"
    "Café naïve Straße Łódź — “quoted” … Привет, мир! 漢字かな交じり文 한국어 العربية 🙂👍🏽 \u00a0x   y\n"
)
PROMPT_TOKENS, GENERATED_TOKENS = 8, 24
ROWS_READ_BACK = 32  # rows of each matrix that are read back
# Type of a plain file -> the most KL in nats a token that is rounding. The logits of the families' tiny random models,
# which feel rounding more than those of trained models, have at most 3e-6, 2e-5, 8e-4 and 9e-3.
MOST_KL = {"F32": 1e-3, "F16": 1e-2, "BF16": 1e-2, "Q8_0": 1e-2}


@contextmanager
def prover(model: Path, blocks: Int[Tensor, "blocks tokens"], *, threads: int) -> Iterator[Callable[[Path], Measured]]:
    """In the block, a function that measures files of the unquantized checkpoint `model` on held-out blocks.

    It raises GgufError if llama.cpp cannot run the file, or makes other tokens of a text than the tokenizer.
    """
    with Child() as child:

        def measure(file: Path) -> Measured:
            try:
                return child.call(_measure, file, model, blocks.numpy(), threads)
            except ChildEnded as ended:
                raise process_ended(file, ended) from None

        yield measure


def process_ended(file: Path, ended: ChildEnded) -> GgufError:
    return GgufError(
        f"llama.cpp ended its process when it ran {file} ({ended}); it does so on text that its tokenizer has no "
        "tokens for, and where memory is short"
    )


def _measure(file: Path, model: Path, blocks: np.ndarray, threads: int) -> Measured:
    reference, tokenizer = _reference(model)
    error = _read_back(file, model)
    seen = QualitySums()
    with Runtime(file, context=blocks.shape[1], threads=threads) as runtime:
        alike = None if tokenizer is None else _tokenizes_alike(runtime, tokenizer, blocks, file)
        for block in torch.from_numpy(blocks).long():
            batch = Batch(block[None])
            seen.add_logits(llama_cpp_logits(runtime, batch), logits_of(reference, batch), batch)
        prompt = blocks[0, :PROMPT_TOKENS].tolist()
        made = runtime.generate(prompt, min(GENERATED_TOKENS, blocks.shape[1] - PROMPT_TOKENS))
    if not math.isfinite(seen.reference_nats):
        raise CheckpointError(f"{model}: the model's loss on held-out text is not finite: its weights are damaged")
    if not math.isfinite(seen.nats + seen.kl):
        raise GgufError(
            f"{file}: llama.cpp's logits are not finite, and the model's are: its types are too small for this model's "
            "weights or activations, as F16 is for some; write BF16 or Q8_0"
        )
    text = " ".join(map(str, made)) if tokenizer is None else tokenizer.decode(made)
    return Measured(
        perplexity=perplexity_of(seen.nats),
        kl=seen.kl,
        top1=seen.top1,
        reference_perplexity=perplexity_of(seen.reference_nats),
        tokens=seen.tokens,
        error=error,
        tokenizes_alike=alike,
        text=text,
    )


@lru_cache(1)
def _reference(path: Path) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(path) if (path / "tokenizer.json").exists() else None
    return load_model(path, torch.float32), tokenizer


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> Float[Tensor, "tokens vocab"]:
    """The logits behind each token of one block, by a loaded transformers model in its dtype, in float32."""
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state[0]
    return logit_transform(model)(hidden.float() @ model.get_output_embeddings().weight.float().T)


def llama_cpp_logits(runtime: Runtime, batch: Batch) -> Float[Tensor, "tokens vocab"]:
    """The logits behind each token of one block, whose documents are read one by one."""
    starts = (batch.positions[0] == 0).nonzero().flatten().tolist()
    return torch.cat([runtime.logits(document) for document in batch.tokens[0].tensor_split(starts[1:])])


def _tokenizes_alike(runtime: Runtime, tokenizer: Any, blocks: np.ndarray, file: Path) -> bool:
    for text in (tokenizer.decode(blocks[0].tolist(), skip_special_tokens=True), HARD_TEXT):
        text = readable(tokenizer, text)
        wanted, found = prompt_ids(tokenizer, text), runtime.prompt(text)
        if wanted != found:
            place = first_difference(wanted, found)
            nearby = tokenizer.decode(wanted[max(0, place - 3) : place + 3])
            raise GgufError(
                f"{file}: llama.cpp makes {len(found)} tokens of a text that the tokenizer makes {len(wanted)} of, "
                f"differing from number {place} on, at {nearby!r}: its splitting rule is another; name the right one "
                "with --pre"
            )
    return True


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """The first index at which two sequences differ, or the length of the shorter one."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, pair in pairs if pair[0] != pair[1]), min(len(one), len(other)))


def readable(tokenizer: Any, text: str) -> str:
    """Remove letters that the tokenizer has no tokens for, on which llama.cpp ends its process."""
    letters = {letter for letter in set(text) if _has_tokens(tokenizer, letter)}
    return "".join(letter for letter in text if letter in letters)


def _has_tokens(tokenizer: Any, letter: str) -> bool:
    unknown = tokenizer.unk_token_id
    return unknown is None or unknown not in text_ids(tokenizer, letter)


def _read_back(file: Path, path: Path) -> float:
    """The largest error of a matrix that is read back from the file, over some rows of each."""
    model = describe_gguf(open_checkpoint(path))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    worst = 0.0
    for tensor in model.tensors:
        found = stored.get(tensor.name)
        if found is None or tuple(found.shape.tolist()[::-1]) != tensor.shape:
            raise GgufError(f"{file} has no {tensor.name} of shape {tensor.shape}: it is of another model")
        if not tensor.is_matrix:
            continue
        unit = model.checkpoint.shape.head_dim if model.in_heads(tensor) else 1
        count = min(tensor.shape[0], -(-ROWS_READ_BACK // unit) * unit)
        wanted = model.rows(tensor, 0, count)
        got = torch.from_numpy(gguf.quants.dequantize(np.array(found.data[:count]), BlockType(found.tensor_type)))
        difference = (got - wanted).square().mean() / wanted.square().mean()
        worst = max(worst, difference.sqrt().item())
    return worst
