"""A Hugging Face model directory on disk: validated when opened, read tensor by tensor, written atomically.

Only safetensors, and nothing from the directory is executed.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minitron.errors import CheckpointError
from minitron.model.architecture import Architecture, Parameters, Shape, TensorSpec
from minitron.model.families import family_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000  # the hub's own shard size
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Files that travel with the weights: tokenizer, chat template, generation config, licence.
CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "tekken.json", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    name: str  # in the file
    dtype: torch.dtype
    shape: tuple[int, ...]


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
        return sum(self._bytes(name) for name in self.stored)

    @property
    def parameters(self) -> Parameters:
        return self.architecture.count(self.shape, self.config)

    @property
    def head(self) -> str:
        """The tensor that projects to the vocabulary: the embedding itself where they are tied."""
        return self.architecture.head if self.architecture.head in self.stored else self.architecture.embedding

    def specs(self) -> Iterator[TensorSpec]:
        return self.architecture.specs(self.config, self.shape.layers)

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype.

        Raises: CheckpointError if it cannot be read or holds NaN or infinity.
        """
        tensor = _read(self.stored[name])
        _require_finite(tensor, name, self.stored[name].file)
        return tensor

    def _bytes(self, name: str) -> int:
        stored = self.stored[name]
        return torch.Size(stored.shape).numel() * stored.dtype.itemsize


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The local directory of a model: a directory as it is, a hub id downloaded to the hub's cache.

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

    patterns = ["*.json", "*.safetensors", *CARRIED]
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
    stored = _stored_tensors(path)
    if config.get("tie_word_embeddings") and architecture.embedding not in stored and architecture.head in stored:
        stored[architecture.embedding] = stored[architecture.head]  # tied: some exports keep only the other name
    expected = {spec.name: spec.shape(shape) for spec in architecture.specs(config, shape.layers)}
    _require_match(path, architecture, expected, stored)
    if config.get("tie_word_embeddings") and architecture.head in stored:
        _require_tied(path, stored[architecture.embedding], stored[architecture.head])
    return Checkpoint(path, config, architecture, shape, {name: stored[name] for name in expected})


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
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{path} holds quantized weights; cut the original model in 16 or 32 bits and quantize after"
        )
    return config


def write_checkpoint(
    out: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    carry_from: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model into the existing directory `out`, asking `read` for one tensor at a time.

    Dtypes and shapes are given in advance, so a shard's header is written before its data and no shard is ever held.
    """
    shards = _plan_shards(tensors, shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    for file, members in zip(names, shards, strict=True):
        _write_shard(out / file, {name: tensors[name] for name in members}, read)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_num_bytes(*tensor) for tensor in tensors.values())},
            "weight_map": {name: file for file, members in zip(names, shards, strict=True) for name in members},
        }
        (out / INDEX).write_text(json.dumps(index, indent=2))
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for carried in carried_files(carry_from):
        shutil.copyfile(carried, out / carried.name)


def model_files(path: Path) -> list[Path]:
    """The files that make a model what it is: config, weights, and what is carried along. No README, no records."""
    weights = [*path.glob("*.safetensors"), *path.glob(INDEX)]
    return [path / "config.json", *weights, *carried_files(path)]


def carried_files(path: Path) -> list[Path]:
    return sorted({file for pattern in CARRIED for file in path.glob(pattern) if file.is_file()})


def load_tokenizer(path: Path) -> Any:
    """The directory's tokenizer.

    Raises: CheckpointError if there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} has no tokenizer that transformers can load: {reason}") from None


def load_model(path: Path, dtype: torch.dtype | None = None) -> Any:
    """The directory's model in memory, in evaluation mode; `dtype` None keeps the stored one.

    Raises: CheckpointError if a weight is NaN or infinite.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True).eval()
    for name, parameter in model.named_parameters():
        _require_finite(parameter.detach(), name, path)
    return model


def _require_finite(tensor: Tensor, name: str, file: Path) -> None:
    # The sum is finite unless a value is not, or it overflows: one pass and no mask the size of the tensor. Not in
    # float32: that would convert a copy of the whole tensor first.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise CheckpointError(f"{file}: tensor {name} holds NaN or infinity: the checkpoint is damaged")


def _read(stored: StoredTensor) -> Tensor:
    try:
        with safe_open(stored.file, framework="pt") as reader:
            return reader.get_tensor(stored.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{stored.file}: cannot read tensor {stored.name}: {error}") from None


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for file in _weight_files(path):
        for name, (dtype, shape) in _read_header(file).items():
            if dtype not in DTYPES:
                raise CheckpointError(f"{file}: tensor {name} is stored as {dtype}; supported are {', '.join(DTYPES)}")
            stored[name] = StoredTensor(file, name, DTYPES[dtype], shape)
    return stored


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
    pickles = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    if pickles:
        raise CheckpointError(
            f"{path} has only pickled weights ({pickles[0].name}), which can run code when loaded: "
            "convert them to safetensors with a tool you trust, then try again"
        )
    raise CheckpointError(f"{path} has no weights: neither {SINGLE} nor {INDEX}")


def _read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a safetensors file, which must be as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as data:
        start = data.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise CheckpointError(
                f"{file} is truncated or no safetensors file: its header would be {length} bytes long"
            )
        try:
            entries = json.loads(data.read(length))
            entries.pop("__metadata__", None)
            expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise CheckpointError(f"{file} is not a safetensors file: its header is no table of tensors") from None
    if size != expected:
        raise CheckpointError(f"{file} is truncated: {size} bytes where its header says {expected}; copy it again")
    return tensors


def _require_match(
    path: Path, architecture: Architecture, expected: dict[str, tuple[int, ...]], stored: dict[str, StoredTensor]
) -> None:
    missing = [name for name in expected if name not in stored]
    if missing:
        raise CheckpointError(
            f"{path}: config.json promises {len(expected)} tensors, {len(missing)} are missing, first {missing[0]}"
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{path}: tensor {name} is {list(stored[name].shape)}, but by config.json it must be {list(shape)}"
            )
    # A tied model may store its output projection a second time.
    known = {*expected, architecture.head}
    strange = [name for name in stored if name not in known and not name.endswith(architecture.ignored_suffixes)]
    if strange:
        raise CheckpointError(
            f"{path}: {len(strange)} tensors are not part of the {architecture.name} family, first {strange[0]}: "
            "config.json does not describe these weights"
        )


def _require_tied(path: Path, embedding: StoredTensor, head: StoredTensor) -> None:
    """transformers unties two tensors that are stored with different values, whatever the config says."""
    if embedding != head and not torch.equal(_read(embedding), _read(head)):
        raise CheckpointError(
            f"{path}: config.json ties {head.name} to {embedding.name}, yet they are stored with different values; "
            "set tie_word_embeddings to false if both are meant"
        )


def _plan_shards(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = _num_bytes(*tensor)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_shard(
    file: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], read: Callable[[str], Tensor]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + _num_bytes(dtype, shape)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, (dtype, shape) in tensors.items():
            tensor = read(name)
            assert tensor.dtype == dtype and tuple(tensor.shape) == shape, name
            out.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
