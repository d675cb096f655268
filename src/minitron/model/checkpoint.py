"""A Hugging Face model directory on disk: validated when opened, read tensor by tensor, written atomically.

Only safetensors, and nothing from the directory is executed.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from minitron.errors import CheckpointError
from minitron.model.architecture import Architecture, Axis, Parameters, Shape, TensorSpec
from minitron.model.families import family_of
from minitron.model.tokenizer import end_ids, make_portable
from minitron.model.tokenizer import load_tokenizer as load_tokenizer
from minitron.model.weights import (
    WAY_OUT,
    StoredTensor,
    TensorType,
    bytes_of,
    gather_rows,
    plan_shards,
    read_header,
    read_rows,
    require_finite,
    runs,
    write_shard,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth")
FINGERPRINT_BYTES = 4096  # of each tensor
SHARD_BYTES = 5_000_000_000  # the hub's own shard size
RMS_ROWS = 64  # of each matrix, whose weights stand for all
# Files that travel with the weights: tokenizer, chat template, generation config, licence.
CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "tekken.json", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


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
    specs = list(architecture.specs(config, shape.layers))
    _require_match(path, architecture, specs, stored)
    checkpoint = Checkpoint(path, config, architecture, shape, {spec.name: stored[spec.name] for spec in specs})
    for spec in specs:
        _require_shape(checkpoint, spec)
    if tied and architecture.head in stored:
        _require_tied(path, stored[architecture.embedding], stored[architecture.head])
    return checkpoint


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model directory.

    Raises: CheckpointError if it is missing, is no JSON object, or describes quantized weights.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a model directory: it has no config.json")
    try:
        config = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / 'config.json'} must be a JSON object")
    method = _quantized_by(config)
    if method:
        raise CheckpointError(f"{path} holds quantized weights ({method}); {WAY_OUT}")
    return config


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

    Dtypes and shapes are given in advance, so a shard's header is written before its data and no shard is ever held.

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
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for carried in carried_files(carry_from):
        shutil.copyfile(carried, out / carried.name)
    make_portable(out)
    return digests


def model_files(path: Path) -> list[Path]:
    """The files that make a model what it is: config, weights, and what is carried along. No README, no records."""
    weights = [*path.glob("*.safetensors"), *path.glob(INDEX)]
    return [path / "config.json", *weights, *carried_files(path)]


def carried_files(path: Path) -> list[Path]:
    return sorted({file for pattern in CARRIED for file in path.glob(pattern) if file.is_file()})


def load_model(path: Path, dtype: torch.dtype | None = None) -> Any:
    """The directory's model in memory, in evaluation mode; `dtype` None keeps the stored one.

    Raises: CheckpointError if a weight is NaN or infinite.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    ends = GenerationConfig(eos_token_id=end_ids(path) or None)  # all that counts of generation_config.json
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype or "auto", local_files_only=True, generation_config=ends
    ).eval()
    for name, parameter in model.named_parameters():
        require_finite(parameter.detach(), name, path)
    return model


def has_weights(path: Path) -> bool:
    """Whether a model directory holds weights, whole or in part and in any format."""
    return any(file.is_file() for pattern in ("*.safetensors", INDEX, *_PICKLES) for file in path.glob(pattern))


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model directory by its name, from the files' headers.

    Raises: CheckpointError.
    """
    return {name: stored for file in _weight_files(path) for name, stored in read_header(file).items()}


def _quantized_by(config: Mapping[str, Any]) -> str | None:
    """What a config.json says of its weights' quantization; None for plain weights."""
    for key in ("quantization_config", "compression_config", "quantization"):  # the last is mlx's
        facts = config.get(key)
        if facts:
            said = {name: value for name, value in facts.items() if value} if isinstance(facts, dict) else {}
            method = [str(said["quant_method"])] if "quant_method" in said else []
            flags = [flag for flag in ("load_in_4bit", "load_in_8bit") if flag in said]
            bits = [f"{said['bits']} bits"] if "bits" in said else []
            return f"config.json's {key}: {', '.join([*method, *flags, *bits]) or facts}"
    return None


def _weight_files(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        try:
            names = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise CheckpointError(f"{path / INDEX} is not a safetensors index") from None
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise CheckpointError(f"{path} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}")
        return [path / name for name in names]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    pickles = [file for pattern in _PICKLES for file in path.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{path} has only pickled weights ({pickles[0].name}), which can run code when loaded: "
            "convert them to safetensors with a tool you trust, then try again"
        )
    raise CheckpointError(f"{path} has no weights: neither {SINGLE} nor {INDEX}")


def _require_match(
    path: Path, architecture: Architecture, specs: list[TensorSpec], stored: Mapping[str, StoredTensor]
) -> None:
    missing = [spec.name for spec in specs if spec.name not in stored]
    if missing:
        raise CheckpointError(
            f"{path}: config.json promises {len(specs)} tensors, {len(missing)} are missing, first {missing[0]}"
        )
    # A tied model may store its output projection a second time.
    known = {*(spec.name for spec in specs), architecture.head}
    strange = [name for name in stored if name not in known and not name.endswith(architecture.ignored_suffixes)]
    if strange:
        raise CheckpointError(
            f"{path}: {len(strange)} tensors are not part of the {architecture.name} family, first {strange[0]}: "
            "config.json does not describe these weights"
        )


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
    if embedding != head and not _equal(embedding, head):
        raise CheckpointError(
            f"{path}: config.json ties {head.name} to {embedding.name}, yet they are stored with different values; "
            "set tie_word_embeddings to false if both are meant"
        )


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    parts = runs(torch.arange(one.shape[0]), one.row_bytes)
    return one.shape == other.shape and all(
        torch.equal(read_rows(one, start, stop), read_rows(other, start, stop)) for start, stop in parts
    )
