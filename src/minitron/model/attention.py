"""Causal attention on a CPU in bfloat16, as products of matrices.

torch's fused kernel for CPUs keeps no matrix of scores, and pays for that with small products that are far from the
speed of large ones. Here a block of tokens attends in a few parts, each to the tokens up to its own end: most of what a
causal mask hides is not computed, and the rest is a few large products.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NAME = "minitron"
# The tokens of a part: a quarter of the block, within these bounds.
LEAST_PART, MOST_PART = 64, 256
# Longer blocks go to the fused kernel, for each head has about tokens^2 / 2 weights, which training keeps.
LONGEST_BLOCK = 2048
# Arguments of transformers' attention functions that change what is computed.
UNKNOWN_HERE = ("is_causal", "position_bias", "cache", "softcap", "s_aux")


def use_in(model: Any) -> None:
    """Let a transformers model attend by `attend` where it would call torch's fused attention."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the output of attention [blocks, tokens, heads, channels], as transformers' attention functions do.

    Whole blocks, and single tokens behind a cache, are computed here in bfloat16 on a CPU, everything else by torch's
    fused attention.

    Args:
        query: [blocks, heads, tokens, channels].
        key, value: [blocks, kv_heads, tokens, channels], with more tokens where a cache holds some.
        attention_mask: True where a token is seen; None for all tokens up to each token itself.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    tokens, known = query.shape[2], key.shape[2]
    here = (
        query.is_cpu
        and dtype == torch.bfloat16
        and dropout == 0
        and getattr(module, "is_causal", True)
        and (LEAST_PART < tokens == known <= LONGEST_BLOCK or tokens == 1)
        and (attention_mask is None or attention_mask.dtype == torch.bool)
        and not any(others.get(name) is not None for name in UNKNOWN_HERE)
    )
    if not here:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return by_products(scaled.to(dtype), key.to(dtype), value.to(dtype), attention_mask), None


def by_products(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    """Return the causal attention of queries that are already scaled: [blocks, tokens, heads, channels].

    Args:
        query: [blocks, heads, tokens, channels].
        key, value: [blocks, kv_heads, tokens, channels]; for a single query also of other tokens.
        seen: [blocks, 1, tokens, tokens], which tokens each token sees, never a later one; None for all up to itself.
            For a single query [blocks, 1, 1, all tokens]; None for all of them.
    """
    heads, tokens, kv_heads, before = query.shape[1], query.shape[2], key.shape[1], key.shape[2] - query.shape[2]
    size = min(max(tokens // 4, LEAST_PART), MOST_PART)
    future = None if seen is not None or tokens == 1 else query.new_full((size, size), -torch.inf).triu(1)
    # The query heads of a group are rows of one product with the keys that they share.
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    outputs = []
    for start in range(0, tokens, size):
        rows = grouped[:, :, :, start : start + size]
        stop = before + start + rows.shape[3]
        scores = (rows.flatten(2, 3) @ key[:, :, :stop].transpose(2, 3)).unflatten(2, rows.shape[2:4])
        if future is not None:  # within the part; what comes after it has no scores
            scores[..., start:] += future[: stop - start, : stop - start]
        elif seen is not None:
            scores = scores.masked_fill(~seen[:, :, None, start:stop, :stop], -torch.inf)
        weights = functional.softmax(scores, dim=-1).flatten(2, 3)
        outputs.append((weights @ value[:, :, :stop]).unflatten(2, rows.shape[2:4]))
    return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2).contiguous()
