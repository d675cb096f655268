"""Greedy text is a plain argmax loop; sampled text is a function of the seed."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from minitron.evaluate.generate import generate

PROMPT = "the rain in"


@pytest.fixture(scope="module", params=[("llama", False), ("mistral-window", True)], ids=["llama", "mistral-bos"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    variant, adds_bos = request.param
    path = tmp_path_factory.mktemp(variant)
    tiny.checkpoint(variant, path)
    return tiny.model(path), tiny.tokenizer(path, adds_bos=adds_bos)


@torch.no_grad()
def by_argmax(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """The whole sequence again for every token, without a cache."""
    tokens = tokenizer(prompt).input_ids
    made: list[int] = []
    for _ in range(new_tokens):
        logits = model(input_ids=torch.tensor([tokens + made]), use_cache=False).logits
        made.append(int(logits[0, -1].argmax()))
        if made[-1] == model.generation_config.eos_token_id:
            break
    return tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.parametrize("prompt", [PROMPT, "café 🙂", "x"])
def test_greedy_text_is_that_of_an_argmax_loop_without_a_cache(model: tuple[Any, Any], prompt: str) -> None:
    text = generate(*model, prompt, new_tokens=24)
    assert text == by_argmax(*model, prompt, 24)
    assert not text.startswith(prompt)


def test_greedy_text_stops_at_the_end_token(tmp_path: Path) -> None:
    tiny.checkpoint("llama", tmp_path)
    model, tokenizer = tiny.model(tmp_path), tiny.tokenizer(tmp_path)
    full = model.generate(**tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False), max_new_tokens=12)
    third = int(full[0, -10])
    model.generation_config.eos_token_id = third
    text = generate(model, tokenizer, PROMPT, new_tokens=12)
    assert text == by_argmax(model, tokenizer, PROMPT, 12) != tokenizer.decode(full[0, -12:])


def test_sampled_text_is_a_function_of_the_seed_and_leaves_the_global_state_alone(model: tuple[Any, Any]) -> None:
    def sample(seed: int) -> str:
        return generate(*model, PROMPT, new_tokens=24, temperature=1.5, seed=seed)

    torch.manual_seed(99)
    before = torch.get_rng_state()
    first, other = sample(0), sample(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert sample(0) == first != other
    assert first != generate(*model, PROMPT, new_tokens=24)
