"""The type of each matrix of a quantized file, as llama.cpp mixes them, and the writing of the file.

ggml's own quantizer makes the blocks, so a file equals that of llama.cpp's tool, byte for byte.
"""

import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as BlockType
from gguf import LlamaFileType
from jaxtyping import Float, UInt8
from torch import Tensor

from minitron.core.errors import GgufError
from minitron.core.files import scratch_directory, scratch_errors
from minitron.gguf.config import GGUF_TYPES
from minitron.gguf.file import PLAIN, GgufModel, GgufTensor, file_bytes, tensor_bytes, write_gguf
from minitron.gguf.imatrix import ImportanceMatrix, require_importance_fits
from minitron.gguf.llama_cpp import llama_cpp
from minitron.gguf.reader import Keys
from minitron.gguf.tokenizer import SPLITTING_RULES

_SMALLEST = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"}
# Types too coarse for the layers' matrices without an importance matrix, by llama.cpp's tool.
NEED_IMPORTANCE = {BlockType[name] for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")}
_IQ = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS")
# Type whose blocks of 256 do not fit a matrix's columns -> a type with blocks of 32.
FALLBACK: dict[BlockType, BlockType] = {
    BlockType.Q2_K: BlockType.Q4_0,
    BlockType.Q3_K: BlockType.Q4_0,
    BlockType.Q4_K: BlockType.Q5_0,
    BlockType.Q5_K: BlockType.Q5_1,
    BlockType.Q6_K: BlockType.Q8_0,
    **{BlockType[name]: BlockType.IQ4_NL for name in _IQ},
}


@dataclass(frozen=True)
class Mixture:
    """The type of every tensor of a file.

    fallbacks: matrix whose columns do not fit the type of the rules -> that type.
    """

    file_type: str
    types: Mapping[str, BlockType]
    fallbacks: Mapping[str, BlockType]


@dataclass(frozen=True)
class _Rules:
    """The facts about a file and its model that llama.cpp's rules read.

    kind: the type of the file.
    group: query heads to a key-value head.
    informed: whether there is an importance matrix.
    """

    kind: str
    layers: int
    group: int
    informed: bool

    def early(self, layer: int, share: int) -> bool:
        return layer < self.layers // share

    def more(self, layer: int) -> bool:
        """Whether a layer is in the first or last eighth, or every third between: llama.cpp gives those more bits."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2


def mixture(
    model: GgufModel, file_type: str, *, informed: bool, overrides: Mapping[str, BlockType] | None = None
) -> Mixture:
    """Choose the type of every tensor by llama.cpp's rules.

    Args:
        informed: whether there is an importance matrix.
        overrides: regular expression found in a tensor's name -> its type, instead of the rules'.
    """
    base, shape = BlockType[GGUF_TYPES[file_type]], model.checkpoint.shape
    rules = _Rules(file_type, shape.layers, shape.group, informed)
    tied = all(tensor.name != "output.weight" for tensor in model.tensors)
    # llama.cpp calls models of 80 layers with shared key-value heads 70B: their matrices of values are small.
    of_70b = model.table.name in ("llama", "qwen2") and shape.layers == 80 and shape.group > 1
    types, fallbacks = {}, {}
    for tensor in model.tensors:
        if not tensor.is_matrix:
            types[tensor.name] = BlockType.F32
            continue
        wanted = base
        if base not in PLAIN:
            wanted = _by_rule(tensor, base, rules, tied)
            if of_70b and ".attn_v." in tensor.name and wanted in (BlockType.Q3_K, BlockType.Q4_K):
                wanted = BlockType.Q5_K
        overridden = _override(tensor, overrides or {})
        wanted = wanted if overridden is None else overridden
        types[tensor.name] = _fitting(tensor, wanted)
        if types[tensor.name] != wanted:
            fallbacks[tensor.name] = wanted
    return Mixture(file_type, types, fallbacks)


def fixed_types(model: GgufModel, overrides: Mapping[str, BlockType]) -> dict[str, BlockType]:
    """The types of the matrices that `overrides` names, or their fallbacks.

    Raises: GgufError for a pattern that no matrix's name has, or that an earlier pattern always precedes.
    """
    matrices = [tensor for tensor in model.tensors if tensor.is_matrix]
    names, decided = [tensor.name for tensor in matrices], {_pattern(tensor, overrides) for tensor in matrices}
    for pattern in overrides:
        if not any(re.search(pattern, name) for name in names):
            raise GgufError(f"no matrix's name has the pattern {pattern!r}; there are {', '.join(names[:10])}, ...")
        if pattern not in decided:
            raise GgufError(f"every matrix with the pattern {pattern!r} has a type by an earlier pattern already")
    return {
        tensor.name: _fitting(tensor, kind) for tensor in matrices if (kind := _override(tensor, overrides)) is not None
    }


def require_importance(model: GgufModel, mixed: Mixture, importance: ImportanceMatrix | None = None) -> None:
    """Raises: GgufError for types that need an importance matrix, where it is missing or lacks their matrices."""
    for tensor in model.tensors:
        kind = mixed.types[tensor.name]
        scarce = mixed.file_type == "Q2_K_S" and kind == BlockType.Q2_K
        lacking = tensor.is_matrix and (importance is None or tensor.name not in importance.sums)
        if lacking and tensor.layer >= 0 and (scarce or kind in NEED_IMPORTANCE):
            where = "" if importance is None else ", and the one given has nothing of it"
            raise GgufError(
                f"{mixed.file_type} needs an importance matrix ({tensor.name} is to be {kind.name}{where}): "
                "give --calibration TEXT, or --imatrix FILE"
            )


def require_known_rule(model: GgufModel) -> None:
    """Raises: GgufError if llama.cpp has no splitting rule of the name in the model's keys."""
    with scratch_directory() as path, scratch_errors():
        file = path / "tokenizer.gguf"
        write_gguf(replace(model, tensors=()), file, {}, keys={})
        said = llama_cpp().load_problem(file)  # it misses the tensors, after it has read the tokenizer
    if "pre-tokenizer" in said:
        raise GgufError(
            f"--pre {model.keys['tokenizer.ggml.pre']}: llama.cpp has no splitting rule of that name; minitron knows "
            f"{', '.join(SPLITTING_RULES.values())}, and llama.cpp's llama-vocab.cpp has all"
        )


def write_quantized(
    model: GgufModel,
    mixed: Mixture,
    file: Path,
    *,
    importance: ImportanceMatrix | None = None,
    importance_file: str = "",
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Write a file of the mixture, which appears whole or not at all; returns its sha256.

    Args:
        importance_file: the path of the importance matrix, for the file's keys.
        threads: that quantize rows; default all cores.

    Raises: GgufError if a type needs an importance matrix that is missing or of another model.
    """
    require_importance(model, mixed, importance)
    if importance is not None:
        columns = {tensor.name: tensor.shape[1] for tensor in model.tensors if tensor.is_matrix}
        require_importance_fits(importance, columns, importance_file)
    count = threads or os.cpu_count() or 1
    with ThreadPoolExecutor(count) as pool:

        def encode(tensor: GgufTensor, rows: Float[Tensor, "rows columns"]) -> UInt8[Tensor, " bytes"]:
            kind = mixed.types[tensor.name]
            weights = None if importance is None else importance.of(tensor.name)
            size = tensor_bytes(tuple(rows.shape), kind)
            return llama_cpp().quantize(kind, rows, size, weights, pool, count)

        keys = file_keys(mixed.file_type, importance, importance_file)
        return write_gguf(model, file, mixed.types, keys=keys, encode=encode, progress=progress)


def quantized_bytes(model: GgufModel, mixed: Mixture, importance: ImportanceMatrix | None, name: str = "") -> int:
    """The exact size of the file that `write_quantized` would write."""
    return file_bytes(model, mixed.types, file_keys(mixed.file_type, importance, name))


def file_keys(file_type: str, importance: ImportanceMatrix | None, importance_file: str) -> Keys:
    number = LlamaFileType["ALL_F32" if file_type == "F32" else f"MOSTLY_{file_type}"]
    keys: Keys = {"general.quantization_version": gguf.GGML_QUANT_VERSION, "general.file_type": int(number)}
    if importance is not None:
        keys |= {
            "quantize.imatrix.file": importance_file,
            "quantize.imatrix.dataset": "; ".join(importance.datasets),
            "quantize.imatrix.entries_count": len(importance.sums),
            "quantize.imatrix.chunks_count": importance.chunks,
        }
    return keys


def _override(tensor: GgufTensor, overrides: Mapping[str, BlockType]) -> BlockType | None:
    pattern = _pattern(tensor, overrides)
    return None if pattern is None else overrides[pattern]


def _pattern(tensor: GgufTensor, overrides: Mapping[str, BlockType]) -> str | None:
    """The first pattern that is found in the tensor's name."""
    return next((pattern for pattern in overrides if re.search(pattern, tensor.name)), None)


def _fitting(tensor: GgufTensor, kind: BlockType) -> BlockType:
    """The type, or else a type whose blocks make up a row."""
    for candidate in (kind, FALLBACK.get(kind, kind)):
        if tensor.shape[1] % gguf.GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return BlockType.F16


def _by_rule(tensor: GgufTensor, base: BlockType, rules: _Rules, tied: bool) -> BlockType:
    """Apply llama.cpp's rules, for which a fused query-key-value matrix counts as one of values."""
    name = tensor.name
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return _output(tensor, base, rules)
    if name == "token_embd.weight":
        return _embedding(base, rules)
    layer, part = tensor.layer, name.split(".")[2]
    if part in ("attn_v", "attn_qkv"):
        return _values(layer, base, rules)
    if part in ("attn_q", "attn_k"):
        return {"IQ3_XS": BlockType.IQ3_XXS, "IQ3_XXS": BlockType.IQ2_S}.get(rules.kind, base)
    if part == "attn_output":
        return _attention_output(base, rules)
    if part == "ffn_down":
        return _down(layer, base, rules)
    between = rules.layers // 8 <= layer < 7 * rules.layers // 8
    return BlockType.IQ3_XXS if rules.kind == "IQ3_XS" and between else base


def _output(tensor: GgufTensor, base: BlockType, rules: _Rules) -> BlockType:
    if base == BlockType.Q8_0 or tensor.shape[1] % gguf.GGML_QUANT_SIZES[base][0]:
        return BlockType.Q8_0
    return BlockType.Q5_K if rules.kind in _SMALLEST | {"IQ3_XXS"} else BlockType.Q6_K


def _embedding(base: BlockType, rules: _Rules) -> BlockType:
    if rules.kind in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"):
        return BlockType.Q2_K
    return BlockType.IQ3_S if rules.kind in ("IQ2_S", "IQ2_M", "IQ3_XXS") else base


def _values(layer: int, base: BlockType, rules: _Rules) -> BlockType:
    shared = rules.group >= 4
    match rules.kind:
        case "IQ2_S" | "IQ2_M":
            return BlockType.Q4_K if shared else BlockType.IQ3_S
        case kind if kind in _SMALLEST:
            return BlockType.Q4_K if shared else BlockType.Q2_K
        case "Q2_K":
            return BlockType.Q4_K if shared else BlockType.Q3_K
        case "IQ3_XXS" if not shared:
            return BlockType.IQ3_XXS if rules.informed else BlockType.IQ3_S
        case "Q2_K_S" | "IQ3_XXS" | "IQ3_XS" | "IQ3_S" if shared:
            return BlockType.Q4_K
        case "IQ3_M":
            return BlockType.Q4_K
        case "Q3_K_M":
            return BlockType.Q5_K if layer < 2 else BlockType.Q4_K
        case "Q3_K_L":
            return BlockType.Q5_K
        case "IQ4_NL" | "IQ4_XS" if shared:
            return BlockType.Q5_K
        case "Q4_K_M" | "Q5_K_M" if rules.more(layer):
            return BlockType.Q6_K
        case "Q4_K_S" if layer < 4:
            return BlockType.Q5_K
    return base


def _attention_output(base: BlockType, rules: _Rules) -> BlockType:
    return {
        "IQ1_S": BlockType.IQ2_XXS,
        "IQ1_M": BlockType.IQ2_XXS,
        "IQ2_S": BlockType.IQ3_S,
        "IQ2_M": BlockType.IQ3_S,
        "Q2_K": BlockType.Q3_K,
        "IQ3_XXS": BlockType.IQ3_S,
        "IQ3_M": BlockType.Q4_K,
        "Q3_K_M": BlockType.Q4_K,
        "Q3_K_L": BlockType.Q5_K,
    }.get(rules.kind, base)


def _down(layer: int, base: BlockType, rules: _Rules) -> BlockType:
    match rules.kind:
        case "IQ2_S" | "IQ2_M" if rules.early(layer, 8):
            return BlockType.IQ3_S
        case kind if kind in _SMALLEST:
            return BlockType.Q2_K if rules.early(layer, 8) else base
        case "Q2_K":
            return BlockType.Q3_K
        case "Q2_K_S" | "IQ3_M" if rules.early(layer, 8):
            return BlockType.Q4_K
        case "IQ3_XXS" if not rules.informed:
            return BlockType.Q4_K if rules.early(layer, 8) else BlockType.Q3_K
        case "Q3_K_M":
            return BlockType.Q5_K if rules.early(layer, 16) else BlockType.Q4_K
        case "Q3_K_L":
            return BlockType.Q5_K
        case "Q4_K_M" | "Q5_K_M" if rules.more(layer):
            return BlockType.Q6_K
        case "Q4_K_S" if rules.early(layer, 8):
            return BlockType.Q5_K
        case "IQ4_NL" | "IQ4_XS" if not rules.informed and rules.early(layer, 8):
            return BlockType.Q5_K
        case "Q4_0" | "Q5_0" if rules.informed and rules.early(layer, 8):
            return BlockType.Q4_1 if rules.kind == "Q4_0" else BlockType.Q5_1
    return base
