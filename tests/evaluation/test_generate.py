"""Greedy text is a plain argmax loop; sampled text is a function of the seed."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from minitron.core.errors import MinitronError
from minitron.evaluation.generate import generate_text, num_new_tokens, require_temperature
from minitron.model.checkpoint import load_tokenizer
from minitron.model.tokens import prompt_ids

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
    text = generate_text(*model, prompt, new_tokens=24)
    assert text == by_argmax(*model, prompt, 24)
    assert not text.startswith(prompt)


def test_greedy_text_stops_at_the_end_token(tmp_path: Path) -> None:
    tiny.checkpoint("llama", tmp_path)
    model, tokenizer = tiny.model(tmp_path), tiny.tokenizer(tmp_path)
    full = model.generate(**tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False), max_new_tokens=12)
    third = int(full[0, -10])
    model.generation_config.eos_token_id = third
    text = generate_text(model, tokenizer, PROMPT, new_tokens=12)
    assert text == by_argmax(model, tokenizer, PROMPT, 12) != tokenizer.decode(full[0, -12:])


def test_sampled_text_is_a_function_of_the_seed_and_leaves_the_global_state_alone(model: tuple[Any, Any]) -> None:
    def sample(seed: int) -> str:
        return generate_text(*model, PROMPT, new_tokens=24, temperature=1.5, seed=seed)

    torch.manual_seed(99)
    before = torch.get_rng_state()
    first, other = sample(0), sample(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert sample(0) == first != other
    assert first != generate_text(*model, PROMPT, new_tokens=24)


# What a generation_config.json may say besides the tokens that end a text.
SETTINGS: dict[str, Any] = {
    "sampling": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "typical_p": 0.5},
    "penalties": {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.5},
    "tokens": {"suppress_tokens": [*range(200)], "forced_eos_token_id": 307, "begin_suppress_tokens": [*range(200)]},
    "lengths": {
        "min_new_tokens": 20,
        "max_new_tokens": 3,
        "max_length": 9,
        "exponential_decay_length_penalty": [1, 2.0],
    },
    "beams": {"num_beams": 3, "length_penalty": -2.0, "early_stopping": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("named", SETTINGS)
def test_text_is_the_same_whatever_the_generation_config_says(model: tuple[Any, Any], named: str) -> None:
    of, tokenizer = model
    greedy = by_argmax(of, tokenizer, PROMPT, 24)
    drawn = generate_text(of, tokenizer, PROMPT, new_tokens=24, temperature=1.5, seed=3)
    before = of.generation_config
    of.generation_config = type(before)(eos_token_id=before.eos_token_id, **SETTINGS[named])
    try:
        assert generate_text(of, tokenizer, PROMPT, new_tokens=24) == greedy
        assert generate_text(of, tokenizer, PROMPT, new_tokens=24, temperature=1.5, seed=3) == drawn
    finally:
        of.generation_config = before


@torch.no_grad()
def test_sampled_tokens_are_drawn_from_all_of_the_softmax(model: tuple[Any, Any]) -> None:
    of, tokenizer = model
    tokens, temperature = prompt_ids(tokenizer, PROMPT), 3.0
    made: list[int] = []
    with torch.random.fork_rng():
        torch.manual_seed(5)
        while len(made) < 24 and of.generation_config.eos_token_id not in made:
            logits = of(input_ids=torch.tensor([tokens + made]), use_cache=False).logits[0, -1]
            made.append(int(torch.multinomial((logits / temperature).softmax(-1), 1)))
    expected = tokenizer.decode(tokens + made, skip_special_tokens=True)[len(PROMPT) :]
    assert generate_text(of, tokenizer, PROMPT, new_tokens=24, temperature=temperature, seed=5) == expected


def test_every_end_token_of_a_list_ends_the_text(tmp_path: Path) -> None:
    tiny.checkpoint("llama", tmp_path)
    model, tokenizer = tiny.model(tmp_path), tiny.tokenizer(tmp_path)
    model.generation_config.eos_token_id = None
    full = tokenizer(generate_text(model, tokenizer, PROMPT, new_tokens=12)).input_ids
    model.generation_config.eos_token_id = [full[5], full[3]]
    assert len(generate_text(model, tokenizer, PROMPT, new_tokens=12)) < len(tokenizer.decode(full))


def test_a_prompt_is_text_from_its_first_space_to_its_end(tmp_path: Path) -> None:
    path = tiny.sentencepiece(tmp_path / "model")
    tiny.checkpoint("llama", tmp_path / "weights", vocab_size=102)
    model, tokenizer = tiny.model(tmp_path / "weights"), load_tokenizer(path)
    seen: list[list[int]] = []
    forward = model.forward

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.append(named["input_ids"][0].tolist())
        return forward(*arguments, **named)

    model.forward = watched
    for prompt in (" the", "a</s>", "<s>b"):
        seen.clear()
        generate_text(model, tokenizer, prompt, new_tokens=1)
        assert seen[0] == [1, *tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids]
        assert not {1, 2} & set(seen[0][1:])


def test_what_is_no_prompt_or_temperature_is_refused(model: tuple[Any, Any]) -> None:
    of, tokenizer = model
    with pytest.raises(
        MinitronError, match=r"a prompt of \d+ tokens and 1 new ones are more than the model's context of 64"
    ):
        generate_text(of, tokenizer, "the rain " * 64, new_tokens=5)
    with pytest.raises(MinitronError, match=r"a prompt of 60 tokens and 5 new ones .* ask for at most 4 new tokens"):
        num_new_tokens(60, 5, 64)
    for temperature in (float("nan"), float("inf"), 1e-30):
        with pytest.raises(MinitronError, match="draws no text: give 0, which is greedy, or a number from"):
            require_temperature(temperature)
    with pytest.raises(MinitronError, match=r"temperature -1\.0 is negative"):
        require_temperature(-1.0)


def test_text_ends_where_the_models_context_does(model: tuple[Any, Any]) -> None:
    of, tokenizer = model
    prompt = "the rain " * 6
    room = 64 - len(prompt_ids(tokenizer, prompt))
    assert generate_text(of, tokenizer, prompt, new_tokens=999) == generate_text(of, tokenizer, prompt, new_tokens=room)
