"""A Hugging Face model directory: its config, and its checkpoint, validated when opened and read by rows.

Only safetensors are read, and no code of the directory is run.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from minitron.core.errors import CheckpointError
from minitron.model.architecture import Architecture, Axis, Parameters, Shape, TensorSpec
from minitron.model.config_json import DTYPE_KEYS, read_config, require_entry_per_layer
from minitron.model.families import family_of
from minitron.model.hub import empty_model
from minitron.model.tokenizer import end_ids, load_tokenizer
from minitron.model.weight_files import carried_files, stored_tensors, without_code
from minitron.model.weights import StoredTensor, bytes_of, gather_rows, require_fits, same_values

FINGERPRINT_BYTES = 4096  # bytes of each tensor in a fingerprint
RMS_ROWS = 64  # rows of each matrix that stand for all


@dataclass(frozen=True)
class Checkpoint:
    """An opened model directory, in which every tensor of the family's table has the predicted shape."""

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    shape: Shape
    stored: Mapping[str, StoredTensor]

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype of the embedding, which is the dtype of the model."""
        return self.stored[self.architecture.embedding].dtype

    @property
    def written_dtype(self) -> torch.dtype:
        """The dtype of a model that is made of this one: another than `dtype` where the weights are quantized."""
        return self.stored[self.architecture.embedding].written_dtype

    @property
    def written_bytes(self) -> int:
        """The bytes of this model written as a plain checkpoint."""
        return sum(bytes_of(stored.written_dtype, stored.shape) for stored in self.stored.values())

    @property
    def weight_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.stored.values())

    @property
    def parameters(self) -> Parameters:
        return self.architecture.count(self.shape, self.config)

    @property
    def head(self) -> str:
        """The name of the output projection, which is the embedding where the two are tied."""
        return self.architecture.head if self.architecture.head in self.stored else self.architecture.embedding

    @cached_property
    def tokenizer(self) -> Any:
        """The directory's tokenizer, loaded when it is first asked for.

        Raises: CheckpointError, see `load_tokenizer`.
        """
        return load_tokenizer(self.path)

    def fingerprint(self) -> str:
        """A digest of the first rows of every tensor, which tells models apart without reading all weights."""
        digest = hashlib.sha256()
        for name, stored in self.stored.items():
            count = min(stored.shape[0], max(1, FINGERPRINT_BYTES // stored.row_bytes))
            digest.update(f"{name} {stored.dtype} {stored.shape}".encode())
            digest.update(self.read_rows(name, 0, count).contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def specs(self) -> Iterator[TensorSpec]:
        return self.architecture.specs(self.config, self.shape.layers)

    def read(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype.

        Raises: CheckpointError if the tensor cannot be read, or holds NaN or infinity; so do the next two methods.
        """
        return self.read_rows(name, 0, self.stored[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int, buffer: UInt8[Tensor, " size"] | None = None) -> Tensor:
        """Read the rows [start, stop) of a tensor, into `buffer` if they fit."""
        return self.stored[name].rows(start, stop, buffer)

    def read_middle(self, name: str, rows: int) -> Tensor:
        """Read at most so many rows from the middle of a tensor, which stand for all."""
        all_rows = self.stored[name].shape[0]
        start = max(0, (all_rows - rows) // 2)
        return self.read_rows(name, start, min(all_rows, start + rows))

    @cached_property
    def weights_rms(self) -> float:
        """The root mean square of the weights in the layers' matrices: the median of estimates from some rows each."""
        sizes = []
        for spec in self.specs():
            if spec.layer is not None and len(spec.axes) == 2:
                sizes.append(self.read_middle(spec.name, RMS_ROWS).float().square().mean().sqrt())
        return torch.stack(sizes).median().item()

    def gather_rows(self, name: str, rows: Int[Tensor, " rows"]) -> Tensor:
        """Read some rows of a tensor, given in ascending order; other rows are only read in short gaps."""
        return gather_rows(self.stored[name], rows)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model directory and check its tensors against the family's table; weights are not read.

    Raises: CheckpointError, UnsupportedArchitecture.
    """
    config = read_config(path)
    architecture = family_of(config)
    shape = architecture.shape(config)
    stored = stored_tensors(path)
    tied = architecture.tied(config)
    if tied and architecture.embedding not in stored and architecture.head in stored:
        stored[architecture.embedding] = stored[architecture.head]  # tied: some exports keep only the other name
    if shape.layers > len(stored):
        raise CheckpointError(
            f"{path}: config.json's num_hidden_layers is {shape.layers}, but only {len(stored)} tensors are stored"
        )
    specs = list(architecture.specs(config, shape.layers))
    _require_match(path, architecture, specs, stored)
    checkpoint = Checkpoint(path, config, architecture, shape, {spec.name: stored[spec.name] for spec in specs})
    for spec in specs:
        _require_shape(checkpoint, spec)
    if tied and architecture.head in stored:
        _require_tied(path, stored[architecture.embedding], stored[architecture.head])
    require_entry_per_layer(path, config, architecture, shape.layers)
    for file in carried_files(path):
        without_code(file)
    return checkpoint


@dataclass(frozen=True)
class _Planned(StoredTensor):
    """A tensor that is planned, and has no values yet."""

    def rows(self, start: int, stop: int, buffer: UInt8[Tensor, " size"] | None = None) -> Tensor:
        return torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)


def planned_checkpoint(model: "Checkpoint | ModelConfig", shape: Shape) -> Checkpoint:
    """Return the checkpoint that a model of a shape would be: its tensors have shapes and dtypes, and no values.

    Args:
        model: the config is its own, with the sizes and the first layers of the shape.
    """
    architecture, dtype = model.architecture, model.written_dtype
    config = architecture.config_for(model.config, shape, list(range(shape.layers)))
    stored = {
        spec.name: _Planned(model.path, spec.name, dtype, spec.shape(shape), 0, (0, 0, 0))
        for spec in architecture.specs(config, shape.layers)
    }
    return Checkpoint(model.path, config, architecture, shape, stored)


def load_model(path: Path, dtype: torch.dtype | None = None) -> Any:
    """Load the directory's model in evaluation mode, by default in its `written_dtype`.

    That is the dtype of the checkpoint; a quantized model is then rounded as its students are, for which it is twice as
    fast as in float32.

    Its tensors are read in the same way as those of a streamed model. transformers' own loading would choose files and
    dtype by other rules, would initialise missing tensors at random, and would add an adapter in the directory.

    Raises: CheckpointError if a weight cannot be read, or is NaN or infinite.
    """
    from transformers import GenerationConfig

    checkpoint = open_checkpoint(path)
    dtype = dtype or checkpoint.written_dtype
    model = empty_model(checkpoint.config, dtype)
    for name, stored in checkpoint.stored.items():
        module, _, own = name.rpartition(".")
        tensor = checkpoint.read(name)
        require_fits(tensor, stored, dtype)
        setattr(model.get_submodule(module), own, nn.Parameter(tensor.to(dtype, copy=True)))
    model.tie_weights()
    assert not any(parameter.is_meta for parameter in model.parameters()), "the family's table names every tensor"
    # Nothing else of generation_config.json is used.
    model.generation_config = GenerationConfig(eos_token_id=end_ids(path) or None)
    return model.requires_grad_(True)


def _require_match(
    path: Path, architecture: Architecture, specs: list[TensorSpec], stored: Mapping[str, StoredTensor]
) -> None:
    missing = [spec.name for spec in specs if spec.name not in stored]
    if missing:
        raise CheckpointError(
            _elsewhere(path, architecture, stored)
            or f"{path}: config.json promises {len(specs)} tensors, {len(missing)} are missing in "
            f"{_files_of(stored)}, first {missing[0]}"
            f"{'' if architecture.embedding in stored else f' (stored are names such as {min(stored)})'}"
        )
    # A tied model may store its output projection a second time.
    known = {*(spec.name for spec in specs), architecture.head}
    strange = [name for name in stored if name not in known and not name.endswith(architecture.ignored_suffixes)]
    if strange:
        raise CheckpointError(
            f"{path}: {len(strange)} tensors are not part of the {architecture.name} family, first {strange[0]}: "
            "config.json does not describe these weights"
        )


def _files_of(stored: Mapping[str, StoredTensor]) -> str:
    first, *others = sorted({tensor.file.name for tensor in stored.values()})
    return f"{first} and {len(others)} more" if others else first


def _elsewhere(path: Path, architecture: Architecture, stored: Mapping[str, StoredTensor]) -> str | None:
    """The message about tensors with another prefix than the family's; None if they have the right one."""
    expected = architecture.layer.partition("layers.")[0]
    for end in (
        architecture.embedding.removeprefix(expected),
        f"{architecture.final_norm.removeprefix(expected)}.weight",
    ):
        found = min((name for name in stored if name == end or name.endswith(f".{end}")), key=len, default=None)
        if found is not None and found != f"{expected}{end}":
            prefix = found.removesuffix(end)
            stand = f"the prefix {prefix!r}" if prefix else "no prefix"
            return (
                f"{path}: the tensors in {_files_of(stored)} have {stand} ({found}), but those of a "
                f"{architecture.name} model have the prefix {expected!r} ({expected}{end}): they are of a part of a "
                "model, or of one with more parts; load it with transformers, and save the whole language model and "
                "only that (save_pretrained)"
            )
    return None


def _require_shape(checkpoint: Checkpoint, spec: TensorSpec) -> None:
    found, expected = checkpoint.stored[spec.name].shape, spec.shape(checkpoint.shape)
    if found == expected:
        return
    message = f"{checkpoint.path}: tensor {spec.name} is {list(found)}, but by config.json it must be {list(expected)}"
    if len(found) != len(expected):
        raise CheckpointError(f"{message}: config.json does not describe these weights")
    index = next(index for index, size in enumerate(expected) if size != found[index])
    axis = spec.axes[index]
    dims = dict.fromkeys(dim for segment in axis for dim in (segment.unit, *segment.block))
    keys = ", ".join(_said(checkpoint, dim) for dim in dims)
    raise CheckpointError(f"{message}: axis {index} is {_notation(axis)}, by config.json's {keys}")


def _said(checkpoint: Checkpoint, dim: str) -> str:
    key, size = checkpoint.architecture.config_keys.get(dim, dim), getattr(checkpoint.shape, dim)
    return f"{key}={size}" if key in checkpoint.config else f"{key} (missing, so {size})"


def _notation(axis: Axis) -> str:
    return "+".join("*".join((segment.unit, *segment.block)) for segment in axis)


def _require_tied(path: Path, embedding: StoredTensor, head: StoredTensor) -> None:
    """Check that both tensors are equal: else transformers unties them, whatever the config says."""
    if embedding != head and not same_values(embedding, head):
        raise CheckpointError(
            f"{path}: config.json ties {head.name} to {embedding.name}, yet they are stored with different values; "
            "set tie_word_embeddings to false if both are meant"
        )


_CONFIG_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


ASSUMED_DTYPE = "float32"  # the dtype that transformers takes where a config has none


@dataclass(frozen=True)
class ModelConfig:
    """A model as its config.json describes it, which is enough for shapes, counts and costs."""

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    shape: Shape
    dtype: torch.dtype
    dtype_assumed: bool  # whether config.json has no dtype

    @property
    def written_dtype(self) -> torch.dtype:
        """The dtype of a model that is made of this one."""
        return self.dtype

    @property
    def parameters(self) -> Parameters:
        return self.architecture.count(self.shape, self.config)


def open_config(path: Path) -> ModelConfig:
    """Read the config.json of a model directory; no other file is needed.

    Raises: CheckpointError, UnsupportedArchitecture.
    """
    config = read_config(path)
    architecture = family_of(config)
    said = next((config[key] for key in DTYPE_KEYS if key in config), None)
    name = ASSUMED_DTYPE if said is None else said
    if name not in _CONFIG_DTYPES:
        known = ", ".join(sorted(_CONFIG_DTYPES))
        raise CheckpointError(f"{path / 'config.json'}: dtype is {name!r}; supported are {known}")
    shape = architecture.shape(config)
    require_entry_per_layer(path, config, architecture, shape.layers)
    return ModelConfig(path, config, architecture, shape, _CONFIG_DTYPES[name], said is None)
