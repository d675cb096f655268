"""Forward calls of a loaded model over rows that share prefixes, as `packing.py` groups them.

Attention follows the prefix tree: a token sees the tokens on its own path, by their positions in its row, so that a
sliding window reaches as far back as in the row alone. Keys and values of a long prefix are computed once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitron.evaluation.tasks.blocks import Block, in_blocks, tree_blocks
from minitron.evaluation.tasks.packing import Pack, Row, Tree, prefix_tree
from minitron.model.caches import KeysValues, appended_cache, fixed_cache, layers_of

Masks = Float[Tensor, "1 1 nodes keys"] | dict[str, Tensor]


@dataclass(frozen=True)
class Asked:
    """A token whose likelihood is asked for: the row, the position in it before the token, and the token's id."""

    row: int
    position: int
    token: int


class SharedForward:
    """Runs a model over packs of sorted rows, and keeps the keys and values of the prefix that comes next."""

    def __init__(self, model: Any, rows: Sequence[Row]):
        self.model, self.rows = model, rows
        self._kept: list[tuple[Row, list[KeysValues]]] = []

    @torch.no_grad()
    def log_likelihoods(
        self, pack: Pack, asked: Sequence[Asked]
    ) -> tuple[Float[Tensor, " asked"], Int[Tensor, " asked"]]:
        """The log-likelihood of each asked token in nats, in float32, and the token that is the likeliest there."""
        tree = prefix_tree(self.rows[pack.start : pack.stop], pack.prefix)
        nodes = torch.tensor([tree.paths[one.row - pack.start][one.position - pack.prefix] for one in asked])
        wanted, of_asked = nodes.unique(return_inverse=True)
        layers = self._prefix(pack)
        logits = self._call(tree, pack.prefix, fixed_cache(layers) if layers else None, wanted).logits[0].float()
        of_asked, tokens = of_asked.to(logits.device), torch.tensor([one.token for one in asked], device=logits.device)
        totals, likeliest = logits.logsumexp(-1), logits.argmax(-1)
        return logits[of_asked, tokens] - totals[of_asked], likeliest[of_asked]

    @torch.no_grad()
    def keys_and_values(self, pack: Pack) -> Iterator[tuple[int, list[KeysValues], Float[Tensor, " vocab"]]]:
        """Yield each row of a pack with the keys and values of its tokens in all layers, and its last logits."""
        tree = prefix_tree(self.rows[pack.start : pack.stop], pack.prefix)
        cache = appended_cache(self._prefix(pack))
        last = torch.tensor([path[-1] for path in tree.paths])
        logits = self._call(tree, pack.prefix, cache, last).logits[0]
        layers, before = layers_of(cache), torch.arange(pack.prefix)
        for number, path in enumerate(tree.paths):
            own = torch.cat([before, pack.prefix + torch.tensor(path)]).to(logits.device)
            of_row = [(keys[:, :, own], values[:, :, own]) for keys, values in layers]
            yield pack.start + number, of_row, logits[number]

    def _prefix(self, pack: Pack) -> list[KeysValues]:
        """The keys and values of the pack's prefix, computed where they are not kept from the pack before."""
        tokens = self.rows[pack.start][: pack.prefix]
        while self._kept and tokens[: len(self._kept[-1][0])] != self._kept[-1][0]:
            self._kept.pop()
        known, layers = self._kept[-1] if self._kept else ((), [])
        if len(known) < len(tokens):
            cache = appended_cache(layers)
            tree = prefix_tree([tokens], len(known))
            self._call(tree, len(known), cache, torch.tensor([len(tree.tokens) - 1]))
            layers = layers_of(cache)
            self._kept.append((tokens, layers))
        return layers

    def _call(self, tree: Tree, prefix: int, cache: Any, wanted: Int[Tensor, " wanted"]) -> Any:
        model, device = self.model, self.model.device
        with in_blocks(model, self._blocks(tree, prefix)):
            return model(
                input_ids=tree.tokens[None].to(device),
                position_ids=tree.positions[None].to(device),
                attention_mask=attention_masks(model.config, tree, prefix, model.dtype, device),
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=wanted.to(device),
            )

    def _blocks(self, tree: Tree, prefix: int) -> list[Block]:
        """The blocks of a tree on a CPU; on other devices, and of a single path, none."""
        if tree.is_one_path or self.model.device.type != "cpu":
            return []
        window = getattr(self.model.config, "sliding_window", None)
        windowed = window is not None and window <= int(tree.positions.max())
        return tree_blocks(tree, prefix, windowed=windowed)


def attention_masks(config: Any, tree: Tree, prefix: int, dtype: torch.dtype, device: torch.device) -> Masks | None:
    """What each node of a tree sees, as transformers' models take it: one mask, or one of each kind of layer.

    A mask is added to the products of queries and keys. None where every node sees all before it, which the model's
    own causal mask says faster.
    """
    if tree.is_one_path:
        return None
    count = len(tree.tokens)
    positions = tree.positions.to(device)
    keys = torch.cat([torch.arange(prefix, device=device), positions])
    ends = torch.cat([torch.full((prefix,), count, device=device), tree.ends.to(device)])
    node = torch.arange(count, device=device)[:, None]
    seen = (torch.arange(-prefix, count, device=device) <= node) & (node < ends)

    def mask(window: int | None) -> Tensor:
        within = seen if window is None else seen & (keys > positions[:, None] - window)
        hidden = torch.finfo(dtype).min
        return torch.zeros(within.shape, dtype=dtype, device=device).masked_fill_(~within, hidden)[None, None]

    masks: dict[str, Callable[[], Tensor]] = {
        "full_attention": lambda: mask(None),
        "sliding_attention": lambda: mask(config.sliding_window),
    }
    if hasattr(config, "layer_types"):  # as transformers' own `create_masks_for_generate` tells them apart
        return {kind: masks[kind]() for kind in set(config.layer_types)}
    return mask(getattr(config, "sliding_window", None))
