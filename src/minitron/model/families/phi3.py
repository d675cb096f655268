"""Phi-3, 3.5 and 4 (dense): Llama with q, k and v in one matrix, and gate and up in another."""

from minitron.model.architecture import Architecture, Gguf
from minitron.model.families.llama import KEYS_WITHOUT_HEAD_DIM, LLAMA

PHI3 = Architecture(
    name="phi3",
    config_keys=KEYS_WITHOUT_HEAD_DIM,
    tensors={
        "model.embed_tokens.weight": "vocab hidden",
        "model.norm.weight": "hidden",
        "lm_head.weight": "vocab hidden ?!tie_word_embeddings",
        "model.layers.{layer}.input_layernorm.weight": "hidden",
        "model.layers.{layer}.self_attn.qkv_proj.weight": "heads*head_dim+kv_heads*head_dim+kv_heads*head_dim hidden",
        "model.layers.{layer}.self_attn.o_proj.weight": "hidden heads*head_dim",
        "model.layers.{layer}.post_attention_layernorm.weight": "hidden",
        "model.layers.{layer}.mlp.gate_up_proj.weight": "ffn+ffn hidden",
        "model.layers.{layer}.mlp.down_proj.weight": "hidden ffn",
    },
    norms=LLAMA.norms,
    rope_kinds=("default", "longrope"),
    rope_names={"su": "longrope", "yarn": "longrope"},  # of the first Phi-3 models
    original_context_beside=True,
    gguf=Gguf("phi3", scalings=("default", "longrope"), partial_rotary=True),
)
