"""The proof of a GGUF file: what llama.cpp makes of it, held against transformers and the unquantized model.

llama.cpp runs in a process of its own, since it answers what it cannot bear by ending its process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
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
from minitron.gguf.llama_cpp import Runtime
from minitron.model.checkpoint import load_model, load_tokenizer, open_checkpoint
from minitron.model.logits import logit_transform
from minitron.model.quality_sums import QualitySums, perplexity_of
from minitron.model.samples import Batch
from minitron.model.tokens import prompt_ids, text_ids

# What tells tokenizers apart: cases, digits, spaces, lines, code, accents, and scripts without spaces.
HARD_TEXT = (
    "It's 12345 o'clock; I'LL pay 3.50 (or 4,999)!\n\n  def f(x_1):\n\treturn x_1**2  # ok?\r\n"
    "Café naïve Straße Łódź — “quoted” … Привет, мир! 漢字かな交じり文 한국어 العربية 🙂👍🏽 \u00a0x   y\n"
)
PROMPT_TOKENS, GENERATED_TOKENS = 8, 24
ROWS_READ_BACK = 32  # of each matrix that are read back
# KL in nats a token up to which a file is the model's own, by its type. Of the families' tiny random models, whose
# logits feel rounding more than trained ones', the worst are 3e-6, 2e-5, 8e-4 and 9e-3.
MOST_KL = {"F32": 1e-3, "F16": 1e-2, "BF16": 1e-2, "Q8_0": 1e-2}


@dataclass(frozen=True)
class Measured:
    """One file against the unquantized model, over held-out text.

    perplexity, kl, top1: of llama.cpp's logits; KL in nats a token from transformers' logits of the unquantized model
        in float32, top1 the share of tokens on which both find the same one likeliest.
    reference_perplexity: of the unquantized model.
    tokens: measured on.
    error: of the weights read back from the file, root mean square of the differences as a share of the weights', in
        the worst matrix.
    tokenizes_alike: over held-out and hard text; None without a tokenizer.
    text: what llama.cpp writes after the first held-out tokens; the tokens' numbers without a tokenizer.
    """

    perplexity: float
    kl: float
    top1: float
    reference_perplexity: float
    tokens: int
    error: float
    tokenizes_alike: bool | None
    text: str


class Prover:
    """A process that measures files of one model, one after the other."""

    def __init__(self, model: Path, blocks: Int[Tensor, "blocks tokens"], *, threads: int):
        """
        Args:
            model: the unquantized checkpoint.
            blocks: held-out text.
        """
        self.model, self.blocks, self.threads = model, blocks.numpy(), threads
        self._child = Child()

    def __enter__(self) -> "Prover":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._child.__exit__(kind, error, at)

    def measure(self, file: Path) -> Measured:
        """Raises: GgufError if llama.cpp cannot run the file, or reads text otherwise than the tokenizer."""
        try:
            return self._child.call(_measure, file, self.model, self.blocks, self.threads)
        except ChildEnded as ended:
            raise process_ended(file, ended) from None


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
    ours, reference_perplexity = perplexity_of(seen.nats), perplexity_of(seen.reference_nats)
    return Measured(ours, seen.kl, seen.top1, reference_perplexity, seen.tokens, error, alike, text)


@lru_cache(1)
def _reference(path: Path) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(path) if (path / "tokenizer.json").exists() else None
    return load_model(path, torch.float32), tokenizer


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> Float[Tensor, "tokens vocab"]:
    """Behind each token of one block, of a loaded transformers model in its own dtype up to the float32 logits."""
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state[0]
    return logit_transform(model)(hidden.float() @ model.get_output_embeddings().weight.float().T)


def llama_cpp_logits(runtime: Runtime, batch: Batch) -> Float[Tensor, "tokens vocab"]:
    """Behind each token of one block, each of its documents read anew."""
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
    """The first place in which they differ; the shorter one's end where they do not before."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, pair in pairs if pair[0] != pair[1]), min(len(one), len(other)))


def readable(tokenizer: Any, text: str) -> str:
    """The text without letters that the tokenizer has no tokens for, of which llama.cpp ends its process."""
    letters = {letter for letter in set(text) if _has_tokens(tokenizer, letter)}
    return "".join(letter for letter in text if letter in letters)


def _has_tokens(tokenizer: Any, letter: str) -> bool:
    unknown = tokenizer.unk_token_id
    return unknown is None or unknown not in text_ids(tokenizer, letter)


def _read_back(file: Path, path: Path) -> float:
    """The largest error of a matrix that is read back from the file, from some rows each."""
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
