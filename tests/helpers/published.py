"""The published Minitron models and their teachers: config.json fields and exact parameter counts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLAMA_31 = {
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MISTRAL_NEMO = {
    "model_type": "mistral",
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
NEMOTRON_4 = {
    "model_type": "nemotron",
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 256000,
    "norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Published:
    config: dict[str, Any]
    non_embedding: int
    total: int

    def write(self, path: Path) -> Path:
        """A directory with nothing but the config.json."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config))
        return path


def _model(base: dict[str, Any], non_embedding: int, total: int, **sizes: int) -> Published:
    keys = {"hidden": "hidden_size", "ffn": "intermediate_size", "layers": "num_hidden_layers"}
    keys |= {"heads": "num_attention_heads", "head_dim": "head_dim"}
    return Published(base | {keys[dim]: size for dim, size in sizes.items()}, non_embedding, total)


MODELS = {
    "Nemotron-4 15B": _model(NEMOTRON_4, 12_483_047_424, 15_628_775_424, hidden=6144, heads=48, ffn=24576),
    "Minitron-8B": _model(NEMOTRON_4, 6_174_547_968, 8_271_699_968, hidden=4096, heads=48, ffn=16384),
    "Minitron-4B": _model(NEMOTRON_4, 2_617_645_056, 4_190_509_056, hidden=3072, heads=24, ffn=9216),
    "Llama-3.1-8B": _model(LLAMA_31, 6_979_588_096, 8_030_261_248, layers=32, hidden=4096, ffn=14336),
    "Llama-3.1-Minitron-4B-Width": _model(
        LLAMA_31, 3_724_741_632, 4_512_746_496, layers=32, hidden=3072, ffn=9216, head_dim=128
    ),
    "Llama-3.1-Minitron-4B-Depth": _model(
        LLAMA_31, 3_489_796_096, 4_540_469_248, layers=16, hidden=4096, ffn=14336, head_dim=128
    ),
    "Mistral-NeMo-12B": _model(MISTRAL_NEMO, 10_905_605_120, 12_247_782_400, hidden=5120, ffn=14336),
    "Mistral-NeMo-Minitron-8B": _model(MISTRAL_NEMO, 7_340_363_776, 8_414_105_600, hidden=4096, ffn=11520),
}
# Recipe -> its teacher and what it makes.
RECIPES = {
    "nemotron-4-15b-to-minitron-8b": ("Nemotron-4 15B", "Minitron-8B"),
    "nemotron-4-15b-to-minitron-4b": ("Nemotron-4 15B", "Minitron-4B"),
    "llama-3.1-8b-to-4b-width": ("Llama-3.1-8B", "Llama-3.1-Minitron-4B-Width"),
    "llama-3.1-8b-to-4b-depth": ("Llama-3.1-8B", "Llama-3.1-Minitron-4B-Depth"),
    "mistral-nemo-12b-to-8b": ("Mistral-NeMo-12B", "Mistral-NeMo-Minitron-8B"),
}
