"""A checkpoint as a GGUF file: the keys and tensors that llama.cpp reads, written tensor by tensor.

The families' tables name the tensors and the differences of llama.cpp; a model that llama.cpp would refuse, or run
wrongly, is refused first (model_config.py).
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as BlockType
from jaxtyping import Float, UInt8
from torch import Tensor

from minitron.core.device import one_core_each
from minitron.core.direct_io import CHUNK_BYTES, ahead, write_file
from minitron.core.errors import GgufError
from minitron.core.files import atomic_file
from minitron.gguf.metadata import metadata_of
from minitron.gguf.model_config import query_factor, require_runnable, rope, table_of, windows
from minitron.gguf.reader import Keys
from minitron.gguf.tokenizer import tokenizer_keys, tokenizer_notes
from minitron.model.architecture import Architecture, Gguf, TensorSpec
from minitron.model.checkpoint import Checkpoint
from minitron.model.hub import transformers_config
from minitron.model.naming import model_name

ALIGNMENT = 32  # the format's default, in bytes
PLAIN = {BlockType.F32: torch.float32, BlockType.F16: torch.float16, BlockType.BF16: torch.bfloat16}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    shape: rows first, as in torch; the file counts them the other way round.
    source: the checkpoint's tensor that it is made of, or None where `value` is all of it.
    """

    name: str
    shape: tuple[int, ...]
    source: TensorSpec | None
    value: Float[Tensor, " _"] | None = None

    @property
    def layer(self) -> int:
        """The tensor's layer; -1 outside the layers."""
        return -1 if self.source is None or self.source.layer is None else self.source.layer

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2


@dataclass(frozen=True)
class GgufModel:
    """A checkpoint as a GGUF file describes it.

    metadata: what the file says of the model that llama.cpp does not compute with.
    notes: for the user, where llama.cpp does otherwise than transformers.
    """

    checkpoint: Checkpoint
    metadata: gguf.Metadata
    keys: Keys
    tensors: tuple[GgufTensor, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        assert self.metadata.name is not None
        return self.metadata.name

    @property
    def table(self) -> Gguf:
        return table_of(self.checkpoint)

    @property
    def context(self) -> int:
        """The longest context that llama.cpp runs as transformers does."""
        return self.keys[f"{self.table.name}.context_length"]

    def rows(self, tensor: GgufTensor, start: int, stop: int) -> Float[Tensor, "rows ..."]:
        """Rows [start, stop) in float32 in llama.cpp's order; of queries and keys, whole heads only."""
        if tensor.source is None:
            assert tensor.value is not None
            return tensor.value[start:stop]
        checkpoint = self.checkpoint
        values = checkpoint.read_rows(tensor.source.name, start, stop).float()
        if self.in_heads(tensor):
            values = values.unflatten(0, (-1, 2, checkpoint.shape.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        if tensor.source.name.endswith("norm.weight"):
            values = values + checkpoint.architecture.norm_gain_offset
        factor = query_factor(checkpoint) if tensor.name in self._queries(tensor) else 1.0
        return values if factor == 1 else values * factor

    def in_heads(self, tensor: GgufTensor) -> bool:
        """Whether the rows within each head have another order than in the checkpoint."""
        return self.table.in_heads(tensor.name)

    def _queries(self, tensor: GgufTensor) -> tuple[str, ...]:
        """The tensors that carry the scale of a layer's queries."""
        assert tensor.source is not None
        block = f"blk.{tensor.source.layer}"
        norm = f"{block}.attn_q_norm.weight"
        has_norm = any(name.endswith("q_norm.weight") for name in self.checkpoint.architecture.tensors)
        return (norm,) if has_norm else (f"{block}.attn_q.weight", f"{block}.attn_q.bias")

    def runs(self, tensor: GgufTensor) -> Iterator[Float[Tensor, "rows ..."]]:
        """Yield all rows in float32, a run of them at a time."""
        per_row = 4 * math.prod(tensor.shape[1:])
        step = max(1, CHUNK_BYTES // per_row)
        if self.in_heads(tensor):
            step = max(1, step // self.checkpoint.shape.head_dim) * self.checkpoint.shape.head_dim
        spans = ((start, min(tensor.shape[0], start + step)) for start in range(0, tensor.shape[0], step))
        # The next rows are read while the caller is busy with these.
        with closing(ahead(self.rows(tensor, *span) for span in spans)) as runs:
            yield from runs


# Stores a run of a tensor's rows as bytes.
Encode = Callable[[GgufTensor, Float[Tensor, "rows columns"]], UInt8[Tensor, " bytes"]]


def describe_gguf(
    checkpoint: Checkpoint, *, name: str | None = None, pre: str | None = None, card: Mapping[str, Any] | None = None
) -> GgufModel:
    """Describe the GGUF file of a checkpoint, but for the types of its tensors, without reading weights.

    Args:
        name: of the model; default the name of its directory.
        pre: llama.cpp's name of the tokenizer's splitting rule, where tokenizer.json does not tell it.
        card: the metadata of its model card; default what README.md in its directory has.

    Raises: GgufError for a model that llama.cpp cannot run as it is.
    """
    table, shape, config = table_of(checkpoint), checkpoint.shape, transformers_config(checkpoint.config)
    require_runnable(checkpoint, config)
    rope_keys, factors, rope_notes = rope(checkpoint, config)
    window_keys, notes = windows(checkpoint, config)
    own: Keys = {
        "block_count": shape.layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "vocab_size": shape.vocab,
        **{key: float(value) for key, of in table.keys.items() if (value := getattr(config, of, None)) is not None},
        **rope_keys,
        **window_keys,
    }
    keys: Keys = {
        "general.type": "model",
        **{f"{table.name}.{key}": value for key, value in own.items()},
        **tokenizer_keys(checkpoint.path, shape.vocab, pre),
    }
    metadata, card_notes = metadata_of(checkpoint, name or model_name(checkpoint.path), card)
    notes += rope_notes + card_notes + tokenizer_notes(keys)
    rope_tensors = [GgufTensor(tensor, tuple(of.shape), None, of) for tensor, of in factors.items()]
    # In the order of llama.cpp's own tool, so that files can be the same to the byte.
    tensors = sorted([*rope_tensors, *_tensors(checkpoint)], key=lambda tensor: (tensor.layer, tensor.name))
    return GgufModel(checkpoint, metadata, keys, tuple(tensors), tuple(notes))


def write_gguf(
    model: GgufModel,
    file: Path,
    types: Mapping[str, BlockType],
    *,
    keys: Keys,
    encode: Encode | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Write a GGUF file, which appears whole or not at all; returns its sha256.

    Args:
        types: of every tensor, by name.
        keys: further keys of the file, beside those of the model.
        encode: the bytes of rows whose type is none of PLAIN.

    Raises: GgufError if a weight does not fit into 16 bits; RunError if the file cannot be written.
    """
    with atomic_file(file) as partial, one_core_each():
        return write_file(partial, _bytes_of(model, types, keys, encode, progress))


def file_bytes(model: GgufModel, types: Mapping[str, BlockType], keys: Keys) -> int:
    """The exact size of the file that `write_gguf` would write."""
    padded = (_padded(tensor_bytes(tensor.shape, types[tensor.name])) for tensor in model.tensors)
    return len(_header(model, types, keys)) + sum(padded)


def weights_bytes(model: GgufModel, types: Mapping[str, BlockType]) -> int:
    """The bytes of a file's tensors."""
    return sum(tensor_bytes(tensor.shape, types[tensor.name]) for tensor in model.tensors)


def bits_per_weight(model: GgufModel, types: Mapping[str, BlockType]) -> float:
    """The bits per weight of a file's tensors, as llama.cpp counts them."""
    return 8 * weights_bytes(model, types) / sum(math.prod(tensor.shape) for tensor in model.tensors)


def tensor_bytes(shape: tuple[int, ...], kind: BlockType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    assert shape[-1] % block == 0, f"rows of {shape[-1]} do not make whole blocks of {block}"
    return math.prod(shape) // block * size


def plain_types(model: GgufModel, kind: BlockType) -> dict[str, BlockType]:
    """The types of a plain file: matrices in one of PLAIN, and vectors in float32, which llama.cpp demands."""
    return {tensor.name: kind if tensor.is_matrix else BlockType.F32 for tensor in model.tensors}


def names_of(architecture: Architecture, config: Mapping[str, Any], layers: int) -> Iterator[tuple[TensorSpec, str]]:
    """Yield every tensor of a model with its name in llama.cpp, which must know the family."""
    assert architecture.gguf is not None
    for spec in architecture.specs(config, layers):
        name = name_in_file(architecture.gguf, layers, spec.name)
        assert name is not None, f"the gguf package has no name for {spec.name}"
        yield spec, name


def name_in_file(table: Gguf, layers: int, name: str) -> str | None:
    """llama.cpp's name of a tensor of a model with so many layers; None if it has none."""
    return _names(table.name, layers).get_name(name, try_suffixes=(".weight", ".bias"))


@cache
def _names(family: str, layers: int) -> gguf.TensorNameMap:
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(known[family], layers)


def _tensors(checkpoint: Checkpoint) -> Iterator[GgufTensor]:
    table = table_of(checkpoint)
    for spec, name in names_of(checkpoint.architecture, checkpoint.config, checkpoint.shape.layers):
        yield GgufTensor(name, spec.shape(checkpoint.shape), spec)
        if name == "token_embd.weight" and table.head == "own" and checkpoint.head == spec.name:
            yield GgufTensor("output.weight", spec.shape(checkpoint.shape), spec)


def _bytes_of(
    model: GgufModel,
    types: Mapping[str, BlockType],
    keys: Keys,
    encode: Encode | None,
    progress: Callable[[int, int], None],
) -> Generator[UInt8[Tensor, " _"], None, None]:
    yield torch.frombuffer(bytearray(_header(model, types, keys)), dtype=torch.uint8)
    for number, tensor in enumerate(model.tensors):
        kind, written = types[tensor.name], 0
        for rows in model.runs(tensor):
            if kind in PLAIN:
                part = _plain(tensor, rows, PLAIN[kind])
            else:
                assert encode is not None, f"{tensor.name} is to be {kind.name}"
                part = encode(tensor, rows)
            written += len(part)
            yield part
        assert written == tensor_bytes(tensor.shape, kind), tensor.name
        if _padded(written) > written:
            yield torch.zeros(_padded(written) - written, dtype=torch.uint8)
        progress(number + 1, len(model.tensors))


def _plain(tensor: GgufTensor, rows: Float[Tensor, "rows ..."], dtype: torch.dtype) -> UInt8[Tensor, " bytes"]:
    cast = rows.to(dtype)
    if dtype == torch.float16 and not cast.sum().isfinite() and not cast.isfinite().all():
        raise GgufError(f"{tensor.name} has weights beyond 65,504, the largest in F16: write BF16 instead")
    return cast.contiguous().view(-1).view(torch.uint8)


def _padded(count: int) -> int:
    return count + -count % ALIGNMENT


class _Memory(gguf.GGUFWriter):
    """The package's writer with its header in memory, because the tensors are written past it."""

    def open_output_file(self, path: Path | None = None) -> None:
        self.fout = [BytesIO()]  # type: ignore[list-item]
        self.state = gguf.gguf_writer.WriterState.EMPTY


def _header(model: GgufModel, types: Mapping[str, BlockType], keys: Keys) -> bytes:
    writer = _Memory(None, model.table.name)
    model.metadata.set_gguf_meta_model(writer)
    for key, value in {**model.keys, **keys}.items():
        _add(writer, key, value)
    for tensor in model.tensors:
        kind = types[tensor.name]
        writer.add_tensor_info(
            tensor.name, tensor.shape, torch.zeros(0).numpy().dtype, tensor_bytes(tensor.shape, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    header = writer.fout[0].getvalue()  # type: ignore[attr-defined]
    return header + bytes(_padded(len(header)) - len(header))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case str():
            writer.add_string(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case Sequence():
            writer.add_array(key, value)
        case _:
            raise AssertionError(f"{key} is {value!r}")
