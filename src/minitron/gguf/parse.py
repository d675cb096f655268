"""The keys of a GGUF file and the places of its tensors.

The gguf package's own reader makes several arrays of each token of a vocabulary: half a minute for a quarter of a
million tokens, where this takes a second.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# The kinds of values: numbers by numpy's names, little-endian.
_NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
_STRING, _ARRAY = 8, 9
_MOST_DIMS = 4
_ALIGNMENT = 32  # of tensors, in bytes, where general.alignment does not say
_LENGTH = struct.Struct("<Q")
_ENDS = "it ends within its keys and its list of tensors"


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a GGUF file.

    shape: rows first, as in torch; the file counts them the other way round.
    offset: of its first byte in the file.
    """

    file: Path
    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def count(self) -> int:
        return prod(self.shape)

    def stored(self) -> np.ndarray:
        """Its bytes, mapped from the file."""
        return np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.offset, shape=(self.num_bytes,))


def parse(file: Path) -> tuple[dict[str, Any], list[FileTensor]]:
    """Read the keys and the list of tensors of a file that begins as GGUF of version 2 or 3 does.

    Raises: OSError, ValueError that says what is wrong.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, 8)
        num_tensors, num_keys = cursor.number("u8"), cursor.number("u8")
        said: dict[str, Any] = {}
        for _ in range(num_keys):
            key = cursor.string()
            if key in said:
                raise ValueError(f"it states {key} twice")
            said[key] = cursor.value(cursor.number("u4"))
        entries = [cursor.tensor() for _ in range(num_tensors)]
        alignment = said.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"its general.alignment is {alignment!r}")
        start = cursor.at + -cursor.at % alignment
        tensors = [_placed(file, entry, start, len(data)) for entry in entries]
        _require_in_a_row(tensors, start, alignment)
        return said, tensors


def _require_in_a_row(tensors: list[FileTensor], start: int, alignment: int) -> None:
    """Check that each tensor begins where the one before it ends, as llama.cpp does, and that no name is twice."""
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise ValueError(f"it has a tensor {tensor.name} twice")
        if tensor.offset != start:
            raise ValueError(
                f"its tensor {tensor.name} begins at byte {tensor.offset:,}, but by those before at {start:,}"
            )
        names.add(tensor.name)
        start += tensor.num_bytes + -tensor.num_bytes % alignment


@dataclass
class _Cursor:
    """A place in the bytes of a file."""

    data: mmap.mmap
    at: int

    def number(self, kind: str) -> Any:
        found = np.frombuffer(self._take(np.dtype(kind).itemsize), dtype=f"<{kind}")[0]
        return found.item()

    def string(self) -> str:
        return self._take(self.number("u8")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.number("u4"), self.number("u8"))
        if kind not in _NUMBERS:
            raise ValueError(f"it has a value of the unknown kind {kind}")
        return self.number(_NUMBERS[kind])

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """The entry of a tensor: its name, shape, type, and offset from the first tensor."""
        name, dims = self.string(), self.number("u4")
        if dims > _MOST_DIMS:
            raise ValueError(f"its tensor {name} has {dims} axes")
        shape = tuple(self.number("u8") for _ in range(dims))
        return name, shape[::-1], self.number("u4"), self.number("u8")

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind in _NUMBERS:
            size = np.dtype(_NUMBERS[kind]).itemsize
            return np.frombuffer(self._take(count * size), dtype=f"<{_NUMBERS[kind]}").tolist()
        if kind != _STRING:
            return [self.value(kind) for _ in range(count)]
        texts, data, at = [], self.data, self.at
        for _ in range(count):  # in this loop, for there may be a million
            (length,) = _LENGTH.unpack_from(data, at) if at + 8 <= len(data) else (len(data),)
            at += 8 + length
            if at > len(data):
                raise ValueError(_ENDS)
            texts.append(data[at - length : at].decode("utf-8"))
        self.at = at
        return texts

    def _take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise ValueError(_ENDS)
        self.at += count
        return self.data[self.at - count : self.at]


def _placed(file: Path, entry: tuple[str, tuple[int, ...], int, int], start: int, size: int) -> FileTensor:
    """The place of a tensor, which must lie within the file."""
    name, shape, number, offset = entry
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(
            f"its tensor {name} is of type {number}, which the gguf package does not know (a newer one may)"
        ) from None
    block, of_block = gguf.GGML_QUANT_SIZES[kind]
    if (shape[-1] if shape else 1) % block:
        raise ValueError(f"rows of its tensor {name}, {shape[-1]}, are no whole blocks of {kind.name}")
    num_bytes = prod(shape) // block * of_block
    if start + offset + num_bytes > size:
        raise ValueError(f"its tensor {name} ends at byte {start + offset + num_bytes:,} of {size:,}")
    return FileTensor(file, name, kind, shape, start + offset, num_bytes)
