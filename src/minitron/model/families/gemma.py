"""Gemma 1 to 3 (text): norm gains stored as w for 1 + w, embeddings times sqrt(hidden); from 2 on norms before and
after attention and MLP, capped logits, and layers with a sliding window between layers without."""

from dataclasses import replace

from minitron.model.architecture import Architecture, Gguf
from minitron.model.families.llama import LLAMA

TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")

GEMMA = Architecture(
    name="gemma",
    config_keys=LLAMA.config_keys,
    tensors={name: line for name, line in LLAMA.tensors.items() if not line.endswith("mlp_bias")},
    norms=LLAMA.norms,
    defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    norm_gain_offset=1.0,
    embedding_times_sqrt_hidden=True,
    gguf=Gguf("gemma", computes={"hidden_act": TANH_GELU}, head="embedding", unknown=("o_proj.bias",)),
)

GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    tensors={
        **GEMMA.tensors,
        "model.layers.{layer}.pre_feedforward_layernorm.weight": "hidden",
        "model.layers.{layer}.post_feedforward_layernorm.weight": "hidden",
    },
    norms={
        "model.layers.{layer}.input_layernorm": "model.layers.{layer}.self_attn",
        "model.layers.{layer}.pre_feedforward_layernorm": "model.layers.{layer}.mlp",
        "model.norm": "lm_head",
    },
    defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "final_logit_softcapping": 30.0},
    hidden_multiple_of_heads=True,
    logits_softcap="final_logit_softcapping",
    gguf=Gguf(
        "gemma2",
        keys={
            "attention.layer_norm_rms_epsilon": "rms_norm_eps",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        computes={"hidden_activation": TANH_GELU},
        unsaid={"attn_logit_softcapping": "50", "final_logit_softcapping": "30"},
        head="embedding",
        windows=True,
        window_step=2,
        query_scale="query_pre_attn_scalar",
        unknown=("o_proj.bias",),
    ),
)

GEMMA3 = replace(
    GEMMA2,
    name="gemma3_text",
    tensors={
        **GEMMA2.tensors,
        "model.layers.{layer}.self_attn.q_norm.weight": "head_dim",
        "model.layers.{layer}.self_attn.k_norm.weight": "head_dim",
    },
    defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    rope_per_layer_kind=True,
    gguf=Gguf(
        "gemma3",
        keys={"attention.layer_norm_rms_epsilon": "rms_norm_eps", "final_logit_softcapping": "final_logit_softcapping"},
        computes={"hidden_activation": TANH_GELU},
        windows=True,
        window_step=6,
        query_scale="query_pre_attn_scalar",
        unknown=("o_proj.bias",),
    ),
)
