"""A GGUF file continues a prompt in llama.cpp, and is measured there on held-out text."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.core.errors import GgufError, MinitronError
from minitron.core.files import scratch_directory, scratch_errors
from minitron.core.progress import SILENT, Listener
from minitron.core.worker import Child, ChildEnded
from minitron.data.config import DataConfig
from minitron.data.corpus import Corpus
from minitron.data.writing import hold_out_all, prepare
from minitron.evaluation.generate import num_new_tokens, require_temperature
from minitron.evaluation.quality import Evaluation, measured_blocks, predicted_bytes
from minitron.gguf.config import QUANTIZE_TOKENS
from minitron.gguf.llama_cpp import MOST_THREADS, Runtime
from minitron.gguf.reader import GgufFile, is_gguf, read_gguf, require_language_model
from minitron.gguf.source import model_directory
from minitron.gguf.tokenizer import file_tokenizer
from minitron.gguf.verify import first_difference, llama_cpp_logits, logits_of, process_ended, readable
from minitron.model.checkpoint import load_model, load_tokenizer, open_checkpoint
from minitron.model.quality_sums import QualitySums
from minitron.model.samples import Batch, Separator
from minitron.model.tokens import require_unicode, text_ids

TOKENIZED_BLOCKS = 8  # blocks of text to tokenize in llama.cpp too


def generate_gguf(file: Path, prompt: str, *, new_tokens: int | None, temperature: float, seed: int) -> str:
    """Continue a prompt in llama.cpp."""
    require_temperature(temperature)
    require_unicode(prompt)
    model = read_gguf(file)
    require_language_model(model)
    with Child() as child:
        try:
            return child.call(_continued, file, prompt, new_tokens, temperature, seed, model.context)
        except ChildEnded as ended:
            raise process_ended(file, ended) from None


def _continued(
    file: Path, prompt: str, new_tokens: int | None, temperature: float, seed: int, context: int | None
) -> str:
    with Runtime(file, context=8, threads=_threads()) as runtime:
        tokens = runtime.prompt(prompt)
        if not tokens:
            raise MinitronError(
                "the prompt is empty and the tokenizer adds no start token: give at least one character"
            )
        new_tokens = num_new_tokens(len(tokens), new_tokens, context)
        runtime.make_room(len(tokens) + new_tokens)
        made = runtime.generate(tokens, new_tokens, temperature=temperature, seed=seed)
        # Some tokenizers drop the space before the first word of a text, so the whole is decoded and cut.
        return runtime.text(tokens + made)[len(runtime.text(tokens)) :]


def evaluate_gguf(
    file: Path, teacher: str | None, data: DataConfig, *, blocks: int | None, whole: bool, listener: Listener = SILENT
) -> Evaluation:
    """Measure a GGUF file in llama.cpp on the part of the data that a run holds out, or on all of it.

    Args:
        teacher: a model directory or another GGUF file with the same tokenizer.
        blocks: as in `minitron.api.evaluate`.
    """
    model = read_gguf(file)
    require_language_model(model)
    reference = None if teacher is None else _reference(teacher, model)
    with ExitStack() as stack:
        corpus = stack.enter_context(_corpus(model, reference, data, whole, listener))
        heldout = measured_blocks(corpus, blocks, whole=whole)
        rows = torch.from_numpy(heldout.select(slice(None)))
        child, sums = stack.enter_context(Child()), QualitySums()
        pair = _Pair(file, reference, rows.shape[1], heldout.separator)
        try:
            child.call(_require_same_tokens, pair, *_sample(model, reference, rows))
            for number, block in enumerate(rows):
                sums += child.call(_compared, pair, block)
                listener.progress(number + 1, len(rows), "blocks")
        except ChildEnded as ended:
            raise process_ended(file, ended) from None
        text_bytes = predicted_bytes(heldout, slice(None), Batch(rows, heldout.separator))
    if not math.isfinite(sums.nats + sums.kl):
        raise GgufError(f"{file}: the loss in llama.cpp is not finite: the file is damaged, or its types are too small")
    return Evaluation.of(sums, text_bytes=text_bytes, with_teacher=teacher is not None)


@dataclass(frozen=True)
class _Pair:
    """A file, and the directory or file that it is compared with."""

    file: Path
    reference: Path | None
    block_tokens: int
    separator: Separator | None


def _compared(pair: _Pair, block: Tensor) -> QualitySums:
    """Measure one block, in the process that both models stay loaded in."""
    runtime, reference = _loaded(pair)
    batch, sums = Batch(block[None], pair.separator), QualitySums()
    sums.add_logits(llama_cpp_logits(runtime, batch), None if reference is None else reference(batch), batch)
    return sums


@lru_cache(1)
def _loaded(pair: _Pair) -> tuple[Runtime, Callable[[Batch], Tensor] | None]:
    runtime = Runtime(pair.file, context=pair.block_tokens, threads=_threads())
    if pair.reference is None:
        return runtime, None
    if pair.reference.is_dir():
        return runtime, partial(logits_of, load_model(pair.reference))
    return runtime, partial(llama_cpp_logits, Runtime(pair.reference, context=pair.block_tokens, threads=_threads()))


def _require_same_tokens(pair: _Pair, texts: list[str], wanted: list[list[int]]) -> None:
    """Raises: GgufError if llama.cpp makes other tokens of the text that the model is measured on."""
    runtime, _ = _loaded(pair)
    for text, ids in zip(texts, wanted, strict=True):
        found = runtime.tokenize(text, special=False)
        if found != ids:
            place = first_difference(found, ids)
            raise GgufError(
                f"{pair.file}: llama.cpp makes other tokens of the text than its tokenizer does as it is read here, "
                f"from number {place} on, at {runtime.text(found[max(0, place - 3) : place + 3])!r}: give the "
                "checkpoint that the file was made of as --teacher, whose tokenizer is then read"
            )


def _reference(teacher: str, model: GgufFile) -> Path:
    """The teacher's directory or file.

    Raises: GgufError if its tokenizer is another.
    """
    if is_gguf(teacher):
        other = read_gguf(Path(teacher))
        require_language_model(other)
        path, rows, tokens = other.path, other.vocab, dict(enumerate(_texts(other)))
    else:
        checkpoint = open_checkpoint(model_directory(teacher))
        path, rows = checkpoint.path, checkpoint.shape.vocab
        tokens = {index: text for text, index in load_tokenizer(path).get_vocab().items()}
    for index, text in enumerate(_texts(model)):
        padding = text.startswith("[PAD")
        if not padding and (index >= rows or tokens.get(index, text) != text):
            raise GgufError(
                f"{teacher} and {model.path} have different tokenizers: token {index} is {tokens.get(index)!r} of the "
                f"one and {text!r} of the other; KL compares logits token by token, so give the model that the file "
                "was made of"
            )
    return path


def _texts(model: GgufFile) -> list[str]:
    return model.said["tokenizer.ggml.tokens"]


@contextmanager
def _corpus(
    model: GgufFile, reference: Path | None, config: DataConfig, whole: bool, listener: Listener
) -> Iterator[Corpus]:
    """In the block, the text in the tokens of the file."""
    context = model.context or QUANTIZE_TOKENS
    length = config.block_tokens or min(QUANTIZE_TOKENS, context)
    if length > context:
        raise GgufError(f"--block-tokens {length} is longer than the context of {model.path}, {context} tokens")
    if whole:
        config = hold_out_all(config)
    tokenizer = _tokenizer(model, reference)
    with scratch_directory() as path:
        listener.stage("data", "running")
        vocab = max(model.vocab, len(tokenizer))
        with scratch_errors():
            corpus = prepare(config, tokenizer, vocab=vocab, block_tokens=length, out=path, listener=listener)
        yield corpus


def _tokenizer(model: GgufFile, reference: Path | None) -> Any:
    """The tokenizer of the checkpoint that the file is compared with, or else of the file."""
    if reference is not None and reference.is_dir():
        return load_tokenizer(reference)
    return file_tokenizer(model.path, model.said)


def _sample(model: GgufFile, reference: Path | None, rows: Tensor) -> tuple[list[str], list[list[int]]]:
    """Some of the text to measure on, and its tokens."""
    tokenizer = _tokenizer(model, reference)
    decoded = [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in rows[:TOKENIZED_BLOCKS]]
    texts = [readable(tokenizer, text) for text in decoded]
    return texts, [text_ids(tokenizer, text) for text in texts]


def _threads() -> int:
    return min(os.cpu_count() or 1, MOST_THREADS)
