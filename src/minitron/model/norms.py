"""What norms of the residual stream do before their gain."""

import torch
from jaxtyping import Float
from torch import Tensor


def normalized(states: Float[Tensor, "*tokens hidden"], *, centred: bool) -> Float[Tensor, "*tokens hidden"]:
    """States of mean square 1, in float32; of mean 0 too where the norm takes the mean off (LayerNorm)."""
    states = states.float()
    if centred:
        states = states - states.mean(-1, keepdim=True)
    return states * states.square().mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
