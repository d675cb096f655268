"""Residual heads: query heads that stay take over from the query heads that their group loses (P1)."""

import torch
from jaxtyping import Float
from torch import Tensor

from minitron.pruning.importance import Scores
from minitron.pruning.plan import Plan


def add_residual_heads(
    tensor: Float[Tensor, "rows ..."], plan: Plan, layer: int, scores: Scores
) -> Float[Tensor, "rows ..."]:
    """Add to each of the lowest kept query heads of a group its difference from a dropped head.

    By rank in the group, the last kept head takes the first dropped one, the kept head before it the second, and so on.
    Only query heads change: the rows of key and value heads in a fused matrix stay.

    Paper: P1, "Obtaining a Pruned Model".

    Args:
        tensor: the teacher's query projection, its weight or its bias.
        layer: the number of the student's layer.
    """
    teacher, kept = plan.teacher, set(plan.heads[layer])
    rank = scores.heads[plan.layers[layer]].argsort(descending=True, stable=True).tolist()
    heads = tensor[: teacher.heads * teacher.head_dim].unflatten(0, (teacher.heads, teacher.head_dim))
    changed = heads.clone()
    for kv in plan.kv_heads[layer]:
        group = [head for head in rank if head // teacher.group == kv]
        stay, go = ([head for head in group if (head in kept) == stays] for stays in (True, False))
        for one, other in zip(reversed(stay), go, strict=False):
            changed[one] += heads[one] - heads[other]
    return torch.cat([changed.flatten(0, 1), tensor[teacher.heads * teacher.head_dim :]])
