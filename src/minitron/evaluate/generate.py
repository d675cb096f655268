"""Text from a model: transformers' own generation, greedy unless a temperature is given."""

from typing import Any

import torch

from minitron.errors import MinitronError


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompt: str, *, new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> str:
    """The continuation of a prompt, without the prompt.

    Args:
        temperature: 0 is greedy; above it, sampling with `seed`.

    Raises: MinitronError for a prompt of no tokens, or a negative temperature.
    """
    if temperature < 0:
        raise MinitronError(f"temperature {temperature} is negative; 0 is greedy, and higher is more random")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(next(model.parameters()).device)
    if inputs["input_ids"].shape[1] == 0:
        raise MinitronError("the prompt is empty and the tokenizer adds no start token: give at least one character")
    sampling = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(**inputs, max_new_tokens=new_tokens, pad_token_id=pad, **sampling)
    # Decoded whole and cut: by itself, a continuation loses the space before its first word in some tokenizers.
    before = tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    return tokenizer.decode(output[0], skip_special_tokens=True)[len(before) :]
