"""A cache that grows gives what the whole text gives, whatever the model attends to, and across changes of its room."""

from pathlib import Path

import pytest
import torch
from helpers import tiny

from minitron.model.caches import LEAST_ROOM, without_copies


@pytest.mark.parametrize("directory", ["llama", "mistral-window", "qwen2", "gemma3", "smollm3"], indirect=True)
@torch.no_grad()
def test_tokens_one_by_one_are_those_of_the_whole_text(directory: Path) -> None:
    model, ids = tiny.model(directory), tiny.tokens(4, 3 * LEAST_ROOM)
    whole = model(ids, use_cache=False).logits
    cache = model(ids[:, :1], use_cache=True).past_key_values
    without_copies(cache)
    for position in range(1, ids.shape[1]):
        if position == LEAST_ROOM // 2:  # half of the texts end
            kept = torch.tensor([1, 3])
            ids, whole = ids[kept], whole[kept]
            cache.batch_select_indices(kept)
        seen = torch.ones(len(ids), position + 1, dtype=torch.long)
        tokens = ids[:, position : position + 1]
        found = model(tokens, attention_mask=seen, past_key_values=cache, use_cache=True).logits[:, 0]
        torch.testing.assert_close(found, whole[:, position], atol=1e-4, rtol=1e-4)
