"""Granite 3 (dense): Llama with constant multipliers on embeddings, attention, residual branches and logits."""

from dataclasses import replace

from minitron.model.architecture import Gguf
from minitron.model.families.llama import KEYS_WITHOUT_HEAD_DIM, LLAMA

GRANITE = replace(
    LLAMA,
    name="granite",
    config_keys=KEYS_WITHOUT_HEAD_DIM,
    hidden_multiple_of_heads=False,
    residual_multiplier="residual_multiplier",
    logits_divisor="logits_scaling",
    gguf=Gguf(
        "granite",
        interleaved=True,
        keys={
            "attention.layer_norm_rms_epsilon": "rms_norm_eps",
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        unsaid={
            "attention_multiplier": "1 / sqrt(head_dim)",
            "embedding_multiplier": "1",
            "residual_multiplier": "1",
            "logits_scaling": "1",
        },
        scalings=("default", "linear", "llama3", "yarn"),
    ),
)
