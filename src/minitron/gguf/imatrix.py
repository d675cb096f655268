"""The importance matrix of a model: how large the inputs of each matrix are on a text, column by column.

A quantizer rounds more coarsely where inputs are small. Calibration collects the sums anyway; they must be of the model
that is quantized, not of its teacher. Both of llama.cpp's formats are read and written.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minitron.core.errors import GgufError
from minitron.core.files import atomic_file
from minitron.gguf.file import names_of
from minitron.model.architecture import TensorSpec
from minitron.model.checkpoint import Checkpoint

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums over tokens.

    sums: matrix's name in a GGUF file -> sum of each input column's squares, float32.
    counts: matrix's name -> tokens summed over.
    chunks: the number of texts that were read.
    chunk_tokens: the length of each.
    datasets: the names of the texts' sources.
    """

    sums: Mapping[str, Float[Tensor, " columns"]]
    counts: Mapping[str, int]
    chunks: int
    chunk_tokens: int
    datasets: tuple[str, ...]

    def of(self, name: str) -> Float[Tensor, " columns"] | None:
        """The mean squares of a matrix's input columns; None where they were not collected."""
        if name not in self.sums:
            return None
        return self.sums[name] / self.counts[name] if self.counts[name] else torch.ones_like(self.sums[name])


def importance_of(
    checkpoint: Checkpoint,
    squares: Mapping[str, Float[Tensor, "layers columns"]],
    *,
    samples: int,
    tokens: int,
    source: str,
) -> ImportanceMatrix:
    """Make the importance matrix of the layers' matrices, as llama.cpp's tool collects it.

    Args:
        squares: of this model's activations at the sites of calibration, summed over `tokens` in `samples` blocks.
    """
    sums: dict[str, Tensor] = {}
    for spec, name in names_of(checkpoint.architecture, checkpoint.config, checkpoint.shape.layers):
        if spec.layer is not None and len(spec.axes) == 2:
            sums[name] = squares[_site(spec)][spec.layer].float()
    return ImportanceMatrix(
        sums=sums,
        counts=dict.fromkeys(sums, tokens),
        chunks=samples,
        chunk_tokens=tokens // samples,
        datasets=(source,),
    )


def write_importance(matrix: ImportanceMatrix, file: Path) -> None:
    """Write llama.cpp's GGUF format, or its older format for a name that ends in `.dat`.

    Raises: RunError if the file cannot be written, with nothing left under its name.
    """
    with atomic_file(file) as partial:
        _write_legacy(matrix, partial) if file.suffix == ".dat" else _write_gguf(matrix, partial)


def read_importance(file: Path) -> ImportanceMatrix:
    """Read an importance matrix in either format.

    Raises: GgufError for a file in neither format.
    """
    try:
        with file.open("rb") as data:
            is_gguf = data.read(4) == b"GGUF"
        return _sound(_read_gguf(file) if is_gguf else _read_legacy(file))
    except (OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError, struct.error) as error:
        raise GgufError(
            f"{file} is no importance matrix: {error}; make one with `minitron quantize --calibration TEXT`, "
            "or with llama.cpp's llama-imatrix"
        ) from None


def require_importance_fits(matrix: ImportanceMatrix, columns: Mapping[str, int], where: str) -> None:
    """Raises: GgufError if the matrix is of another model.

    Args:
        columns: matrix's name -> its input columns.
    """
    for name, count in columns.items():
        vector = matrix.sums.get(name)
        if vector is not None and len(vector) != count:
            raise GgufError(
                f"the importance matrix {where} has {len(vector)} columns for {name}, which has {count}: "
                "it is of another model; collect it from this one"
            )
    if not any(name in matrix.sums for name in columns):
        raise GgufError(f"the importance matrix {where} has none of this model's matrices: it is of another model")


def _sound(matrix: ImportanceMatrix) -> ImportanceMatrix:
    """Raises: ValueError for impossible sums of squares or counts."""
    if not matrix.sums:
        raise ValueError("it has no entries")
    for name, sums in matrix.sums.items():
        if not (sums.isfinite().all() and (sums >= 0).all() and sums.any()):
            raise ValueError(f"what it has of {name} is no sum of squares")
        if matrix.counts[name] < 0:
            raise ValueError(f"the count of {name} is {matrix.counts[name]}")
    return matrix


def _site(spec: TensorSpec) -> str:
    """The site of calibration that sees a matrix's inputs."""
    writes, reads = ({segment.unit for segment in axis} for axis in spec.axes)
    of_mlp = "ffn" in writes | reads
    return f"{'mlp' if of_mlp else 'attention'}_{'in' if reads == {'hidden'} else 'out'}"


def _write_gguf(matrix: ImportanceMatrix, file: Path) -> None:
    writer = gguf.GGUFWriter(file, "imatrix")
    writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE)  # it is no model
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", list(matrix.datasets))
    writer.add_uint32("imatrix.chunk_count", matrix.chunks)
    writer.add_uint32("imatrix.chunk_size", matrix.chunk_tokens)
    for name, sums in sorted(matrix.sums.items()):
        writer.add_tensor(f"{name}{_SUMS}", sums[None].numpy())
        writer.add_tensor(f"{name}{_COUNTS}", np.array([[matrix.counts[name]]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_gguf(file: Path) -> ImportanceMatrix:
    reader = gguf.GGUFReader(file)

    def said(key: str) -> object:
        if key not in reader.fields:
            raise ValueError(f"it does not say {key}")
        return reader.fields[key].contents()

    if said("general.type") != "imatrix":
        raise ValueError(f"it is a GGUF file of type {said('general.type')!r}")
    stored = {tensor.name: torch.from_numpy(np.array(tensor.data, dtype=np.float32)) for tensor in reader.tensors}
    sums = {name.removesuffix(_SUMS): values.flatten() for name, values in stored.items() if name.endswith(_SUMS)}
    counts = {name: round(stored[f"{name}{_COUNTS}"].sum().item()) for name in sums}
    datasets = said("imatrix.datasets")
    chunks, chunk_tokens = said("imatrix.chunk_count"), said("imatrix.chunk_size")
    if not (isinstance(datasets, list) and isinstance(chunks, int) and isinstance(chunk_tokens, int)):
        raise ValueError(f"its datasets, chunks and their size are {datasets!r}, {chunks!r} and {chunk_tokens!r}")
    return ImportanceMatrix(sums, counts, chunks, chunk_tokens, tuple(datasets))


def _write_legacy(matrix: ImportanceMatrix, file: Path) -> None:
    with file.open("wb") as data:
        data.write(struct.pack("<i", len(matrix.sums)))
        for name, sums in sorted(matrix.sums.items()):
            calls = -(-matrix.counts[name] // matrix.chunk_tokens)
            values = (sums / matrix.counts[name] * calls).numpy().astype("<f4")
            data.write(struct.pack("<i", len(name.encode())) + name.encode())
            data.write(struct.pack("<ii", calls, len(values)) + values.tobytes())
        text = "; ".join(matrix.datasets).encode()
        data.write(struct.pack("<ii", matrix.chunks, len(text)) + text)


def _read_legacy(file: Path) -> ImportanceMatrix:
    data, at = file.read_bytes(), 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(data):
            raise ValueError("it ends too early, or holds something else")
        at += count
        return data[at - count : at]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    means, calls = {}, {}
    for _ in range(number()):
        name = take(number()).decode()
        calls[name], count = number(), number()
        values = torch.from_numpy(np.frombuffer(take(4 * count), dtype="<f4").astype(np.float32))
        means[name] = values / calls[name] if calls[name] else values
    if not means:
        raise ValueError("it has no entries")
    chunks, dataset = (number(), take(number()).decode()) if at < len(data) else (max(calls.values()), "")
    # It does not say how many tokens a call had; means are all that a quantizer takes.
    sums = {name: mean * calls[name] for name, mean in means.items()}
    return ImportanceMatrix(sums, calls, chunks, 1, (dataset,) if dataset else ())
