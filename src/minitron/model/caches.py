"""Keys and values of earlier tokens, as transformers' models take them: kept as they are, or growing with a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Keys and values of one layer.
Keys = Float[Tensor, "rows kv_heads tokens head_dim"]
KeysValues = tuple[Keys, Keys]
LEAST_ROOM = 64  # tokens


def fixed_cache(layers: Sequence[KeysValues]) -> DynamicCache:
    """Make a cache that calls go on from, and that stays as it is."""
    cache = DynamicCache()
    cache.layers = [_Fixed(*layer) for layer in layers]
    return cache


def appended_cache(layers: Sequence[KeysValues]) -> DynamicCache:
    """Make a cache that the tokens of each call are added to; `layers_of` reads it."""
    return DynamicCache(list(layers) or None)


def layers_of(cache: DynamicCache) -> list[KeysValues]:
    found: list[KeysValues] = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        found.append((layer.keys, layer.values))
    return found


class _Fixed(DynamicLayer):
    def __init__(self, keys: Keys, values: Keys):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> KeysValues:
        assert self.keys is not None and self.values is not None
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


class GrowingLayer(DynamicLayer):
    """Keys and values of a batch, with room for tokens to come; transformers' own layer copies all at each token.

    All rows end at the same place, so that shorter ones begin later. A call gets the whole room, as products over a
    part of it would copy that part. So it needs an `attention_mask` of the tokens so far, which transformers continues
    with "unseen" to the length of the room. Where the room is used up, it grows by a quarter.
    """

    def __init__(self, like: Keys, num_rows: int, filled: int):
        super().__init__()
        self.lazy_initialization(like, like)
        shape = (num_rows, like.shape[1], filled + _room(filled), like.shape[3])
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.filled = filled

    @classmethod
    def of(cls, layer: DynamicLayer) -> "GrowingLayer":
        """Take over the keys and values of transformers' own layer."""
        assert layer.keys is not None and layer.values is not None
        rows, _, filled, _ = layer.keys.shape
        grown = cls(layer.keys, rows, filled)
        assert grown.keys is not None and grown.values is not None
        grown.keys[:, :, :filled], grown.values[:, :, :filled] = layer.keys, layer.values
        return grown

    def put(self, row: int, keys: Keys, values: Keys) -> None:
        """Store what a row begins with."""
        assert self.keys is not None and self.values is not None
        before = slice(self.filled - keys.shape[2], self.filled)
        self.keys[row, :, before], self.values[row, :, before] = keys[0], values[0]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> KeysValues:
        self._make_room(key_states.shape[2])
        assert self.keys is not None and self.values is not None
        new = slice(self.filled, self.filled + key_states.shape[2])
        self.keys[:, :, new], self.values[:, :, new] = key_states, value_states
        self.filled = new.stop
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self._make_room(query_length)
        assert self.keys is not None
        return self.keys.shape[2], 0

    def _make_room(self, tokens: int) -> None:
        assert self.keys is not None and self.values is not None
        missing = self.filled + tokens - self.keys.shape[2]
        if missing > 0:
            more = (0, 0, 0, missing + _room(self.filled))
            self.keys, self.values = functional.pad(self.keys, more), functional.pad(self.values, more)


def _room(filled: int) -> int:
    return max(filled // 4, LEAST_ROOM)


def without_copies(cache: DynamicCache) -> None:
    """Replace the layers that copy all tokens at each one; those of a sliding window hold few, and stay."""
    cache.layers = [GrowingLayer.of(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]


def growing_cache(layers: Sequence[GrowingLayer]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = list(layers)
    return cache
