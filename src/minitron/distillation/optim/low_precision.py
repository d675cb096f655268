"""AdamW on bfloat16 weights, in such a way that small updates are not lost.

A step moves a weight by about a thousandth of its size or less, and the next bfloat16 is 1/256 to 1/128 of its size
away: rounded to the nearest, most weights would never move (Zamirai et al., arXiv:2010.06192, "Revisiting BFloat16
Training"). Two ways out of that paper are here, both with steps computed in float32:

- Kahan summation: what the rounding leaves over is kept beside the weight, in bfloat16, and counts in the next step.
- Stochastic rounding: to one of the two neighbours, to the nearer one more often, so that the mean is right.

The moments are rounded stochastically in both: with slow decay (beta 0.999) a second moment that is rounded to the
nearest would not fall again.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor

from minitron.core import parallel

CHUNK = 1 << 22  # weights moved at a time, for each of which there are some 30 bytes of float32 values meanwhile
EPSILON = 1e-8  # torch's default
Group = dict[str, Any]  # torch's own: parameters that are moved alike, and their settings


def stochastically_rounded(values: Float32[Tensor, "*shape"], noise: torch.Generator) -> BFloat16[Tensor, "*shape"]:
    """Round each value to one of its two bfloat16 neighbours, so that the mean over the noise is the value.

    bfloat16 is the upper half of a float32. A random number of 16 bits, added to the lower half, carries into the upper
    one with a probability that is the lower half's share of the way to the next.
    """
    bits = values.view(torch.int32)
    carried = torch.empty_like(bits).random_(0, 1 << 16, generator=noise).add_(bits)
    return carried.bitwise_and_(-1 << 16).view(torch.float32).bfloat16()


class BFloat16AdamW(torch.optim.Optimizer):
    """AdamW (as torch.optim.AdamW) whose weights are rounded to the nearest bfloat16 after a step in float32.

    On its own it loses small updates; its children only differ in how weights are read and written. Parameters in
    float32 are moved as torch moves them.

    The noise of a step is a function of the seed, the parameter and the number of its step, so a training that is
    resumed draws the noise of an undisturbed one.
    """

    buffers: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(self, groups: Iterable[Group], *, betas: tuple[float, float], seed: int):
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "weight_decay": 0.0})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient; torch's signature, without the closure."""
        assert closure is None
        parameters = ((parameter, group) for group in self.param_groups for parameter in group["params"])
        for index, (parameter, group) in enumerate(parameters):
            if parameter.grad is not None:
                self._move(parameter, group, index)

    def _move(self, parameter: Tensor, group: Group, index: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {name: torch.zeros_like(parameter) for name in self.buffers}
        state["step"] = state["step"] + 1  # not in place: so its value is known where tensors are fake
        noise = self._noise(parameter.device, index, int(state["step"]))
        tensors = {"weight": parameter, "gradient": parameter.grad} | {name: state[name] for name in self.buffers}
        for rows in _chunks({name: parallel.local_shard(tensor) for name, tensor in tensors.items()}):
            self._move_rows(rows, group, int(state["step"]), noise)

    def _move_rows(self, rows: dict[str, Tensor], group: Group, step: int, noise: torch.Generator) -> None:
        (slow, slower), rate = group["betas"], group["lr"]
        gradient = rows["gradient"].float()
        mean = rows["exp_avg"].float().lerp(gradient, 1 - slow)
        square = (rows["exp_avg_sq"].float() * slower).addcmul_(gradient, gradient, value=1 - slower)
        scale = (square.sqrt() / math.sqrt(1 - slower**step)).add_(EPSILON)
        weight = self._read(rows) * (1 - rate * group["weight_decay"])
        weight.addcdiv_(mean, scale, value=-rate / (1 - slow**step))
        rows["exp_avg"].copy_(_rounded_like(rows["exp_avg"], mean, noise))
        rows["exp_avg_sq"].copy_(_rounded_like(rows["exp_avg_sq"], square, noise))
        self._write(rows, weight, noise)

    def _read(self, rows: dict[str, Tensor]) -> Tensor:
        """Return the weights as exactly as they are known, in float32."""
        return rows["weight"].float()

    def _write(self, rows: dict[str, Tensor], weight: Tensor, noise: torch.Generator) -> None:
        rows["weight"].copy_(weight)

    def _noise(self, device: torch.device, index: int, step: int) -> torch.Generator:
        # A digest: neighbouring seeds must not give streams that have anything in common.
        place = f"{self.seed} {index} {step} {parallel.joined().rank}".encode()
        number = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest())
        return torch.Generator(device).manual_seed(number)


class KahanAdamW(BFloat16AdamW):
    """The part of a weight that rounding cuts off is kept, and added back in the next step."""

    buffers = (*BFloat16AdamW.buffers, "compensation")

    def _read(self, rows: dict[str, Tensor]) -> Tensor:
        return rows["weight"].float() + rows["compensation"].float()

    def _write(self, rows: dict[str, Tensor], weight: Tensor, noise: torch.Generator) -> None:
        rows["weight"].copy_(weight)
        rows["compensation"].copy_(weight - rows["weight"].float())


class StochasticAdamW(BFloat16AdamW):
    """A weight is rounded up or down at random, so that it is right in the mean."""

    def _write(self, rows: dict[str, Tensor], weight: Tensor, noise: torch.Generator) -> None:
        rows["weight"].copy_(_rounded_like(rows["weight"], weight, noise))


def _rounded_like(tensor: Tensor, values: Tensor, noise: torch.Generator) -> Tensor:
    return values if tensor.dtype == torch.float32 else stochastically_rounded(values, noise)


def _chunks(tensors: dict[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    """Yield the same rows of tensors of one shape, some at a time."""
    shape = tensors["weight"].shape
    rows = max(1, CHUNK // max(1, math.prod(shape[1:])))
    for pieces in zip(*(tensor.split(rows) for tensor in tensors.values()), strict=True):
        yield dict(zip(tensors, pieces, strict=True))
