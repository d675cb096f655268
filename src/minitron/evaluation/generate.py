"""Text from a model by transformers' generation, greedy unless a temperature is given.

Of generation_config.json only the tokens that end a text count: with its temperature, penalties and limits, greedy text
would not be the likeliest, and two models would not be compared alike.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minitron.core.errors import MinitronError
from minitron.model.tokens import prompt_ids, require_within

USUAL_NEW_TOKENS = 200
LEAST_TEMPERATURE = 1e-3  # below it, logits divided by it overflow


@torch.no_grad()
def generate_text(
    model: Any, tokenizer: Any, prompt: str, *, new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> str:
    """Continue a prompt, up to the end of the model's context; returns the continuation alone.

    Args:
        temperature: 0 is greedy; above it, tokens are drawn with `seed`.

    Raises: MinitronError for a prompt without tokens or longer than the context, or an impossible temperature.
    """
    require_temperature(temperature)
    context = model.config.max_position_embeddings
    ids = prompt_of(tokenizer, prompt, context, rows=model.get_input_embeddings().weight.shape[0])
    new_tokens = min(new_tokens, context - len(ids))
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    sampling = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    with torch.random.fork_rng(), only_ending(model, tokenizer):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, **sampling
        )
    # Some tokenizers drop the space before the first word of a text, so the whole is decoded and cut.
    before = tokenizer.decode(ids, skip_special_tokens=True)
    return tokenizer.decode(output[0], skip_special_tokens=True)[len(before) :]


def require_temperature(temperature: float) -> None:
    """Raises: MinitronError for a temperature at which no text can be drawn."""
    if temperature < 0:
        raise MinitronError(f"temperature {temperature} is negative; 0 is greedy, and higher is more random")
    if not math.isfinite(temperature) or 0 < temperature < LEAST_TEMPERATURE:
        raise MinitronError(
            f"temperature {temperature} draws no text: give 0, which is greedy, or a number from {LEAST_TEMPERATURE} on"
        )


def prompt_of(tokenizer: Any, prompt: str, context: int | None, *, rows: int) -> list[int]:
    """Tokenize a prompt that a model can continue.

    Args:
        context: of the model, in tokens; None where the model does not state it.
        rows: of the model's embedding.

    Raises: MinitronError if the prompt has no token, leaves no room for one more, or has a token beyond the rows.
    """
    ids = prompt_ids(tokenizer, prompt)
    if not ids:
        raise MinitronError("the prompt is empty and the tokenizer adds no start token: give at least one character")
    require_within(ids, rows, tokenizer, "the prompt")
    num_new_tokens(len(ids), 1, context)
    return ids


def num_new_tokens(num_ids: int, asked: int | None, context: int | None) -> int:
    """The number of tokens to generate: the number asked for, or by default the usual number, as far as there is room.

    Raises: MinitronError if the prompt and the tokens asked for are more than the model's context.
    """
    new_tokens = USUAL_NEW_TOKENS if asked is None else asked
    if asked is None and context is not None:
        new_tokens = max(1, min(new_tokens, context - num_ids))
    if context is not None and num_ids + new_tokens > context:
        most = context - num_ids
        way_out = f"ask for at most {most} new tokens" if most > 0 else "shorten the prompt"
        raise MinitronError(
            f"a prompt of {num_ids} tokens and {new_tokens} new ones are more than the model's context of {context}: "
            f"{way_out}"
        )
    return new_tokens


def ending_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: those of the model's generation settings, else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    if ends in (None, []):
        ends = tokenizer.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


@contextmanager
def only_ending(model: Any, tokenizer: Any) -> Iterator[None]:
    """In the block, the model's generation settings are the tokens that end a text and nothing else."""
    from transformers import GenerationConfig

    before = model.generation_config
    ends = ending_tokens(model, tokenizer) or None
    # By default transformers draws from the 50 likeliest tokens; 0 is all. It demands a pad token, which is not used.
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0, top_k=0)
    try:
        yield
    finally:
        model.generation_config = before
