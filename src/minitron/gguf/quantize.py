"""A checkpoint becomes GGUF files of several types, each proven in llama.cpp, with a table of what they cost."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as BlockType
from jaxtyping import Int
from torch import Tensor

from minitron.calibration.collect import measure_statistics
from minitron.core.errors import GgufError
from minitron.core.progress import SILENT, Listener
from minitron.core.text import size
from minitron.gguf.config import GGUF_TYPES, UNINFORMED, QuantizeConfig
from minitron.gguf.file import GgufModel, bits_per_weight, describe_gguf, file_bytes, weights_bytes
from minitron.gguf.imatrix import (
    ImportanceMatrix,
    importance_of,
    read_importance,
    require_importance_fits,
    write_importance,
)
from minitron.gguf.layouts import Measured, QuantizedModel, WrittenFile
from minitron.gguf.llama_cpp import MOST_THREADS
from minitron.gguf.mixtures import SAMPLE_BLOCKS, Damage, best_mixture, measure_damage, smallest_mixture
from minitron.gguf.types import (
    Mixture,
    fixed_types,
    mixture,
    quantized_bytes,
    require_importance,
    require_known_rule,
    write_quantized,
)
from minitron.gguf.verify import MOST_KL, prover
from minitron.model.checkpoint import Checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass

IMPORTANCE, TABLE = "imatrix.gguf", "quantization.json"


@dataclass(frozen=True)
class QuantizeText:
    """Text for calibration and for measuring, as blocks of token ids, and the name of its source."""

    calibration: Int[Tensor, "samples tokens"]
    heldout: Int[Tensor, "blocks tokens"]
    source: str


@dataclass(frozen=True)
class PlannedFile:
    """A GGUF file that would be written.

    fallbacks: matrix -> the type that the rules give, whose blocks do not fit its columns, and the type instead.
    """

    name: str
    bytes: int
    bits_per_weight: float
    fallbacks: Mapping[str, tuple[str, str]]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def plan_files(checkpoint: Checkpoint, config: QuantizeConfig, *, informed: bool) -> list[PlannedFile]:
    """Plan the files of the config's types; mixtures of minitron's own are chosen later, and left out.

    Args:
        informed: whether there will be an importance matrix.
    """
    model, overrides = require_possible(checkpoint, config, informed=informed)
    rows = []
    for name in config.types:
        mixed = mixture(model, name, informed=informed, overrides=overrides)
        fallbacks = {tensor: (was.name, mixed.types[tensor].name) for tensor, was in mixed.fallbacks.items()}
        bits = bits_per_weight(model, mixed.types)
        rows.append(PlannedFile(name, quantized_bytes(model, mixed, None), bits, fallbacks))
    return rows


def require_possible(
    checkpoint: Checkpoint,
    config: QuantizeConfig,
    *,
    informed: bool,
    name: str | None = None,
    card: Mapping[str, Any] | None = None,
    importance_file: Path | None = None,
) -> tuple[GgufModel, dict[str, BlockType]]:
    """Describe the model as a file, and parse the config's types of single tensors.

    Raises: GgufError for every fault that can be found before text is read.
    """
    overrides = {pattern: BlockType[kind] for pattern, kind in config.tensor_types.items()}
    model = describe_gguf(checkpoint, name=name, pre=config.pre, card=card)
    fixed = fixed_types(model, overrides)
    if config.pre is not None:
        require_known_rule(model)
    if importance_file is not None:
        _require_importance_fits(model, config, overrides, importance_file)
    if not informed:
        for kind in config.types:
            require_importance(model, mixture(model, kind, informed=False, overrides=overrides))
    smallest = smallest_mixture(model, fixed).types
    labels = [f"{bits:g}bpw" for bits in config.bits_per_weight] + [_size_label(most) for most in config.sizes]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise GgufError(f"{twice[0]} is asked for twice: name each size once")
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


def write_ladder(
    checkpoint: Checkpoint,
    config: QuantizeConfig,
    out: Path,
    *,
    text: QuantizeText | None,
    importance_file: Path | None = None,
    name: str | None = None,
    card: Mapping[str, Any] | None = None,
    listener: Listener = SILENT,
) -> QuantizedModel:
    """Write the files of the config into the existing directory `out`, with their table; returns the table.

    Args:
        text: None without calibration: `importance_file` is then the only importance matrix, and nothing is verified.
        name: of the model, in the files and in front of their names.
        card: the metadata of the model's card; default what README.md in its directory has.

    Raises: GgufError for a model, type or importance matrix that allows no such file, and for a file that llama.cpp
        runs as another model.
    """
    informed = text is not None or importance_file is not None
    model, overrides = require_possible(
        checkpoint, config, informed=informed, name=name, card=card, importance_file=importance_file
    )
    for note in model.notes:
        listener.warn(note)
    if config.verify and text is None:
        raise GgufError("verifying needs text: give --calibration TEXT, or --no-verify")
    if (config.bits_per_weight or config.sizes) and text is None:
        raise GgufError("a mixture of minitron's own needs text to measure on: give --calibration TEXT")
    importance = _importance(checkpoint, text, importance_file, out, listener)
    work = _Work(model, overrides, config, out, importance, text, listener)
    if text is not None:
        _say_what_is_short(config, text, listener)
    with ExitStack() as stack:
        if config.verify:
            assert text is not None
            # Beyond the file's context, which may be a window that llama.cpp lacks, the two may differ.
            blocks = text.heldout[: config.blocks, : model.context]
            work.prove = stack.enter_context(prover(checkpoint.path, blocks, threads=work.threads))
        # The files that prove the conversion come first: a wrong conversion must not pass as a loss by quantizing.
        made = {kind: work.llama_type(kind) for kind in sorted(config.types, key=lambda kind: kind not in MOST_KL)}
        rows = [made[kind] for kind in config.types]
        for label, most in work.budgets():
            rows.append(work.own_mixture(label, most))
    table = QuantizedModel(model=model.name, notes=list(model.notes), files=rows)
    (out / TABLE).write_text(json.dumps(table.to_dict(), indent=2))
    return table


class _Work:
    """Writes the files of one model."""

    def __init__(
        self,
        model: GgufModel,
        overrides: dict[str, BlockType],
        config: QuantizeConfig,
        out: Path,
        importance: ImportanceMatrix | None,
        text: QuantizeText | None,
        listener: Listener,
    ):
        self.model, self.config, self.out, self.importance, self.text = model, config, out, importance, text
        self.listener, self.threads = listener, _threads(config, listener)
        self.prove: Callable[[Path], Measured] | None = None
        self.proven = False  # whether llama.cpp runs a file of this model as the model
        self.overrides, self.fixed = overrides, fixed_types(model, overrides)
        self._damage: Damage | None = None

    def budgets(self) -> list[tuple[str, int]]:
        """The name of each mixture of minitron's own, and the most bytes of its tensors."""
        weights = sum(math.prod(tensor.shape) for tensor in self.model.tensors)
        types = smallest_mixture(self.model, self.fixed).types
        beside = file_bytes(self.model, types, {}) - weights_bytes(self.model, types)
        by_bits = [(f"{bits:g}bpw", int(bits * weights / 8)) for bits in self.config.bits_per_weight]
        # The keys about the importance matrix come on top.
        by_size = [(_size_label(most), int(most) - beside - 1024) for most in self.config.sizes]
        return by_bits + by_size

    def llama_type(self, kind: str) -> WrittenFile:
        """Write a type with and without the importance matrix where both are possible, and keep the better file."""

        def mixed(informed: bool) -> Mixture:
            return mixture(self.model, kind, informed=informed, overrides=self.overrides)

        with_it = self.importance is not None and kind not in UNINFORMED
        made = self._write(kind, kind, mixed(with_it), informed=with_it)
        if not with_it or self.prove is None or self._needs_importance(mixed(False)):
            return made
        assert made.measured is not None
        other = self._write(kind, f"{kind}.plain", mixed(False), informed=False)
        assert other.measured is not None
        if other.measured.kl < made.measured.kl:
            (self.out / other.file).replace(self.out / made.file)
            return other.model_copy(update={"file": made.file, "kl_of_other": made.measured.kl})
        (self.out / other.file).unlink()
        return made.model_copy(update={"kl_of_other": other.measured.kl})

    def damage(self, most: int) -> Damage:
        """Measure what quantizing each matrix costs, once, near the first of the wanted sizes."""
        if self._damage is not None:
            return self._damage
        assert self.text is not None and self.importance is not None
        near = min(
            (kind for kind in GGUF_TYPES if kind not in UNINFORMED),
            key=lambda kind: abs(weights_bytes(self.model, mixture(self.model, kind, informed=True).types) - most),
        )
        self._damage = measure_damage(
            self.model,
            self.importance,
            self.text.calibration[:SAMPLE_BLOCKS],
            near=BlockType[GGUF_TYPES[near]],
            threads=self.threads,
            progress=lambda done, total: self.listener.progress(done, total, "matrices tried"),
        )
        return self._damage

    def own_mixture(self, label: str, most: int) -> WrittenFile:
        mixed = best_mixture(self.model, self.damage(most), most, self.fixed)
        return self._write(label, label, mixed, informed=True)

    def _write(self, kind: str, label: str, mixed: Mixture, *, informed: bool) -> WrittenFile:
        if self.prove is not None and (kind not in MOST_KL or self.overrides):
            self._require_proven(("Q8_0", "BF16"))
        file = self.out / f"{self.model.name}-{label}.gguf"
        try:
            return self._made(file, kind, label, mixed, informed=informed)
        except GgufError:
            file.unlink(missing_ok=True)
            raise

    def _made(self, file: Path, kind: str, label: str, mixed: Mixture, *, informed: bool) -> WrittenFile:
        digest = write_quantized(
            self.model,
            mixed,
            file,
            importance=self.importance if informed else None,
            importance_file=IMPORTANCE if informed else "",
            threads=self.threads,
            progress=lambda done, total: self.listener.progress(done, total, f"tensors of {label}"),
        )
        measured = None if self.prove is None else self.prove(file)
        if measured is not None and kind in MOST_KL and not self.overrides:
            self._require_same(kind, measured)
        return WrittenFile(
            name=kind,
            file=file.name,
            bytes=file.stat().st_size,
            bits_per_weight=bits_per_weight(self.model, mixed.types),
            informed=informed,
            fallbacks=len(mixed.fallbacks),
            digest=digest,
            measured=measured,
        )

    def _require_same(self, kind: str, measured: Measured) -> None:
        """Raises: GgufError for a plain file that is another model; Q8_0 may lose more than usual if BF16 does not."""
        if measured.kl <= MOST_KL[kind]:
            self.proven = True
        elif kind == "Q8_0":
            self._require_proven(("BF16",))
        else:
            raise GgufError(
                f"llama.cpp runs a plain {kind} file of {self.model.checkpoint.path} with logits that are "
                f"{measured.kl:.2g} nats a token (KL) from the model's, where at most {MOST_KL[kind]:g} is rounding: "
                "it computes another model, so no file is kept. If BF16 is near and F16 is not, F16 is too small for "
                "this model's activations; else llama.cpp does not follow something in its config.json"
            )

    def _require_proven(self, kinds: Sequence[str]) -> None:
        """Prove the conversion by files that are not kept, unless a wanted file has proven it.

        Raises: GgufError if the file of the last kind is another model.
        """
        for kind in kinds:
            if self.proven:
                return
            assert self.prove is not None
            file = self.out / f"proof-{kind}.gguf"
            try:
                write_quantized(self.model, mixture(self.model, kind, informed=False), file, threads=self.threads)
                measured = self.prove(file)
            finally:
                file.unlink(missing_ok=True)
            if kind != "Q8_0" or measured.kl <= MOST_KL[kind]:
                self._require_same(kind, measured)

    def _needs_importance(self, mixed: Mixture) -> bool:
        try:
            require_importance(self.model, mixed)
        except GgufError:
            return True
        return False


def _require_importance_fits(
    model: GgufModel, config: QuantizeConfig, overrides: dict[str, BlockType], file: Path
) -> None:
    """Raises: GgufError for an importance matrix that is damaged or of another model, or that changes no file."""
    columns = {tensor.name: tensor.shape[1] for tensor in model.tensors if tensor.is_matrix}
    importance = read_importance(file)
    require_importance_fits(importance, columns, str(file))
    own = bool(config.bits_per_weight or config.sizes)
    if not own and all(kind in UNINFORMED for kind in config.types) and not overrides:
        raise GgufError(f"--imatrix {file} changes nothing of {', '.join(config.types)}: leave it out")
    for kind in config.types:
        require_importance(model, mixture(model, kind, informed=True, overrides=overrides), importance)


def _say_what_is_short(config: QuantizeConfig, text: QuantizeText, listener: Listener) -> None:
    given = {"samples": (config.samples, len(text.calibration)), "blocks": (config.blocks, len(text.heldout))}
    for name, (asked, there) in given.items():
        if there < asked and name in config.model_fields_set:
            listener.warn(f"the text has {there:,} blocks for --{name} {asked:,}: all of them are read")


def _size_label(most: float) -> str:
    return size(most).replace(" ", "")


def _threads(config: QuantizeConfig, listener: Listener) -> int:
    most = min(os.cpu_count() or 1, MOST_THREADS)
    if config.threads is not None and config.threads > most:
        listener.warn(f"{config.threads:,} threads are more than this machine has cores: {most} are used")
    return min(config.threads or most, most)


def _importance(
    checkpoint: Checkpoint, text: QuantizeText | None, file: Path | None, out: Path, listener: Listener
) -> ImportanceMatrix | None:
    """Read or collect the importance matrix, and leave it in `out`."""
    if file is not None:
        found = read_importance(file)
        shutil.copyfile(file, out / IMPORTANCE)
        return found
    if text is None:
        return None
    statistics = measure_statistics(
        checkpoint,
        Samples(text.calibration),
        Pass(torch.float32, progress=partial(listener.progress, note="layers of the importance matrix")),
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
