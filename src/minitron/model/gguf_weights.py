"""The weights of a model in GGUF files: a table of the family's tensors, which are read by rows and dequantized.

A directory has this table instead of safetensors if it was made of a GGUF file (gguf/source.py). The table says in
which file each tensor lies, and how it differs there from the family's; no key of a GGUF file is read here.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import TypeAdapter
from torch import Tensor

from minitron.core.direct_io import CHUNK_BYTES, aligned_bytes, stamp
from minitron.core.errors import CheckpointError
from minitron.core.layouts import Count, Finite, Layout, Positive
from minitron.core.typed_files import FileKind, read_typed
from minitron.model.weights import StoredTensor, require_finite

GGUF_TABLE = "model.gguf.json"


class GgufPart(Layout):
    """A GGUF file with weights, as it was when the table was made.

    path: absolute.
    """

    path: str
    num_bytes: Positive
    mtime_ns: Count


class GgufEntry(Layout):
    """A tensor of the family's table in a GGUF file.

    part: the index of its file.
    name, type: its name and its type in the file.
    offset: of its first byte in the file.
    pair_rows: where the rotary pairs of each head lie side by side in the file, the rows of a head; else 0.
    added: the number that the file has added to every value.
    """

    part: Count
    name: str
    type: str
    shape: list[Positive]
    offset: Count
    pair_rows: Count = 0
    added: Finite = 0.0


class GgufTable(Layout):
    """Every tensor of a model by its name in the family's table.

    dtype: of a checkpoint that is made of this model.
    """

    dtype: Literal["float32", "bfloat16"]
    parts: list[GgufPart]
    tensors: dict[str, GgufEntry]


_TABLE = FileKind("a table of the tensors of a GGUF file", TypeAdapter(GgufTable))


@dataclass(frozen=True)
class QuantizedTensor(StoredTensor):
    """The location of a tensor in a GGUF file, whose rows are read in float32 as the file holds them."""

    type: str
    pair_rows: int
    added: float
    plain_dtype: torch.dtype

    @property
    def written_dtype(self) -> torch.dtype:
        return self.plain_dtype

    def rows(self, start: int, stop: int, buffer: UInt8[Tensor, " size"] | None = None) -> Tensor:
        head = self.pair_rows or 1
        first, last = start - start % head, stop + -stop % head
        values = self._vector(first, last) if len(self.shape) == 1 else self._matrix(first, last, buffer)
        if self.pair_rows:
            values = values.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2)
            values = values[start - first : stop - first]
        if self.added:
            values = values - self.added
        require_finite(values, self.name, self.file)
        return values

    def _vector(self, start: int, stop: int) -> Float[Tensor, " rows"]:
        with self.opened() as file:
            data = self.read_bytes(file, self.offset, self.offset + stored_bytes(self.type, self.shape[0]))
        return torch.from_numpy(_dequantized(data.numpy()[None], self.type)[0, start:stop])

    def _matrix(self, start: int, stop: int, buffer: UInt8[Tensor, " size"] | None) -> Float[Tensor, "rows columns"]:
        """Dequantize rows into `buffer`, a few at a time, because the package makes several copies of them."""
        wanted, of_row = (stop - start) * self.row_bytes, stored_bytes(self.type, self.shape[1])
        if buffer is None or len(buffer) < wanted:
            buffer = aligned_bytes(wanted)
        values = buffer[:wanted].view(torch.float32).view(stop - start, self.shape[1])
        step = max(1, CHUNK_BYTES // self.row_bytes)
        with self.opened() as file:
            for first in range(start, stop, step):
                last = min(stop, first + step)
                data = self.read_bytes(file, self.offset + first * of_row, self.offset + last * of_row)
                # As one row: the package splits rows into groups of sixteen, which takes five times as long.
                found = _dequantized(data.numpy()[None], self.type)
                values.numpy()[first - start : last - start] = found.reshape(last - first, -1)
        return values


def stored_bytes(kind: str, count: int) -> int:
    """The bytes of so many values of a type, which must make whole blocks."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return count // block * size


@cache
def can_dequantize(kind: str) -> bool:
    """Whether the gguf package turns a type into float32."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    try:
        return _dequantized(np.zeros((1, size), dtype=np.uint8), kind).shape == (1, block)
    except NotImplementedError:
        return False


def gguf_parts(path: Path) -> list[Path]:
    """The GGUF files of a directory with GGUF_TABLE.

    Raises: CheckpointError if the table is damaged.
    """
    return [Path(part.path) for part in _read_table(path).parts]


def gguf_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory with GGUF_TABLE.

    Raises: CheckpointError if the table is damaged, or if a file was changed since it was made.
    """
    table = _read_table(path)
    stamps = [_stamp(part) for part in table.parts]
    return {
        name: QuantizedTensor(
            file=Path(table.parts[entry.part].path),
            name=entry.name,
            dtype=torch.float32,
            shape=tuple(entry.shape),
            offset=entry.offset,
            stamp=stamps[entry.part],
            type=entry.type,
            pair_rows=entry.pair_rows,
            added=entry.added,
            plain_dtype=getattr(torch, table.dtype),
        )
        for name, entry in table.tensors.items()
    }


def _read_table(path: Path) -> GgufTable:
    return read_typed(
        path / GGUF_TABLE, _TABLE, CheckpointError, way_out=f"remove {path}, and give the GGUF file again"
    )


def _stamp(part: GgufPart) -> tuple[int, int, int]:
    try:
        found = stamp(Path(part.path).stat())
    except OSError as error:
        raise CheckpointError(f"cannot read {part.path}: {error.strerror or error}") from None
    if found[:2] != (part.num_bytes, part.mtime_ns):
        raise CheckpointError(f"{part.path} was changed after it was opened: give the GGUF file again")
    return found


def _dequantized(data: np.ndarray, kind: str) -> np.ndarray:
    import gguf

    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
