"""Nemotron-4 and Minitron: LayerNorm with bias whose stored weight w means a gain of 1 + w, squared ReLU, no gate."""

from minitron.model.architecture import Architecture, Gguf
from minitron.model.families.llama import LLAMA

NEMOTRON = Architecture(
    name="nemotron",
    config_keys=LLAMA.config_keys,
    tensors={
        "model.embed_tokens.weight": "vocab hidden",
        "model.norm.weight": "hidden",
        "model.norm.bias": "hidden",
        "lm_head.weight": "vocab hidden ?!tie_word_embeddings",
        "model.layers.{layer}.input_layernorm.weight": "hidden",
        "model.layers.{layer}.input_layernorm.bias": "hidden",
        "model.layers.{layer}.self_attn.q_proj.weight": "heads*head_dim hidden",
        "model.layers.{layer}.self_attn.q_proj.bias": "heads*head_dim ?attention_bias",
        "model.layers.{layer}.self_attn.k_proj.weight": "kv_heads*head_dim hidden",
        "model.layers.{layer}.self_attn.k_proj.bias": "kv_heads*head_dim ?attention_bias",
        "model.layers.{layer}.self_attn.v_proj.weight": "kv_heads*head_dim hidden",
        "model.layers.{layer}.self_attn.v_proj.bias": "kv_heads*head_dim ?attention_bias",
        "model.layers.{layer}.self_attn.o_proj.weight": "hidden heads*head_dim",
        "model.layers.{layer}.self_attn.o_proj.bias": "hidden ?attention_bias",
        "model.layers.{layer}.post_attention_layernorm.weight": "hidden",
        "model.layers.{layer}.post_attention_layernorm.bias": "hidden",
        "model.layers.{layer}.mlp.up_proj.weight": "ffn hidden",
        "model.layers.{layer}.mlp.up_proj.bias": "ffn ?mlp_bias",
        "model.layers.{layer}.mlp.down_proj.weight": "hidden ffn",
        "model.layers.{layer}.mlp.down_proj.bias": "hidden ?mlp_bias",
    },
    norms=LLAMA.norms,
    norm_gain_offset=1.0,
    centred_norms=True,
    gguf=Gguf(
        "nemotron",
        keys={"attention.layer_norm_epsilon": "norm_eps"},
        computes={"hidden_act": ("relu2",)},
        partial_rotary=True,
        heads_fill_hidden=True,
        head="own",
    ),
)
