"""Llama 1 to 3.2 and Mistral (incl. NeMo): RMSNorm, gated MLP, grouped-query attention, rotary positions."""

from dataclasses import replace

from minitron.model.architecture import Architecture, Gguf

LLAMA = Architecture(
    name="llama",
    config_keys={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "vocab": "vocab_size",
    },
    tensors={
        "model.embed_tokens.weight": "vocab hidden",
        "model.norm.weight": "hidden",
        "lm_head.weight": "vocab hidden ?!tie_word_embeddings",
        "model.layers.{layer}.input_layernorm.weight": "hidden",
        "model.layers.{layer}.self_attn.q_proj.weight": "heads*head_dim hidden",
        "model.layers.{layer}.self_attn.q_proj.bias": "heads*head_dim ?attention_bias",
        "model.layers.{layer}.self_attn.k_proj.weight": "kv_heads*head_dim hidden",
        "model.layers.{layer}.self_attn.k_proj.bias": "kv_heads*head_dim ?attention_bias",
        "model.layers.{layer}.self_attn.v_proj.weight": "kv_heads*head_dim hidden",
        "model.layers.{layer}.self_attn.v_proj.bias": "kv_heads*head_dim ?attention_bias",
        "model.layers.{layer}.self_attn.o_proj.weight": "hidden heads*head_dim",
        "model.layers.{layer}.self_attn.o_proj.bias": "hidden ?attention_bias",
        "model.layers.{layer}.post_attention_layernorm.weight": "hidden",
        "model.layers.{layer}.mlp.gate_proj.weight": "ffn hidden",
        "model.layers.{layer}.mlp.gate_proj.bias": "ffn ?mlp_bias",
        "model.layers.{layer}.mlp.up_proj.weight": "ffn hidden",
        "model.layers.{layer}.mlp.up_proj.bias": "ffn ?mlp_bias",
        "model.layers.{layer}.mlp.down_proj.weight": "hidden ffn",
        "model.layers.{layer}.mlp.down_proj.bias": "hidden ?mlp_bias",
    },
    norms={
        "model.layers.{layer}.input_layernorm": "model.layers.{layer}.self_attn",
        "model.layers.{layer}.post_attention_layernorm": "model.layers.{layer}.mlp",
        "model.norm": "lm_head",
    },
    hidden_multiple_of_heads=True,
    gguf=Gguf("llama", interleaved=True, scalings=("default", "linear", "llama3", "yarn")),
)

MISTRAL = replace(
    LLAMA,
    name="mistral",
    tensors={name: line for name, line in LLAMA.tensors.items() if not name.endswith("bias")},
    defaults={"num_key_value_heads": 8},
    hidden_multiple_of_heads=False,
)

# The config of some Llama-like families has no head_dim.
KEYS_WITHOUT_HEAD_DIM = {dim: key for dim, key in LLAMA.config_keys.items() if dim != "head_dim"}
