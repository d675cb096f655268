"""SmolLM3: Llama with layers that have no rotary positions."""

from dataclasses import replace

from minitron.model.architecture import Gguf
from minitron.model.families.llama import KEYS_WITHOUT_HEAD_DIM, LLAMA

SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    config_keys=KEYS_WITHOUT_HEAD_DIM,
    defaults={"num_key_value_heads": 4, "tie_word_embeddings": True},
    per_layer_keys=("layer_types", "no_rope_layers"),
    hidden_multiple_of_heads=False,
    gguf=Gguf(
        "smollm3",
        interleaved=True,
        no_rope_step=4,
        unknown=("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias"),
    ),
)
