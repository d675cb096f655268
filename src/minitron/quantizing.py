"""From a checkpoint to a proven ladder of GGUF files, as the command line and a run do it."""

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as BlockType
from jaxtyping import Int
from torch import Tensor

from minitron.errors import GgufError
from minitron.model.checkpoint import Checkpoint
from minitron.prune.calibrate import calibrate
from minitron.publish.formats import size
from minitron.publish.gguf import GgufModel, bits_per_weight, describe, file_bytes, weights_bytes
from minitron.publish.imatrix import ImportanceMatrix, importance_of, read_importance, write_importance
from minitron.publish.ladder import LADDER, UNINFORMED, QuantizeConfig
from minitron.publish.mixing import SAMPLE_BLOCKS, Damage, best_mixture, measure_damage, smallest_mixture
from minitron.publish.quantize import (
    Mixture,
    fixed_types,
    mixture,
    quantized_bytes,
    require_importance,
    write_quantized,
)
from minitron.publish.verify import Measured, Prover
from minitron.rundir import SILENT, Listener

QUANTIZE_TOKENS = 512  # of a block, at most: llama.cpp's own tool reads so many at a time
IMPORTANCE, TABLE = "imatrix.gguf", "quantization.json"


@dataclass(frozen=True)
class Text:
    """Text for calibration and for measuring, as blocks of token ids, and where it is from."""

    calibration: Int[Tensor, "samples tokens"]
    heldout: Int[Tensor, "blocks tokens"]
    source: str


@dataclass(frozen=True)
class File:
    """One row of the table.

    informed: by the importance matrix. fallbacks: how many matrices do not have the type they were to have, since their
    columns make no whole blocks of it. measured: None where it was not verified. kl_of_other: where the same type was
    tried with and without the importance matrix, the KL of the file that was not kept.
    """

    name: str
    file: str
    bytes: int
    bits_per_weight: float
    informed: bool
    fallbacks: int
    digest: str
    measured: Measured | None
    kl_of_other: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_files(checkpoint: Checkpoint, config: QuantizeConfig, *, informed: bool) -> list[dict[str, Any]]:
    """What `quantize` would write, by size; mixtures of one's own are chosen later, and left out.

    Args:
        informed: whether there will be an importance matrix.
    """
    model, overrides = require_possible(checkpoint, config, informed=informed)
    rows = []
    for name in config.types:
        mixed = mixture(model, name, informed=informed, overrides=overrides)
        count = quantized_bytes(model, mixed, None)
        fallbacks = {tensor: [was.name, mixed.types[tensor].name] for tensor, was in mixed.fallbacks.items()}
        bits = bits_per_weight(model, mixed.types)
        rows.append({"name": name, "bytes": count, "bits_per_weight": bits, "fallbacks": fallbacks})
    return rows


def require_possible(
    checkpoint: Checkpoint, config: QuantizeConfig, *, informed: bool, name: str | None = None
) -> tuple[GgufModel, dict[str, BlockType]]:
    """The model as a file describes it, and the config's types of single tensors.

    Raises: GgufError for what can be known before any text is read.
    """
    overrides = {pattern: BlockType[kind] for pattern, kind in config.tensor_types.items()}
    model = describe(checkpoint, name=name, pre=config.pre)
    fixed = fixed_types(model, overrides)
    if not informed:
        for kind in config.types:
            require_importance(model, mixture(model, kind, informed=False, overrides=overrides))
    smallest = smallest_mixture(model, fixed).types
    for bits in config.bits_per_weight:
        if bits < bits_per_weight(model, smallest):
            raise GgufError(
                f"{bits:g} bits per weight are too few: this model's smallest types have "
                f"{bits_per_weight(model, smallest):.2f}; rows that are no multiple of 256, and types given to single "
                "tensors, make it more"
            )
    for most in config.sizes:
        least = file_bytes(model, smallest, {})
        if most < least:
            raise GgufError(f"a file of {size(most)} is too small: the smallest has {size(least)}")
    return model, overrides


def quantize(
    checkpoint: Checkpoint,
    config: QuantizeConfig,
    out: Path,
    *,
    text: Text | None,
    importance_file: Path | None = None,
    name: str | None = None,
    listener: Listener = SILENT,
) -> dict[str, Any]:
    """Write the files of the config into the existing directory `out`, with their table; returns the table.

    Args:
        text: None without calibration: then types that need an importance matrix take that of `importance_file`, and
            nothing is verified.
        name: of the model, in the files and in front of their names.

    Raises: GgufError for a model, type or importance matrix that makes no such file, and for a file that llama.cpp
        does not run like the model.
    """
    informed = text is not None or importance_file is not None
    model, overrides = require_possible(checkpoint, config, informed=informed, name=name)
    for note in model.notes:
        listener.warn(note)
    if config.verify and text is None:
        raise GgufError("verifying needs text: give --calibration TEXT, or --no-verify")
    if (config.bits_per_weight or config.sizes) and text is None:
        raise GgufError("a mixture of minitron's own needs text to measure on: give --calibration TEXT")
    importance = _importance(checkpoint, text, importance_file, out, listener)
    work = _Work(model, overrides, config, out, importance, text, listener)
    rows = []
    with ExitStack() as stack:
        prove = None
        if config.verify:
            assert text is not None
            prove = stack.enter_context(
                Prover(checkpoint.path, text.heldout[: config.blocks], threads=work.threads)
            ).measure
        for kind in config.types:
            rows.append(work.rung(kind, prove))
        for label, most in work.budgets():
            rows.append(work.own(label, most, prove))
    table = {"model": model.keys["general.name"], "notes": list(model.notes), "files": [row.to_dict() for row in rows]}
    (out / TABLE).write_text(json.dumps(table, indent=2))
    return table


class _Work:
    """Writes files of one model."""

    def __init__(
        self,
        model: GgufModel,
        overrides: dict[str, BlockType],
        config: QuantizeConfig,
        out: Path,
        importance: ImportanceMatrix | None,
        text: Text | None,
        listener: Listener,
    ):
        self.model, self.config, self.out, self.importance, self.text = model, config, out, importance, text
        self.listener, self.threads = listener, config.threads or os.cpu_count() or 1
        self.overrides, self.fixed = overrides, fixed_types(model, overrides)
        self._damage: Damage | None = None

    def budgets(self) -> list[tuple[str, int]]:
        """Of each mixture of one's own: its name, and the most bytes of its tensors."""
        weights = sum(math.prod(tensor.shape) for tensor in self.model.tensors)
        types = smallest_mixture(self.model, self.fixed).types
        beside = file_bytes(self.model, types, {}) - weights_bytes(self.model, types)
        by_bits = [(f"{bits:g}bpw", int(bits * weights / 8)) for bits in self.config.bits_per_weight]
        # What a file says of its importance matrix comes on top.
        by_size = [(size(most).replace(" ", ""), int(most) - beside - 1024) for most in self.config.sizes]
        return by_bits + by_size

    def rung(self, kind: str, prove: Callable[[Path], Measured] | None) -> File:
        """A type of the ladder; with and without the importance matrix where either can be, and the better one kept."""

        def mixed(informed: bool) -> Mixture:
            return mixture(self.model, kind, informed=informed, overrides=self.overrides)

        with_it = self.importance is not None and kind not in UNINFORMED
        made = self._write(kind, kind, mixed(with_it), prove, informed=with_it)
        if not with_it or prove is None or self._needs_importance(mixed(False)):
            return made
        assert made.measured is not None
        other = self._write(kind, f"{kind}.plain", mixed(False), prove, informed=False)
        assert other.measured is not None
        if other.measured.kl < made.measured.kl:
            (self.out / other.file).replace(self.out / made.file)
            return replace(other, file=made.file, kl_of_other=made.measured.kl)
        (self.out / other.file).unlink()
        return replace(made, kl_of_other=other.measured.kl)

    def damage(self, most: int) -> Damage:
        """What types do, measured once, near the first of the sizes that are wanted."""
        if self._damage is not None:
            return self._damage
        assert self.text is not None and self.importance is not None
        near = min(
            (kind for kind in LADDER if kind not in UNINFORMED),
            key=lambda kind: abs(weights_bytes(self.model, mixture(self.model, kind, informed=True).types) - most),
        )
        self._damage = measure_damage(
            self.model,
            self.importance,
            self.text.calibration[:SAMPLE_BLOCKS],
            near=BlockType[LADDER[near]],
            threads=self.threads,
            progress=lambda done, total: self.listener.progress(done, total, "matrices tried"),
        )
        return self._damage

    def own(self, label: str, most: int, prove: Callable[[Path], Measured] | None) -> File:
        mixed = best_mixture(self.model, self.damage(most), most, self.fixed)
        return self._write(label, label, mixed, prove, informed=True)

    def _write(
        self, kind: str, label: str, mixed: Mixture, prove: Callable[[Path], Measured] | None, *, informed: bool
    ) -> File:
        file = self.out / f"{self.model.keys['general.name']}-{label}.gguf"
        digest = write_quantized(
            self.model,
            mixed,
            file,
            importance=self.importance if informed else None,
            importance_file=IMPORTANCE if informed else "",
            threads=self.threads,
            progress=lambda done, total: self.listener.progress(done, total, f"tensors of {label}"),
        )
        measured = None if prove is None else prove(file)
        bits = bits_per_weight(self.model, mixed.types)
        fallbacks = len(mixed.fallbacks)
        return File(kind, file.name, file.stat().st_size, bits, informed, fallbacks, digest, measured)

    def _needs_importance(self, mixed: Mixture) -> bool:
        try:
            require_importance(self.model, mixed)
        except GgufError:
            return True
        return False


def _importance(
    checkpoint: Checkpoint, text: Text | None, file: Path | None, out: Path, listener: Listener
) -> ImportanceMatrix | None:
    """The importance matrix, which is in `out` after it."""
    if file is not None:
        found = read_importance(file)
        shutil.copyfile(file, out / IMPORTANCE)
        return found
    if text is None:
        return None
    statistics = calibrate(
        checkpoint,
        text.calibration,
        dtype=torch.float32,
        progress=lambda done, total: listener.progress(done, total, "layers of the importance matrix"),
    )
    found = importance_of(
        checkpoint,
        statistics.column_squares(),
        samples=statistics.samples,
        tokens=statistics.tokens,
        source=text.source,
    )
    write_importance(found, out / IMPORTANCE)
    return found
