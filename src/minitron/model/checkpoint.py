"""A Hugging Face model directory on disk: validated when opened, read tensor by tensor, written atomically.

Only safetensors, and nothing from the directory is executed.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from minitron.core.errors import CheckpointError
from minitron.core.reading import read_json
from minitron.model.architecture import Architecture, Axis, Parameters, Shape, TensorSpec
from minitron.model.config_json import CODE_KEYS, CONFIG, DTYPE_KEYS, read_config, require_entry_per_layer
from minitron.model.families import family_of
from minitron.model.hugging_face import empty_model
from minitron.model.tokenizer import end_ids, make_portable
from minitron.model.tokenizer import load_tokenizer as load_tokenizer
from minitron.model.weight_files import INDEX, SINGLE, stored_tensors, weight_files
from minitron.model.weights import (
    StoredTensor,
    TensorType,
    bytes_of,
    gather_rows,
    plan_shards,
    read_rows,
    require_fits,
    same_values,
    write_shard,
)

FINGERPRINT_BYTES = 4096  # of each tensor
SHARD_BYTES = 5_000_000_000  # the hub's own shard size
RMS_ROWS = 64  # of each matrix, whose weights stand for all
GENERATION = "generation_config.json"
# Files that travel with the weights: tokenizer, chat template, generation config, licence.
CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "tekken.json", "chat_template*", GENERATION, "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# Carried files of tables of tokens, in which no key is code; what loads the tokenizer checks them.
LARGE_TABLES = ("tokenizer.json", "vocab.json", "tekken.json", "added_tokens.json")


@dataclass(frozen=True)
class Checkpoint:
    """An opened model directory. Every tensor that the family's table predicts is there with the predicted shape."""

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    shape: Shape
    stored: Mapping[str, StoredTensor]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding on disk, which is the dtype of the model."""
        return self.stored[self.architecture.embedding].dtype

    @property
    def weight_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.stored.values())

    @property
    def parameters(self) -> Parameters:
        return self.architecture.count(self.shape, self.config)

    @property
    def head(self) -> str:
        """The tensor that projects to the vocabulary: the embedding itself where they are tied."""
        return self.architecture.head if self.architecture.head in self.stored else self.architecture.embedding

    def fingerprint(self) -> str:
        """A digest that tells two models apart without reading all of them: of the first rows of every tensor."""
        digest = hashlib.sha256()
        for name, stored in self.stored.items():
            count = min(stored.shape[0], max(1, FINGERPRINT_BYTES // stored.row_bytes))
            digest.update(f"{name} {stored.dtype} {stored.shape}".encode())
            digest.update(self.read_rows(name, 0, count).contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def specs(self) -> Iterator[TensorSpec]:
        return self.architecture.specs(self.config, self.shape.layers)

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype.

        Raises: CheckpointError if it cannot be read or holds NaN or infinity. So do the two below.
        """
        return self.read_rows(name, 0, self.stored[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int, buffer: UInt8[Tensor, " size"] | None = None) -> Tensor:
        """Rows [start, stop) of a tensor; in `buffer` if they fit there."""
        return read_rows(self.stored[name], start, stop, buffer)

    def read_middle(self, name: str, rows: int) -> Tensor:
        """At most so many rows from the middle of a tensor, to stand for all."""
        all_rows = self.stored[name].shape[0]
        start = max(0, (all_rows - rows) // 2)
        return self.read_rows(name, start, min(all_rows, start + rows))

    def weights_rms(self) -> float:
        """Root mean square of the weights in the layers' matrices: the median over matrices, from some rows each."""
        sizes = []
        for spec in self.specs():
            if spec.layer is not None and len(spec.axes) == 2:
                sizes.append(self.read_middle(spec.name, RMS_ROWS).float().square().mean().sqrt())
        return torch.stack(sizes).median().item()

    def gather_rows(self, name: str, rows: Int[Tensor, " rows"]) -> Tensor:
        """Some rows of a tensor, in ascending order; the others are not read, but where a gap is short."""
        return gather_rows(self.stored[name], rows)


def resolve_model(model: str, revision: str | None = None, *, config_only: bool = False) -> Path:
    """The local directory of a model: a directory as it is, a hub id downloaded to the hub's cache.

    Args:
        config_only: download nothing but config.json.

    Raises: CheckpointError if there is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file; give the model's directory or a hub id")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"model directory {model} does not exist")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["config.json"] if config_only else ["*.json", "*.safetensors", "README.md", *CARRIED]
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{model!r} is neither a local directory nor a hub model that can be read: {reason}"
        ) from None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model directory and hold its tensors against the family's table; weights are not read.

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
        _without_code(file)
    return checkpoint


def write_checkpoint(
    out: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorType],
    pieces: Iterable[Tensor],
    carry_from: Path,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write a model into the existing directory `out`; returns the sha256 of each file of weights by its name.

    What is written says the dtype of its embedding, and names no code, for none comes along. Dtypes and shapes are
    given in advance, so a shard's header is written before its data and no shard is ever held.

    Args:
        pieces: the tensors in the order of `tensors`, each whole or in runs of rows. They are asked for in another
            thread, and each is used up before the next is asked for.
    """
    shards = plan_shards(tensors, shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    left = iter(pieces)
    digests = {file: write_shard(out / file, shard, left) for file, shard in zip(names, shards, strict=True)}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(bytes_of(*tensor) for tensor in tensors.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        (out / INDEX).write_text(json.dumps(index, indent=2))
    (out / CONFIG).write_text(json.dumps(_as_written(config, tensors), indent=2))
    for carried in carried_files(carry_from):
        said = _without_code(carried)
        if said is None:
            shutil.copyfile(carried, out / carried.name)
        else:
            (out / carried.name).write_text(json.dumps(said, indent=2, ensure_ascii=False), encoding="utf-8")
    make_portable(out)
    return digests


def _as_written(config: Mapping[str, Any], tensors: Mapping[str, TensorType]) -> dict[str, Any]:
    """A config.json that says the dtype that is stored, under the keys that said one, and no code."""
    said = {key: value for key, value in config.items() if key not in CODE_KEYS}
    dtype = str(tensors[family_of(config).embedding][0]).removeprefix("torch.")
    return said | dict.fromkeys([key for key in DTYPE_KEYS if key in said] or [DTYPE_KEYS[-1]], dtype)


def _without_code(file: Path) -> Any:
    """What a carried JSON file says without the keys that name code; None where the file stays as it is.

    Raises: CheckpointError for a file that is named .json and is none, and for a generation_config.json without keys.
    """
    if file.suffix != ".json" or file.name in LARGE_TABLES:
        return None
    said = read_json(file, CheckpointError)
    if file.name == GENERATION and not isinstance(said, dict):
        raise CheckpointError(f"{file} must be a JSON object: transformers would not load the model; remove the file")
    code = [key for key in CODE_KEYS if key in said] if isinstance(said, dict) else []
    return {key: value for key, value in said.items() if key not in code} if code else None


def model_files(path: Path) -> list[Path]:
    """The files that make a model what it is: config, weights, and what is carried along. No README, no records."""
    weights = weight_files(path)
    index = [path / INDEX] if [file.name for file in weights] != [SINGLE] else []
    return [path / CONFIG, *weights, *index, *carried_files(path)]


def carried_files(path: Path) -> list[Path]:
    """The files of a directory that travel with its weights. Python files are none of them, whatever their names.

    Raises: CheckpointError for a link whose file is gone: the model would go on without it.
    """
    named = (file for file in path.iterdir() if any(fnmatchcase(file.name, pattern) for pattern in CARRIED))
    found = sorted(file for file in named if file.suffix != ".py" and not file.is_dir())
    for file in found:
        if not file.exists():
            raise CheckpointError(
                f"{file} is a link to {file.readlink()}, which does not exist: download or copy the model again"
            )
    return found


def load_model(path: Path, dtype: torch.dtype | None = None) -> Any:
    """The directory's model in memory, in evaluation mode; `dtype` None keeps that of the checkpoint.

    Its tensors are read as those of a streamed model are, so both are the same model: transformers' own loading would
    choose files and dtype by rules of its own, fill in what is missing at random, and add an adapter that lies beside.

    Raises: CheckpointError if a weight cannot be read, or is NaN or infinite.
    """
    from transformers import GenerationConfig

    checkpoint = open_checkpoint(path)
    dtype = dtype or checkpoint.dtype
    model = empty_model(checkpoint.config, dtype)
    for name, stored in checkpoint.stored.items():
        module, _, own = name.rpartition(".")
        tensor = checkpoint.read(name)
        require_fits(tensor, stored, dtype)
        setattr(model.get_submodule(module), own, nn.Parameter(tensor.to(dtype, copy=True)))
    model.tie_weights()
    assert not any(parameter.is_meta for parameter in model.parameters()), "the family's table names every tensor"
    # All that counts of generation_config.json.
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
    """What to say of tensors that lie under another prefix than the family's; None where they do not."""
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
    """transformers unties two tensors that are stored with different values, whatever the config says."""
    if embedding != head and not same_values(embedding, head):
        raise CheckpointError(
            f"{path}: config.json ties {head.name} to {embedding.name}, yet they are stored with different values; "
            "set tie_word_embeddings to false if both are meant"
        )
