"""SOAP: AdamW that moves each matrix along the principal axes of its own gradients.

Vyas et al., arXiv:2409.11321, "SOAP: Improving and Stabilizing Shampoo using Adam". Adam divides every entry of a step
by the entry's own usual size, so it matters along which axes a matrix is written. Here gradients are turned to the
eigenvectors of their second moments, sums of G G' on the left and G' G on the right, Adam's step is made there, and
turned back. Beyond the paper, Adam's moments are turned too where the axes move, the first one exactly and the second
as that of entries that are uncorrelated: else it would be of other axes than the steps that it scales. And the first
axes are of several gradients, for those of one leave some sides without any: until then the steps are AdamW's.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minitron import parallel
from minitron.distill.low_precision import EPSILON, BFloat16AdamW
from minitron.model.logits import float32_logits

# Steps from one change of the axes to the next, as in the paper.
AXES_STEPS = 10
# Decay of the moments that the axes are of, at each step.
AXES_BETA = 0.95
# A side of a matrix that is longer keeps the axes it has.
MOST_AXES = 4096
SIDES = ("left", "right")


def turned_sides(shape: tuple[int, ...]) -> dict[str, int]:
    """The sides of a matrix that get axes of their own, and their lengths."""
    return {side: length for side, length in zip(SIDES, shape, strict=True) if length <= MOST_AXES}


def axes_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a matrix's axes and of the moments that they are of; every process holds them whole."""
    return sum(2 * 4 * length**2 for length in turned_sides(shape).values())


class Soap(BFloat16AdamW):
    """AdamW of float32 weights whose groups say whether their matrices are `turned`.

    Of a matrix that is divided among processes, Adam's moments are divided as it is; its axes are whole in each, and so
    is, while it moves, its gradient.
    """

    whole_entries = tuple(f"{side}_{entry}" for side in SIDES for entry in ("moment", "axes"))

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], dtype: torch.dtype = torch.float32
    ):
        """
        Args:
            dtype: that products with gradients may round their inputs to; what axes are of each other stays exact.
        """
        super().__init__(groups, betas=betas, seed=0)  # weights in float32 need no noise
        self.dtype = dtype

    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient; torch's signature, without the closure."""
        with float32_logits(self.dtype):
            return super().step(closure)

    def _move(self, parameter: Tensor, group: dict[str, Any], index: int) -> None:
        if not group["turned"]:
            super()._move(parameter, group, index)
            return
        assert parameter.grad is not None
        state, gradient = self._counted(parameter), parallel.whole(parameter.grad)
        sides = turned_sides(tuple(parameter.shape))
        if int(state["step"]) == 1:
            state |= {f"{side}_moment": gradient.new_zeros(length, length) for side, length in sides.items()}
        self._step(parameter, gradient, group)
        for side in sides:
            own = gradient if side == "left" else gradient.T
            state[f"{side}_moment"].lerp_(own @ own.T, 1 - AXES_BETA)
        if int(state["step"]) % AXES_STEPS == 0:
            with float32_logits(torch.float32):
                self._follow(parameter, sides)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Adam's step along the axes."""
        state, (slow, slower) = self.state[parameter], group["betas"]
        left, right, step = state.get("left_axes"), state.get("right_axes"), int(state["step"])
        own = parallel.own_rows(_turned(gradient, left, right), parameter)
        mean, square = (parallel.local(state[name]) for name in self.buffers)
        mean.lerp_(own, 1 - slow)
        square.mul_(slower).addcmul_(own, own, value=1 - slower)
        change = (mean / (1 - slow**step)) / (square / (1 - slower**step)).sqrt().add_(EPSILON)
        back = (None if axes is None else axes.T for axes in (left, right))
        change = parallel.own_rows(_turned(parallel.gathered(change, parameter), *back), parameter)
        weight = parallel.local(parameter)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-group["lr"])

    def _follow(self, parameter: Tensor, sides: Iterable[str]) -> None:
        """Bring the axes nearer to the moments' eigenvectors, and Adam's moments along."""
        state, changes = self.state[parameter], {}
        for side in sides:
            moment, axes = state[f"{side}_moment"], state.get(f"{side}_axes")
            nearer = _eigenvectors(moment) if axes is None else _iterated(moment, axes)
            changes[side] = nearer if axes is None else axes.T @ nearer
            state[f"{side}_axes"] = nearer
        left, right = (changes.get(side) for side in SIDES)
        mean, square = (parallel.whole(state[name]) for name in self.buffers)
        shares = (None if change is None else change.square() for change in (left, right))
        for name, turned in zip(self.buffers, (_turned(mean, left, right), _turned(square, *shares)), strict=True):
            parallel.local(state[name]).copy_(parallel.own_rows(turned, parameter))


def _eigenvectors(moment: Float[Tensor, "length length"]) -> Float[Tensor, "length length"]:
    """Orthonormal columns, that of the largest eigenvalue first."""
    return torch.linalg.eigh(moment.double()).eigenvectors.flip(1).float().contiguous()


def _iterated(
    moment: Float[Tensor, "length length"], axes: Float[Tensor, "length length"]
) -> Float[Tensor, "length length"]:
    """One step of orthogonal iteration from axes that are near the eigenvectors."""
    nearer = moment @ axes
    order = (axes * nearer).sum(0).argsort(descending=True, stable=True)
    return torch.linalg.qr(nearer[:, order]).Q.contiguous()


def _turned(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """A matrix [rows, columns] written along other axes, the columns of `left` [rows, rows] and `right`."""
    if left is not None:
        matrix = left.T @ matrix
    return matrix if right is None else matrix @ right
