"""The verbs on GGUF files: writing them, and what other models can do too: inspect, generate, evaluate."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as BlockType
from torch import Tensor

from minitron import data
from minitron.errors import GgufError, MinitronError
from minitron.files import atomic_directory, prove_directory, require_room, scratch_directory, scratch_errors
from minitron.model.checkpoint import Checkpoint, load_model, open_checkpoint, resolve_model
from minitron.prune.calibrate import CalibrateConfig
from minitron.publish.ladder import QuantizeConfig
from minitron.publish.llama_cpp import Runtime
from minitron.publish.verify import Comparison, logits_of
from minitron.quantizing import QUANTIZE_TOKENS, Text, plan_files, quantize, require_possible
from minitron.rooms import corpus_for, keep_sampled
from minitron.rundir import SILENT, Listener
from minitron.stages import block_length, calibration_tokens

SUFFIX = ".gguf"


def quantize_model(
    model: str,
    config: QuantizeConfig,
    data_config: data.DataConfig | None,
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
    require_possible(checkpoint, config, informed=informed)
    with ExitStack() as stack:
        partial, text = stack.enter_context(atomic_directory(out)), None
        require_room(out, _bytes_of(checkpoint, config, informed=informed), partial)
        if data_config is not None:
            if data_config.block_tokens is None:
                usual = min(QUANTIZE_TOKENS, block_length(data_config, checkpoint))
                data_config = data_config.model_copy(update={"block_tokens": usual})
            corpus = stack.enter_context(corpus_for(checkpoint, data_config, listener, config.samples, scratch=partial))
            tokens = calibration_tokens(corpus, CalibrateConfig(samples=config.samples), 0)
            heldout = torch.from_numpy(corpus.heldout.head(config.blocks).select(slice(None)))
            text = Text(tokens, heldout, data_config.source)
            keep_sampled(corpus.path, partial)
        name = checkpoint.path.resolve().name
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
    try:
        reader = gguf.GGUFReader(file)
        said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        family = said["general.architecture"]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise GgufError(f"{file} is no GGUF file of a model: {error}") from None
    types: dict[str, int] = {}
    for tensor in reader.tensors:
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
        "family": family,
        "shape": {dim: said.get(f"{family}.{key}") for dim, key in names.items()},
        "parameters": {"total": weights},
        "bytes": file.stat().st_size,
        "bits_per_weight": 8 * sum(int(tensor.n_bytes) for tensor in reader.tensors) / weights,
        "types": dict(sorted(types.items(), key=lambda item: -item[1])),
        "keys": {name: value for name, value in said.items() if name not in long},
    }


def generate_gguf(file: Path, prompt: str, *, new_tokens: int, temperature: float, seed: int) -> str:
    """The continuation of a prompt by llama.cpp."""
    if temperature < 0:
        raise MinitronError(f"temperature {temperature} is negative; 0 is greedy, and higher is more random")
    room = len(prompt.encode()) + new_tokens + 8
    with Runtime(file, context=room, threads=os.cpu_count() or 1) as runtime:
        tokens = runtime.tokenize(prompt)
        if not tokens:
            raise MinitronError(
                "the prompt is empty and the tokenizer adds no start token: give at least one character"
            )
        made = runtime.generate(tokens, new_tokens, temperature=temperature, seed=seed)
        # Decoded whole and cut: by itself, a continuation loses the space before its first word in some tokenizers.
        return runtime.text(tokens + made)[len(runtime.text(tokens)) :]


def evaluate_gguf(
    file: Path,
    teacher: str | None,
    data_config: data.DataConfig,
    *,
    blocks: int | None,
    whole: bool,
    listener: Listener = SILENT,
) -> dict[str, Any]:
    """Measure a GGUF file in llama.cpp on the part of the data that a run holds out, or on all of it.

    Args:
        teacher: a model directory or another GGUF file with the same tokenizer.
    """
    if whole:
        data_config = data_config.model_copy(update={"heldout": data_config.source})
    with ExitStack() as stack:
        facts = inspect_gguf(file)
        corpus = stack.enter_context(_corpus(file, facts, data_config, listener))
        rows = corpus.heldout.head(blocks).select(slice(None))
        threads, length = os.cpu_count() or 1, rows.shape[1]
        runtime = stack.enter_context(Runtime(file, context=length, threads=threads))
        guide: Callable[[Tensor], Tensor] | None = None
        if teacher is not None and teacher.endswith(SUFFIX):
            guide = stack.enter_context(Runtime(Path(teacher), context=length, threads=threads)).logits
        elif teacher is not None:
            guide = partial(logits_of, load_model(open_checkpoint(resolve_model(teacher)).path))

        seen = Comparison()
        for number, block in enumerate(torch.from_numpy(np.array(rows)).long()):
            found = runtime.logits(block)
            seen.add(found if guide is None else guide(block), found, block)
            listener.progress(number + 1, len(rows), "blocks")
        text_bytes = None if corpus.heldout.bytes is None else int(corpus.heldout.bytes[: len(rows), 1:].sum())
    return {
        "lm_loss": seen.nats,
        "perplexity": math.exp(seen.nats) if seen.nats < 700 else math.inf,
        "bits_per_byte": seen.nats * seen.tokens / math.log(2) / text_bytes if text_bytes else None,
        "kl_to_teacher": None if teacher is None else seen.kl,
        "top1_agreement": None if teacher is None else seen.top1,
        "tokens": seen.tokens,
    }


@contextmanager
def _corpus(file: Path, facts: dict[str, Any], config: data.DataConfig, listener: Listener) -> Iterator[data.Corpus]:
    """Text in the file's own tokens, gone after the block."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise GgufError(f"{file} has no tokenizer that transformers can read: {error}") from None
    context = facts["shape"]["context"] or QUANTIZE_TOKENS
    length = config.block_tokens or min(QUANTIZE_TOKENS, context)
    with scratch_directory() as path:
        listener.stage("data", "running")
        vocab = facts["shape"]["vocab"] or len(tokenizer)
        with scratch_errors():
            corpus = data.prepare(config, tokenizer, vocab=vocab, block_tokens=length, out=path)
        yield corpus
