"""OLMo 2: norms after attention and MLP instead of before, and one over all query heads and one over all key heads."""

from minitron.model.architecture import Architecture, Gguf
from minitron.model.families.llama import KEYS_WITHOUT_HEAD_DIM

OLMO2 = Architecture(
    name="olmo2",
    config_keys=KEYS_WITHOUT_HEAD_DIM,
    tensors={
        "model.embed_tokens.weight": "vocab hidden",
        "model.norm.weight": "hidden",
        "lm_head.weight": "vocab hidden ?!tie_word_embeddings",
        "model.layers.{layer}.self_attn.q_proj.weight": "heads*head_dim hidden",
        "model.layers.{layer}.self_attn.q_proj.bias": "heads*head_dim ?attention_bias",
        "model.layers.{layer}.self_attn.k_proj.weight": "kv_heads*head_dim hidden",
        "model.layers.{layer}.self_attn.k_proj.bias": "kv_heads*head_dim ?attention_bias",
        "model.layers.{layer}.self_attn.v_proj.weight": "kv_heads*head_dim hidden",
        "model.layers.{layer}.self_attn.v_proj.bias": "kv_heads*head_dim ?attention_bias",
        "model.layers.{layer}.self_attn.q_norm.weight": "heads*head_dim",
        "model.layers.{layer}.self_attn.k_norm.weight": "kv_heads*head_dim",
        "model.layers.{layer}.self_attn.o_proj.weight": "hidden heads*head_dim",
        "model.layers.{layer}.self_attn.o_proj.bias": "hidden ?attention_bias",
        "model.layers.{layer}.post_attention_layernorm.weight": "hidden",
        "model.layers.{layer}.mlp.gate_proj.weight": "ffn hidden",
        "model.layers.{layer}.mlp.up_proj.weight": "ffn hidden",
        "model.layers.{layer}.mlp.down_proj.weight": "hidden ffn",
        "model.layers.{layer}.post_feedforward_layernorm.weight": "hidden",
    },
    norms={"model.norm": "lm_head"},
    gguf=Gguf("olmo2", head="own", unknown=("o_proj.bias",)),
)
