"""Granite 3 (dense): Llama with constant multipliers on embeddings, attention, residual branches and logits."""

from dataclasses import replace

from minitron.model.families.llama import KEYS_WITHOUT_HEAD_DIM, LLAMA

GRANITE = replace(
    LLAMA,
    name="granite",
    config_keys=KEYS_WITHOUT_HEAD_DIM,
    hidden_multiple_of_heads=False,
    residual_multiplier="residual_multiplier",
    logits_divisor="logits_scaling",
)
