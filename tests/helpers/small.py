"""A tiny teacher with its tokenizer, a small text, and the corpus that they make: what a whole run needs."""

import json
import random
from pathlib import Path
from typing import Any

import tiny

from minitron.data.config import DataConfig
from minitron.data.corpus import Corpus
from minitron.data.writing import prepare
from minitron.model.tokenizer import load_tokenizer

WORDS = "the rain in the plain remains while a grey boat sails home over some wide and windy sea again"


def text(path: Path, documents: int = 60, seed: int = 0) -> Path:
    """A .jsonl file of documents of 40 random words each."""
    draw = random.Random(seed)
    rows = [json.dumps({"text": " ".join(draw.choices(WORDS.split(), k=40))}) for _ in range(documents)]
    path.write_text("\n".join(rows))
    return path


def teacher(path: Path, variant: str = "llama", **changes: Any) -> Path:
    """A model directory with a tokenizer."""
    tiny.checkpoint(variant, path, **changes)
    tiny.tokenizer(path)
    return path


def corpus(path: Path, model: Path, block_tokens: int = 16) -> Corpus:
    path.mkdir()
    config = DataConfig(source=str(text(path / "text.jsonl")), heldout_fraction=0.2)
    return prepare(config, load_tokenizer(model), vocab=tiny.SIZES["vocab_size"], block_tokens=block_tokens, out=path)
