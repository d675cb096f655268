"""Small models and importance matrices whose every bit is the same everywhere, to hold quantized files against.

benchmarks/gguf_oracle.py has llama.cpp's own tool quantize them, and keeps what it made in golden/quantized.json.
"""

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny
import torch

from minitron.gguf.file import GgufModel, describe_gguf
from minitron.gguf.imatrix import ImportanceMatrix
from minitron.model.checkpoint import open_checkpoint

WIDE = {"hidden_size": 256, "head_dim": 32, "intermediate_size": 256, "vocab_size": 320}
# Name -> variant of tests/helpers/tiny.py and its changes: rows of whole blocks or not, heads shared or not, layers by
# which the rules differ, embeddings tied or not, matrices fused or not.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("llama", WIDE | {"intermediate_size": 288, "num_hidden_layers": 1}),
    "nine layers": ("llama", WIDE | {"num_hidden_layers": 9}),
    "shared heads, tied": ("llama-tied", WIDE | {"num_hidden_layers": 16, "num_key_value_heads": 2}),
    "rows of 96 and 100": ("llama", {"hidden_size": 96, "intermediate_size": 100, "head_dim": 12}),
    "fused": ("phi3", WIDE | {"num_hidden_layers": 8}),
}


def model(name: str, path: Path) -> GgufModel:
    """One of MODELS, written into the directory `path`."""
    variant, changes = MODELS[name]
    tiny.checkpoint(variant, path, **changes)
    loaded, draw = tiny.model(path), np.random.default_rng(0)
    with torch.no_grad():
        for parameter in loaded.parameters():
            # A sum of uniform numbers instead of normal ones: no function of the platform's has a part in it.
            values = draw.random((4, *parameter.shape), dtype=np.float32).sum(0) - 2
            parameter.copy_(torch.from_numpy(values) / parameter.shape[-1] ** 0.5)
    loaded.save_pretrained(path)
    return describe_gguf(open_checkpoint(path), name=name)


def importance(of: GgufModel) -> ImportanceMatrix:
    draw = np.random.default_rng(1)
    inside = [tensor for tensor in of.tensors if tensor.is_matrix and tensor.name.startswith("blk.")]
    sums = {tensor.name: torch.from_numpy(draw.random(tensor.shape[1], dtype=np.float32) + 0.01) for tensor in inside}
    return ImportanceMatrix(sums, dict.fromkeys(sums, 1), 1, 1, ("drawn",))


def digest(file: Path) -> str:
    """Of the names, types and bytes of all tensors."""
    total = hashlib.sha256()
    for tensor in gguf.GGUFReader(file).tensors:
        total.update(f"{tensor.name} {gguf.GGMLQuantizationType(tensor.tensor_type).name}\n".encode())
        total.update(np.ascontiguousarray(tensor.data).tobytes())
    return total.hexdigest()
