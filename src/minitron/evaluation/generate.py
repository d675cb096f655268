"""Text from a model: transformers' own generation, greedy unless a temperature is given.

Of a model's generation_config.json only the tokens that end a text count: with its temperature, penalties and limits,
greedy text would not be the likeliest, and two models would not be asked the same.
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
    """The continuation of a prompt, without the prompt; it ends where the model's context does.

    Args:
        temperature: 0 is greedy; above it, sampling with `seed`.

    Raises: MinitronError for a prompt of no tokens or of more than the context, or a temperature that is none.
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
    # Decoded whole and cut: by itself, a continuation loses the space before its first word in some tokenizers.
    before = tokenizer.decode(ids, skip_special_tokens=True)
    return tokenizer.decode(output[0], skip_special_tokens=True)[len(before) :]


def require_temperature(temperature: float) -> None:
    """Raises: MinitronError for one that no text can be drawn with."""
    if temperature < 0:
        raise MinitronError(f"temperature {temperature} is negative; 0 is greedy, and higher is more random")
    if not math.isfinite(temperature) or 0 < temperature < LEAST_TEMPERATURE:
        raise MinitronError(
            f"temperature {temperature} draws no text: give 0, which is greedy, or a number from {LEAST_TEMPERATURE} on"
        )


def prompt_of(tokenizer: Any, prompt: str, context: int | None, *, rows: int) -> list[int]:
    """The ids of a prompt that a model can go on from.

    Args:
        context: tokens that the model reads at most; None where it does not say.
        rows: of its embedding.

    Raises: MinitronError if it has no token, or leaves no room for one more, or has one that the model has not.
    """
    ids = prompt_ids(tokenizer, prompt)
    if not ids:
        raise MinitronError("the prompt is empty and the tokenizer adds no start token: give at least one character")
    require_within(ids, rows, tokenizer, "the prompt")
    num_new_tokens(len(ids), 1, context)
    return ids


def num_new_tokens(num_ids: int, asked: int | None, context: int | None) -> int:
    """How many tokens follow a prompt: as many as are asked for; None for the usual number, if there is room for it.

    Raises: MinitronError if a prompt and what is to be written after it are more than the model's context.
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


@contextmanager
def only_ending(model: Any, tokenizer: Any) -> Iterator[None]:
    """In the block, a model's generation settings are the tokens that end its text and nothing else."""
    from transformers import GenerationConfig

    before = model.generation_config
    ends = before.eos_token_id if before.eos_token_id not in (None, []) else tokenizer.eos_token_id
    # transformers' own default is to draw of the 50 likeliest tokens only; 0 is all. Pads are asked for and not seen.
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0, top_k=0)
    try:
        yield
    finally:
        model.generation_config = before
