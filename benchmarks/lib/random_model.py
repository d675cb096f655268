"""A model of random weights on disk, of any size, written piece by piece."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lib.measure import save_byte_tokenizer
from minitron.model.architecture import TensorSpec
from minitron.model.families import family_of
from minitron.model.writing import SHARD_BYTES, write_checkpoint

DRAWN = 1 << 25  # normal values, from which every tensor is made
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": 256,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def random_model(config: dict[str, Any], path: Path) -> None:
    """Write a bfloat16 model of a config with a tokenizer of bytes into the existing directory `path`."""
    architecture = family_of(config)
    shape = architecture.shape(config)
    specs = list(architecture.specs(config, shape.layers))
    tensors = {spec.name: (torch.bfloat16, spec.shape(shape)) for spec in specs}
    pieces = _drawn(specs, tensors, gain=1 - architecture.norm_gain_offset)
    write_checkpoint(path, config=config, tensors=tensors, pieces=pieces, carry_from=path, shard_bytes=SHARD_BYTES)
    save_byte_tokenizer(path)


def _drawn(specs: list[TensorSpec], tensors: dict[str, Any], gain: float) -> Iterator[torch.Tensor]:
    """Values that keep activations near one. Runs of one drawn block, each tensor's from another place in it."""
    normal = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))
    scaled: dict[int, torch.Tensor] = {}
    place = 0
    for spec in specs:
        shape = tensors[spec.name][1]
        if len(shape) == 1:
            noise = 0.1 * normal[: shape[0]]
            yield (noise + gain if spec.name.endswith("weight") else noise).to(torch.bfloat16)
            continue
        fan_in = shape[-1]
        if fan_in not in scaled:
            scaled[fan_in] = (normal / fan_in**0.5).to(torch.bfloat16)
        block = scaled[fan_in]
        rows = len(block) // fan_in // 2
        for start in range(0, shape[0], rows):
            place = (place + 7919) % (len(block) // 2)
            count = min(rows, shape[0] - start)
            yield block[place : place + count * fan_in].view(count, fan_in)
