"""The proof of a GGUF file: what llama.cpp makes of it, held against transformers and the unquantized model.

llama.cpp runs in a process of its own, since it answers what it cannot bear by ending its process.
"""

import math
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

from minitron.child import Child, ChildEnded
from minitron.errors import GgufError
from minitron.model.checkpoint import load_model, load_tokenizer, open_checkpoint
from minitron.model.logits import logit_transform
from minitron.model.tokens import prompt_ids, text_ids
from minitron.publish.gguf import describe
from minitron.publish.llama_cpp import Runtime

# What tells tokenizers apart: cases, digits, spaces, lines, code, accents, and scripts without spaces.
HARD_TEXT = (
    "It's 12345 o'clock; I'LL pay 3.50 (or 4,999)!\n\n  def f(x_1):\n\treturn x_1**2  # ok?\r\n"
    "Café naïve Straße Łódź — “quoted” … Привет, мир! 漢字かな交じり文 한국어 العربية 🙂👍🏽 \u00a0x   y\n"
)
PROMPT_TOKENS, GENERATED_TOKENS = 8, 24
ROWS = 32  # of each matrix that are read back


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


class Comparison:
    """Sums over predicted tokens of what one model finds, held against another."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)  # nats, nats of the other, KL, agreeing tokens
        self.tokens = 0

    def add(
        self, wanted: Float[Tensor, "tokens vocab"], found: Float[Tensor, "tokens vocab"], block: Int[Tensor, " tokens"]
    ) -> None:
        """The logits of both behind each token of a block; where one has more rows, of padding, those of both count."""
        both = min(wanted.shape[1], found.shape[1])
        ours, other = found[:-1, :both].log_softmax(-1), wanted[:-1, :both].log_softmax(-1)
        targets = block[1:, None]
        self._sums += torch.stack(
            [
                -ours.gather(1, targets).sum(),
                -other.gather(1, targets).sum(),
                (other.exp() * (other - ours)).sum(),
                (other.argmax(-1) == ours.argmax(-1)).sum(),
            ]
        ).double()
        self.tokens += len(targets)

    @property
    def nats(self) -> float:
        return self._mean(0)

    @property
    def nats_of_other(self) -> float:
        return self._mean(1)

    @property
    def kl(self) -> float:
        return self._mean(2)

    @property
    def top1(self) -> float:
        return self._mean(3)

    def _mean(self, index: int) -> float:
        return (self._sums[index] / self.tokens).item()


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
        except ChildEnded:
            raise GgufError(
                f"llama.cpp ended its process when it ran {file}; it does so on text that its tokenizer has no tokens "
                "for, and where memory is short"
            ) from None


def _measure(file: Path, model: Path, blocks: np.ndarray, threads: int) -> Measured:
    reference, tokenizer = _reference(model)
    error = _read_back(file, model)
    seen = Comparison()
    with Runtime(file, context=blocks.shape[1], threads=threads) as runtime:
        alike = None if tokenizer is None else _tokenizes_alike(runtime, tokenizer, blocks, file)
        for block in torch.from_numpy(blocks).long():
            seen.add(logits_of(reference, block), runtime.logits(block), block)
        prompt = blocks[0, :PROMPT_TOKENS].tolist()
        made = runtime.generate(prompt, min(GENERATED_TOKENS, blocks.shape[1] - PROMPT_TOKENS))
    if not math.isfinite(seen.nats):
        raise GgufError(f"{file}: llama.cpp's logits are not finite: the file is damaged, or its types are too small")
    text = " ".join(map(str, made)) if tokenizer is None else tokenizer.decode(made)
    perplexities = math.exp(seen.nats), math.exp(seen.nats_of_other)
    return Measured(perplexities[0], seen.kl, seen.top1, perplexities[1], seen.tokens, error, alike, text)


@lru_cache(1)
def _reference(path: Path) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(path) if (path / "tokenizer.json").exists() else None
    return load_model(path, torch.float32), tokenizer


@torch.no_grad()
def logits_of(model: Any, block: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens vocab"]:
    """Of a loaded transformers model, in its own dtype up to the float32 logits."""
    hidden = model.base_model(input_ids=block[None], use_cache=False).last_hidden_state[0]
    return logit_transform(model)(hidden.float() @ model.get_output_embeddings().weight.float().T)


def _tokenizes_alike(runtime: Runtime, tokenizer: Any, blocks: np.ndarray, file: Path) -> bool:
    for text in (tokenizer.decode(blocks[0].tolist(), skip_special_tokens=True), HARD_TEXT):
        text = "".join(letter for letter in text if _has_tokens(tokenizer, letter))
        wanted, found = prompt_ids(tokenizer, text), runtime.prompt(text)
        if wanted != found:
            place = next((i for i, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), -1)
            nearby = tokenizer.decode(wanted[max(0, place - 3) : place + 3])
            raise GgufError(
                f"{file}: llama.cpp makes {len(found)} tokens of a text that the tokenizer makes {len(wanted)} of, "
                f"differing from number {place} on, at {nearby!r}: its splitting rule is another; name the right one "
                "with --pre"
            )
    return True


def _has_tokens(tokenizer: Any, letter: str) -> bool:
    unknown = tokenizer.unk_token_id
    return unknown is None or unknown not in text_ids(tokenizer, letter)


def _read_back(file: Path, path: Path) -> float:
    """The largest error of a matrix that is read back from the file, from some rows each."""
    model = describe(open_checkpoint(path))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    worst = 0.0
    for tensor in model.tensors:
        found = stored.get(tensor.name)
        if found is None or tuple(found.shape.tolist()[::-1]) != tensor.shape:
            raise GgufError(f"{file} has no {tensor.name} of shape {tensor.shape}: it is of another model")
        if not tensor.is_matrix:
            continue
        unit = model.checkpoint.shape.head_dim if model.in_heads(tensor) else 1
        count = min(tensor.shape[0], -(-ROWS // unit) * unit)
        wanted = model.rows(tensor, 0, count)
        got = torch.from_numpy(gguf.quants.dequantize(np.array(found.data[:count]), BlockType(found.tensor_type)))
        difference = (got - wanted).square().mean() / wanted.square().mean()
        worst = max(worst, difference.sqrt().item())
    return worst
