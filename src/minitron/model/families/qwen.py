"""Qwen 2, 2.5 and 3 (dense): Llama with biases on q, k and v, or with a norm over each query and key head."""

from minitron.model.architecture import Architecture, Gguf
from minitron.model.families.llama import KEYS_WITHOUT_HEAD_DIM, LLAMA

QWEN2 = Architecture(
    name="qwen2",
    config_keys=KEYS_WITHOUT_HEAD_DIM,
    tensors={
        "model.embed_tokens.weight": "vocab hidden",
        "model.norm.weight": "hidden",
        "lm_head.weight": "vocab hidden ?!tie_word_embeddings",
        "model.layers.{layer}.input_layernorm.weight": "hidden",
        "model.layers.{layer}.self_attn.q_proj.weight": "heads*head_dim hidden",
        "model.layers.{layer}.self_attn.q_proj.bias": "heads*head_dim",
        "model.layers.{layer}.self_attn.k_proj.weight": "kv_heads*head_dim hidden",
        "model.layers.{layer}.self_attn.k_proj.bias": "kv_heads*head_dim",
        "model.layers.{layer}.self_attn.v_proj.weight": "kv_heads*head_dim hidden",
        "model.layers.{layer}.self_attn.v_proj.bias": "kv_heads*head_dim",
        "model.layers.{layer}.self_attn.o_proj.weight": "hidden heads*head_dim",
        "model.layers.{layer}.post_attention_layernorm.weight": "hidden",
        "model.layers.{layer}.mlp.gate_proj.weight": "ffn hidden",
        "model.layers.{layer}.mlp.up_proj.weight": "ffn hidden",
        "model.layers.{layer}.mlp.down_proj.weight": "hidden ffn",
    },
    norms=LLAMA.norms,
    defaults={"num_key_value_heads": 32},
    gguf=Gguf("qwen2"),
)

QWEN3 = Architecture(
    name="qwen3",
    config_keys=LLAMA.config_keys,
    tensors={
        **{name: line for name, line in LLAMA.tensors.items() if not line.endswith("mlp_bias")},
        "model.layers.{layer}.self_attn.q_norm.weight": "head_dim",
        "model.layers.{layer}.self_attn.k_norm.weight": "head_dim",
    },
    norms=LLAMA.norms,
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    gguf=Gguf("qwen3", unknown=("o_proj.bias",)),
)
