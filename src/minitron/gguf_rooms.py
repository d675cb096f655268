"""The verbs on GGUF files: writing them, and what other models can do too: inspect, generate, evaluate."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from gguf import GGMLQuantizationType as BlockType
from torch import Tensor

from minitron.core.errors import GgufError, MinitronError
from minitron.core.files import atomic_directory, prove_directory, require_free_space, scratch_directory, scratch_errors
from minitron.core.progress import SILENT, Listener
from minitron.core.worker import Child, ChildEnded
from minitron.data.corpus import Corpus, DataConfig, draw_samples, prepare
from minitron.data.prepare import block_length, corpus_for, keep_sampled
from minitron.evaluation.generate import num_new_tokens, require_temperature
from minitron.evaluation.quality import Evaluation
from minitron.gguf.config import QuantizeConfig
from minitron.gguf.llama_cpp import MOST_THREADS, Runtime
from minitron.gguf.quantize import QUANTIZE_TOKENS, Text, plan_files, quantize, require_possible
from minitron.gguf.reader import GgufFile, is_gguf, read_gguf, require_language_model
from minitron.gguf.tokenizer import file_tokenizer
from minitron.gguf.verify import (
    Comparison,
    first_difference,
    llama_cpp_logits,
    logits_of,
    perplexity,
    process_ended,
    readable,
)
from minitron.model.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint, resolve_model
from minitron.model.naming import model_name
from minitron.model.samples import Batch, Separator
from minitron.model.tokens import require_unicode, text_ids

SAMPLE_BLOCKS = 8  # of text, that are tokenized by llama.cpp too
Result = TypeVar("Result")


def quantize_model(
    model: str,
    config: QuantizeConfig,
    data_config: DataConfig | None,
    *,
    importance_file: Path | None,
    out: Path,
    listener: Listener = SILENT,
) -> dict[str, Any]:
    """Write GGUF files of one model, with their table, and its importance matrix where there is one.

    Args:
        data_config: None for no calibration.
    """
    prove_directory(out, inputs=[model])
    checkpoint = open_checkpoint(resolve_model(model))
    informed = data_config is not None or importance_file is not None
    require_possible(checkpoint, config, informed=informed, importance_file=importance_file)
    with ExitStack() as stack:
        partial, text = stack.enter_context(atomic_directory(out)), None
        require_free_space(out, _bytes_of(checkpoint, config, informed=informed), partial)
        if data_config is not None:
            if data_config.block_tokens is None:
                usual = min(QUANTIZE_TOKENS, block_length(data_config, checkpoint))
                data_config = data_config.model_copy(update={"block_tokens": usual})
            corpus = stack.enter_context(corpus_for(checkpoint, data_config, listener, config.samples, scratch=partial))
            tokens = draw_samples(corpus, config.samples, 0).tokens
            heldout = torch.from_numpy(corpus.heldout.head(config.blocks).select(slice(None)))
            text = Text(tokens, heldout, data_config.source)
            keep_sampled(corpus.path, partial)
        name = model_name(model)
        listener.stage("quantize", "running")
        table = quantize(
            checkpoint, config, partial, text=text, importance_file=importance_file, name=name, listener=listener
        )
    listener.stage("quantize", "done")
    return table


def _bytes_of(checkpoint: Checkpoint, config: QuantizeConfig, *, informed: bool) -> int:
    """Of all files that the config asks for; of a mixture of so many bits, of its matrices alone."""
    mixtures = [bits * checkpoint.parameters.total / 8 for bits in config.bits_per_weight]
    files = [row["bytes"] for row in plan_files(checkpoint, config, informed=informed)]
    return round(sum(files) + sum(config.sizes) + sum(mixtures))


def plan_quantized(model: str, config: QuantizeConfig, *, informed: bool) -> list[dict[str, Any]]:
    """What `quantize_model` would write; no weights are read."""
    return plan_files(open_checkpoint(resolve_model(model)), config, informed=informed)


def inspect_gguf(file: Path) -> dict[str, Any]:
    """What a GGUF file says and holds.

    Raises: GgufError if it is none.
    """
    model = read_gguf(file)
    types: dict[str, int] = {}
    for tensor in model.tensors:
        kind = BlockType(tensor.tensor_type).name
        types[kind] = types.get(kind, 0) + int(tensor.n_elements)
    weights = sum(types.values())
    names = {
        "layers": "block_count",
        "hidden": "embedding_length",
        "ffn": "feed_forward_length",
        "heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "vocab": "vocab_size",
        "context": "context_length",
    }
    long = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
    return {
        "family": model.family,
        "shape": {dim: model.of_family(key) for dim, key in names.items()},
        "parameters": {"total": weights},
        "bytes": file.stat().st_size,
        "bits_per_weight": 8 * sum(int(tensor.n_bytes) for tensor in model.tensors) / weights,
        "types": dict(sorted(types.items(), key=lambda item: -item[1])),
        "keys": {name: value for name, value in model.said.items() if name not in long},
    }


def generate_gguf(file: Path, prompt: str, *, new_tokens: int | None, temperature: float, seed: int) -> str:
    """The continuation of a prompt by llama.cpp."""
    require_temperature(temperature)
    require_unicode(prompt)
    model = read_gguf(file)
    require_language_model(model)
    return _in_child(file, _continued, file, prompt, new_tokens, temperature, seed, model.context)


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
        # Decoded whole and cut: by itself, a continuation loses the space before its first word in some tokenizers.
        return runtime.text(tokens + made)[len(runtime.text(tokens)) :]


def evaluate_gguf(
    file: Path,
    teacher: str | None,
    data_config: DataConfig,
    *,
    blocks: int | None,
    whole: bool,
    listener: Listener = SILENT,
) -> dict[str, Any]:
    """Measure a GGUF file in llama.cpp on the part of the data that a run holds out, or on all of it.

    Args:
        teacher: a model directory or another GGUF file with the same tokenizer.
    """
    model = read_gguf(file)
    require_language_model(model)
    guide = None if teacher is None else _guide(teacher, model)
    with ExitStack() as stack:
        corpus = stack.enter_context(_corpus(model, guide, data_config, whole, listener))
        heldout = corpus.heldout.head(blocks)
        rows = torch.from_numpy(heldout.select(slice(None)))
        child, seen = stack.enter_context(Child()), Comparison()
        pair = _Pair(file, guide, rows.shape[1], heldout.separator)
        try:
            child.call(_require_same_tokens, pair, *_sample(model, guide, rows))
            for number, block in enumerate(rows):
                seen += child.call(_compared, pair, block)
                listener.progress(number + 1, len(rows), "blocks")
        except ChildEnded as ended:
            raise process_ended(file, ended) from None
        batch, text_bytes = Batch(rows, heldout.separator), 0
        if heldout.bytes is not None:
            text_bytes = int(heldout.bytes[:][batch.predicted.numpy()].sum(dtype="int64"))
    if not math.isfinite(seen.nats + seen.kl):
        raise GgufError(f"{file}: the loss in llama.cpp is not finite: the file is damaged, or its types are too small")
    return Evaluation(
        lm_loss=seen.nats,
        perplexity=perplexity(seen.nats),
        bits_per_byte=seen.nats * seen.tokens / math.log(2) / text_bytes if text_bytes else None,
        kl_to_teacher=None if teacher is None else seen.kl,
        top1_agreement=None if teacher is None else seen.top1,
        tokens=seen.tokens,
    ).to_dict()


@dataclass(frozen=True)
class _Pair:
    """A file, and the directory or file that it is held against."""

    file: Path
    guide: Path | None
    block_tokens: int
    separator: Separator | None


def _compared(pair: _Pair, block: Tensor) -> Comparison:
    """One block, in the process that both models stay loaded in."""
    runtime, guide = _loaded(pair)
    batch, seen = Batch(block[None], pair.separator), Comparison()
    seen.add(llama_cpp_logits(runtime, batch), None if guide is None else guide(batch), batch)
    return seen


@lru_cache(1)
def _loaded(pair: _Pair) -> tuple[Runtime, Callable[[Batch], Tensor] | None]:
    runtime = Runtime(pair.file, context=pair.block_tokens, threads=_threads())
    if pair.guide is None:
        return runtime, None
    if pair.guide.is_dir():
        return runtime, partial(logits_of, load_model(pair.guide))
    return runtime, partial(llama_cpp_logits, Runtime(pair.guide, context=pair.block_tokens, threads=_threads()))


def _require_same_tokens(pair: _Pair, texts: list[str], wanted: list[list[int]]) -> None:
    """Raises: GgufError if llama.cpp makes other tokens of a text than those that the model is to be measured on."""
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


def _guide(teacher: str, model: GgufFile) -> Path:
    """The teacher's directory or file.

    Raises: GgufError if it has other tokens.
    """
    if is_gguf(teacher):
        other = read_gguf(Path(teacher))
        require_language_model(other)
        path, rows, tokens = other.path, other.vocab, dict(enumerate(_texts(other)))
    else:
        checkpoint = open_checkpoint(resolve_model(teacher))
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
    model: GgufFile, guide: Path | None, config: DataConfig, whole: bool, listener: Listener
) -> Iterator[Corpus]:
    """Text in the file's own tokens, gone after the block."""
    context = model.context or QUANTIZE_TOKENS
    length = config.block_tokens or min(QUANTIZE_TOKENS, context)
    if length > context:
        raise GgufError(f"--block-tokens {length} is longer than the context of {model.path}, {context} tokens")
    tokenizer = _tokenizer(model, guide)
    with scratch_directory() as path:
        listener.stage("data", "running")
        vocab = max(model.vocab, len(tokenizer))
        options: dict[str, Any] = {"whole": whole, "warn": listener.warn}
        with scratch_errors():
            corpus = prepare(config, tokenizer, vocab=vocab, block_tokens=length, out=path, **options)
        yield corpus


def _tokenizer(model: GgufFile, guide: Path | None) -> Any:
    """The checkpoint's that the file is held against, or the file's own."""
    return load_tokenizer(guide) if guide is not None and guide.is_dir() else file_tokenizer(model.path, model.said)


def _sample(model: GgufFile, guide: Path | None, rows: Tensor) -> tuple[list[str], list[list[int]]]:
    """Some of the text that is measured on, and its tokens."""
    tokenizer = _tokenizer(model, guide)
    decoded = [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in rows[:SAMPLE_BLOCKS]]
    texts = [readable(tokenizer, text) for text in decoded]
    return texts, [text_ids(tokenizer, text) for text in texts]


def _in_child(file: Path, function: Callable[..., Result], *arguments: object) -> Result:
    """What a function that runs a file returns; llama.cpp may end the process that it runs in."""
    with Child() as child:
        try:
            return child.call(function, *arguments)
        except ChildEnded as ended:
            raise process_ended(file, ended) from None


def _threads() -> int:
    return min(os.cpu_count() or 1, MOST_THREADS)
