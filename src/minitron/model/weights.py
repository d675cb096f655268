"""Tensors in safetensors files: located by the headers, read by rows, written in shards."""

import json
import os
import struct
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from minitron.core.direct_io import CHUNK_BYTES, opened, read_range, stamp, write_file
from minitron.core.errors import CheckpointError
from minitron.core.reading import decode, parse_json
from minitron.model.config_json import QUANTIZE_AFTER

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# More dtypes can be written than read: the state of a training contains more than weights.
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
GAP_BYTES = 256 << 10  # unwanted bytes are read up to this number, which costs about as much as another read
_HEADER_BYTES = 100_000_000  # the format's own limit
# Part of a tensor's name that only one kind of quantized checkpoint has -> its quantization.
QUANTIZED_NAMES = {
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".SCB": "bitsandbytes (load_in_8bit)",
    ".quant_state.": "bitsandbytes (load_in_4bit)",
    ".absmax": "bitsandbytes (load_in_4bit)",
    ".weight_packed": "compressed-tensors",
    "_blocks": "mxfp4",
    ".scales": "mlx",
}

# The dtype and the shape of a tensor.
TensorType = tuple[torch.dtype, tuple[int, ...]]


class _Entry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor: `offset` bytes into a file that had this stamp when its header was read."""

    file: Path
    name: str  # in the file
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    stamp: tuple[int, int, int]

    @property
    def num_bytes(self) -> int:
        return bytes_of(self.dtype, self.shape)

    @property
    def written_dtype(self) -> torch.dtype:
        """The dtype in which a model that is made of this one stores the tensor."""
        return self.dtype

    @property
    def row_bytes(self) -> int:
        return bytes_of(self.dtype, self.shape[1:])

    def rows(self, start: int, stop: int, buffer: UInt8[Tensor, " size"] | None = None) -> Tensor:
        """Read the rows [start, stop) in `dtype`, into `buffer` if they fit.

        Raises: CheckpointError if they cannot be read or hold NaN or infinity.
        """
        first, wanted = self.offset + start * self.row_bytes, (stop - start) * self.row_bytes
        with self.opened() as file:
            data = self.read_bytes(file, first, first + wanted, buffer)
        if data.storage_offset() % self.dtype.itemsize:
            data = data.clone()  # a header of odd length
        tensor = data.view(self.dtype).view(stop - start, *self.shape[1:])
        require_finite(tensor, self.name, self.file)
        return tensor

    @contextmanager
    def opened(self) -> Iterator[int]:
        """In this block, the file is open.

        Raises: CheckpointError if it is another file than when the header was read, or cannot be read.
        """
        try:
            with opened(self.file, os.O_RDONLY) as file:
                if stamp(os.fstat(file)) != self.stamp:
                    raise CheckpointError(self._unreadable("the file was changed after the checkpoint was opened"))
                yield file
        except OSError as error:
            raise CheckpointError(self._unreadable(error.strerror or str(error))) from None

    def read_bytes(
        self, file: int, start: int, stop: int, buffer: UInt8[Tensor, " size"] | None = None
    ) -> UInt8[Tensor, " bytes"]:
        """Read the bytes [start, stop) of the open file, into `buffer` if they fit.

        Raises: CheckpointError if the file ends before.
        """
        data = read_range(file, start, stop, buffer)
        if len(data) != stop - start:
            raise CheckpointError(self._unreadable("the file ends before it"))
        return data

    def _unreadable(self, reason: str) -> str:
        return f"{self.file}: cannot read tensor {self.name}: {reason}"


def bytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return prod(shape) * dtype.itemsize


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file, and check it against the length of the file.

    Raises: CheckpointError; also for dtypes that are not in DTYPES, with the quantization that uses them.
    """
    try:
        with file.open("rb") as data:
            status = os.fstat(data.fileno())
            size = status.st_size
            start = data.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > min(size - 8, _HEADER_BYTES):
                raise CheckpointError(
                    f"{file} is truncated or no safetensors file: its header would be {length} bytes long"
                )
            header = data.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    entries = _entries(file, header)
    _require_supported(file, {name: entry["dtype"] for name, entry in entries.items()})
    tensors = {name: _stored(file, name, entry, 8 + length, status) for name, entry in entries.items()}
    _require_apart(file, list(tensors.values()))
    end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != end:
        state = "truncated" if size < end else "too long"
        raise CheckpointError(f"{file} is {state}: {size} bytes where its header says {end}; copy it again")
    return tensors


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors are equal in dtype, shape and all values."""
    parts = runs(torch.arange(one.shape[0]), one.row_bytes) if one.shape and one.num_bytes else [(0, 1)]
    return (one.dtype, one.shape) == (other.dtype, other.shape) and all(
        torch.equal(one.rows(start, stop), other.rows(start, stop)) for start, stop in parts
    )


def gather_rows(stored: StoredTensor, rows: Int[Tensor, " rows"]) -> Tensor:
    """Read some rows of a tensor, given in ascending order; neighbours are read together.

    Raises: CheckpointError for a row that the tensor does not have.
    """
    if len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < stored.shape[0]:
        wrong = int(rows[0]) if int(rows[0]) < 0 else int(rows[-1])
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} has {stored.shape[0]} rows, and row {wrong} is asked for: the tokens "
            "are of another tokenizer"
        )
    gathered = torch.empty((len(rows), *stored.shape[1:]), dtype=stored.dtype)
    for start, stop in runs(rows, stored.row_bytes):
        first = int(rows[start])
        gathered[start:stop] = stored.rows(first, int(rows[stop - 1]) + 1)[rows[start:stop] - first]
    return gathered


def runs(rows: Int[Tensor, " rows"], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Split ascending rows into parts [start, stop), each of which is read at once.

    A part spans at most CHUNK_BYTES (or one row) of the tensor, and has no gap of more than GAP_BYTES.
    """
    gaps = (rows.diff() > 1 + GAP_BYTES // row_bytes).nonzero().flatten() + 1
    longest = max(1, CHUNK_BYTES // row_bytes)
    for start, end in pairwise([0, *gaps.tolist(), len(rows)]):
        while start < end:
            stop = start + int(torch.searchsorted(rows[start:end], int(rows[start]) + longest))
            yield start, stop
            start = stop


def require_finite(tensor: Tensor, name: str, file: Path) -> None:
    # The sum is finite unless a value is not, or it overflows: this is one pass, without a mask of the tensor's size. A
    # sum in float32 would first convert a copy of the whole tensor.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise CheckpointError(f"{file}: tensor {name} holds NaN or infinity: the checkpoint is damaged")


def require_fits(tensor: Tensor, stored: StoredTensor, dtype: torch.dtype) -> None:
    """Raises: CheckpointError for values beyond 65,504, which become infinite in float16."""
    if dtype == torch.float16 and stored.dtype != dtype and tensor.abs().max() > torch.finfo(dtype).max:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} holds values beyond 65,504, the largest in float16, which the "
            "model is to run in: a checkpoint runs in the dtype of its embedding; convert it to bfloat16 or float32"
        )


def plan_shards(tensors: Mapping[str, TensorType], shard_bytes: int) -> list[dict[str, TensorType]]:
    """Distribute the tensors in their order to shards of at most `shard_bytes` (or one tensor)."""
    shards: list[dict[str, TensorType]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = bytes_of(*tensor)
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    return shards


def write_shard(file: Path, tensors: Mapping[str, TensorType], pieces: Iterator[Tensor]) -> str:
    """Write a safetensors file with tensors from `pieces`, whole or some rows at a time; returns its sha256."""
    return write_file(file, _shard_bytes(tensors, pieces))


def _shard_bytes(
    tensors: Mapping[str, TensorType], pieces: Iterator[Tensor]
) -> Generator[UInt8[Tensor, " _"], None, None]:
    yield torch.frombuffer(bytearray(_header(tensors)), dtype=torch.uint8)
    for name, (dtype, shape) in tensors.items():
        missing = _num_rows(shape)
        while missing > 0:
            piece = next(pieces)
            assert piece.dtype == dtype and piece.shape[1:] == shape[1:], name
            missing -= _num_rows(piece.shape)
            yield piece.contiguous().view(-1).view(torch.uint8)
        assert missing == 0, name


def _num_rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1  # a scalar is one row


def _header(tensors: Mapping[str, TensorType]) -> bytes:
    header: dict[str, _Entry | dict[str, str]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + bytes_of(dtype, shape)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _entries(file: Path, header: bytes) -> dict[str, _Entry]:
    """Parse a file's header, and check the types of its values."""
    where = f"{file} is not a safetensors file: its header"
    damaged = f"{where} is no table of tensors"
    entries = parse_json(decode(header, where, CheckpointError), where, CheckpointError, keys_once=True)
    if not isinstance(entries, dict):
        raise CheckpointError(damaged)
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise CheckpointError(f"{damaged} ({name} has no dtype)")
        if not _is_sizes(entry.get("shape")) or not _is_sizes(entry.get("data_offsets")):
            raise CheckpointError(f"{damaged} (shape and data_offsets of {name} must be lists of integers from 0)")
        if len(entry["data_offsets"]) != 2:
            raise CheckpointError(f"{damaged} (data_offsets of {name} must be a begin and an end)")
    return entries


def _is_sizes(value: Any) -> bool:
    """Whether a value is a list of integers that torch can take as sizes; true and 64.0 are no integers."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**62 for size in value)


def _stored(file: Path, name: str, entry: _Entry, data: int, status: os.stat_result) -> StoredTensor:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != bytes_of(dtype, shape):
        raise CheckpointError(
            f"{file}: tensor {name} takes {end - begin} bytes where {entry['dtype']} {list(shape)} takes "
            f"{bytes_of(dtype, shape)}: its header is damaged; copy it again"
        )
    return StoredTensor(file, name, dtype, shape, data + begin, stamp(status))


def _require_apart(file: Path, tensors: list[StoredTensor]) -> None:
    """Check that no byte belongs to two tensors: one of them would have wrong values."""
    filled = sorted((tensor for tensor in tensors if tensor.num_bytes), key=lambda tensor: tensor.offset)
    for one, other in pairwise(filled):
        if one.offset + one.num_bytes > other.offset:
            raise CheckpointError(
                f"{file}: tensors {one.name} and {other.name} lie over each other: its header is damaged; copy it again"
            )


def _require_supported(file: Path, dtypes: Mapping[str, str]) -> None:
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            method = _quantized_by(dtypes)
            reason = f", as {method} stores quantized weights; {QUANTIZE_AFTER}" if method else ""
            raise CheckpointError(
                f"{file}: tensor {name} is stored as {dtype}; supported are {', '.join(DTYPES)}{reason}"
            )


def _quantized_by(dtypes: Mapping[str, str]) -> str | None:
    """The quantization of a file's tensors, by their dtypes and names."""
    if any(str(dtype).startswith("F8_") for dtype in dtypes.values()):
        return "fp8"
    return next((method for mark, method in QUANTIZED_NAMES.items() if any(mark in name for name in dtypes)), None)
