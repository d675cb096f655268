"""A probe: a small teacher and student with layers of the real sizes, on which the work of a run is timed.

Weights and tokens are random, for the time that work takes does not depend on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron.data.corpus import Corpus
from minitron.model.architecture import Architecture, Shape
from minitron.model.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from minitron.model.writing import write_checkpoint

# A probe has as many layers, and as many rows of its vocabulary, as have about so many parameters.
LAYER_PARAMETERS, VOCABULARY_PARAMETERS = 8_000_000, 32_000_000
LEAST_VOCABULARY = 512
TRAIN_BLOCKS, HELDOUT_BLOCKS = 64, 16
WEIGHTS_RMS = 0.02


@dataclass(frozen=True)
class Modelled:
    """A model that a probe stands for.

    dtype: that its weights are stored in.
    path: the directory whose tokenizer it has.
    """

    architecture: Architecture
    config: Mapping[str, Any]
    shape: Shape
    dtype: torch.dtype
    path: Path

    @classmethod
    def of(cls, model: Checkpoint | ModelConfig, shape: Shape | None = None) -> "Modelled":
        """Describe a model, or what is made of it with another shape."""
        shape = shape or model.shape
        config = model.architecture.config_for(model.config, shape, list(range(shape.layers)))
        return cls(model.architecture, config, shape, model.written_dtype, model.path)

    @property
    def layer_parameters(self) -> int:
        """The parameters of one layer."""
        return self.architecture.count(self.shape, self.config).non_embedding // self.shape.layers


@dataclass(frozen=True)
class ProbeSize:
    """The layers of a probe's teacher and student, and the rows of their vocabulary."""

    layers: int
    student_layers: int
    vocab: int


@dataclass(frozen=True)
class Probe:
    """The models and the text of a probe.

    path: its directory, with room for more.
    """

    size: ProbeSize
    teacher: Checkpoint
    student: Checkpoint
    corpus: Corpus
    path: Path


def probe_sizes(teacher: Modelled, student: Modelled) -> list[ProbeSize]:
    """Return the sizes of the probes: one where that is the whole model, else two that differ in the vocabulary."""
    shape = teacher.shape
    layers = min(shape.layers, max(1, LAYER_PARAMETERS // teacher.layer_parameters))
    of_student = max(1, round(layers * student.shape.layers / shape.layers))
    vocab = min(shape.vocab, max(LEAST_VOCABULARY, VOCABULARY_PARAMETERS // shape.hidden))
    first = ProbeSize(layers, of_student, vocab)
    if (layers, vocab) == (shape.layers, shape.vocab):
        return [first]
    return [first, replace(first, vocab=max(LEAST_VOCABULARY // 2, vocab // 8))]


def make_probe(teacher: Modelled, student: Modelled, size: ProbeSize, block_tokens: int, path: Path) -> Probe:
    """Write the models and the text of a probe into the existing directory `path`."""
    made = {}
    for name, model, layers in (("teacher", teacher, size.layers), ("student", student, size.student_layers)):
        (path / name).mkdir()
        made[name] = _write(model, replace(model.shape, layers=layers, vocab=size.vocab), path / name)
    return Probe(size, made["teacher"], made["student"], _random_corpus(path, block_tokens, size.vocab), path)


def _write(model: Modelled, shape: Shape, out: Path) -> Checkpoint:
    config = model.architecture.config_for(model.config, shape, list(range(shape.layers)))
    if (config.get("pad_token_id") or 0) >= shape.vocab:
        config["pad_token_id"] = None
    specs = list(model.architecture.specs(config, shape.layers))
    generator = torch.Generator().manual_seed(0)

    def weights(size: tuple[int, ...]) -> torch.Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=model.dtype)
        return torch.empty(size).normal_(0, WEIGHTS_RMS, generator=generator).to(model.dtype)

    write_checkpoint(
        out,
        config=config,
        tensors={spec.name: (model.dtype, spec.shape(shape)) for spec in specs},
        pieces=(weights(spec.shape(shape)) for spec in specs),
        carry_from=model.path if shape.vocab == model.shape.vocab else out,  # a tokenizer needs all its rows
    )
    return open_checkpoint(out)


def _random_corpus(path: Path, block_tokens: int, vocab: int) -> Corpus:
    """Write a corpus of random tokens, of which no document is apart."""
    numbers, counts = np.random.default_rng(0), {"train": TRAIN_BLOCKS, "heldout": HELDOUT_BLOCKS}
    tokens = {name: blocks * block_tokens for name, blocks in counts.items()}
    for name, count in tokens.items():
        numbers.integers(vocab, size=count, dtype=np.uint32).tofile(path / f"{name}.bin")
    np.ones(tokens["heldout"], np.uint16).tofile(path / "heldout_bytes.bin")
    return Corpus(
        path=path,
        block_tokens=block_tokens,
        dtype="uint32",
        delimiter="none",
        train_documents=1,
        train_tokens=tokens["train"],
        heldout_documents=1,
        heldout_tokens=tokens["heldout"],
        digest="",
    )
