"""Attention by products is torch's attention, and models use it for what it computes and nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from minitron.model import attention

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("tokens", [65, 128, 300, 1030])
@pytest.mark.parametrize("documents", [False, True])
def test_it_is_torchs_attention_with_the_same_gradients(tokens: int, documents: bool) -> None:
    query, key, value = drawn(2, 6, tokens, 8, seed=0), drawn(2, 2, tokens, 8, seed=1), drawn(2, 2, tokens, 8, seed=2)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    if documents:  # of which the second block has two
        seen[1, :, tokens // 3 :, : tokens // 3] = False
    ours = attention.by_products(query * 0.3, key, value, seen if documents else None)
    theirs = functional.scaled_dot_product_attention(query, key, value, seen, scale=0.3, enable_gqa=True)
    theirs = theirs.transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    weights = drawn(*ours.shape, seed=3).detach()
    of_ours, of_theirs = (torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (ours, theirs))
    torch.testing.assert_close(of_ours, of_theirs)


def test_a_single_query_sees_all_tokens_or_those_that_it_may() -> None:
    query, key, value = drawn(3, 6, 1, 8, seed=0), drawn(3, 2, 90, 8, seed=1), drawn(3, 2, 90, 8, seed=2)
    theirs = functional.scaled_dot_product_attention(query, key, value, scale=1.0, enable_gqa=True)
    torch.testing.assert_close(attention.by_products(query, key, value), theirs.transpose(1, 2))
    seen = torch.arange(90).expand(3, 1, 1, -1) < torch.tensor([90, 40, 1])[:, None, None, None]
    theirs = functional.scaled_dot_product_attention(query, key, value, seen, scale=1.0, enable_gqa=True)
    torch.testing.assert_close(attention.by_products(query, key, value, seen), theirs.transpose(1, 2))


def models(dtype: torch.dtype) -> list[Any]:
    """The same weights with this attention, and with transformers' two."""
    made = []
    for name in ("sdpa", "sdpa", "eager"):
        torch.manual_seed(0)
        config = LlamaConfig(**SIZES, **HEADS, attn_implementation=name)
        made.append(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
    attention.use_in(made[0])
    return made


@torch.no_grad()
@pytest.mark.parametrize("documents", [False, True])
def test_a_model_in_bfloat16_is_as_near_to_float32_as_with_transformers_own(documents: bool) -> None:
    inputs = {"input_ids": torch.arange(400).view(2, 200) % 64}
    if documents:
        inputs["position_ids"] = torch.cat([torch.arange(150), torch.arange(50)]).expand(2, -1)
    exact = models(torch.float32)[2](**inputs, use_cache=False).logits
    ours, fused, plain = (
        (model(**inputs, use_cache=False).logits.float() - exact).abs().mean() for model in models(torch.bfloat16)
    )
    assert ours <= 1.2 * max(fused, plain)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "tokens"), [(torch.float32, 200), (torch.bfloat16, attention.LEAST_PART), (torch.bfloat16, 2049)]
)
def test_everything_else_is_torchs_fused_attention(dtype: torch.dtype, tokens: int) -> None:
    ours, fused, _ = models(dtype)
    ids = torch.arange(tokens)[None] % 64
    assert torch.equal(ours(ids, use_cache=False).logits, fused(ids, use_cache=False).logits)


@torch.no_grad()
def test_tokens_behind_a_cache_are_those_of_whole_blocks() -> None:
    for model in models(torch.bfloat16)[:2]:
        ids = torch.arange(120).view(2, 60) % 64
        cache = model(ids[:, :59], use_cache=True).past_key_values
        last = model(ids[:, 59:], past_key_values=cache).logits[:, -1].float()
        torch.testing.assert_close(last, model(ids, use_cache=False).logits[:, -1].float(), atol=0.02, rtol=0.02)


def test_a_model_that_does_not_ask_for_the_fused_attention_keeps_its_own() -> None:
    model = models(torch.bfloat16)[2]
    attention.use_in(model)
    assert model.config._attn_implementation == "eager"
