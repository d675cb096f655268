"""SOAP: AdamW that moves each matrix along the principal axes of its own gradients.

Vyas et al., arXiv:2409.11321, "SOAP: Improving and Stabilizing Shampoo using Adam". Adam divides every entry of a step
by the entry's own usual size, so it matters along which axes a matrix is written. Here gradients are turned to the
eigenvectors of their second moments, sums of G G' on the left and G' G on the right, Adam's step is made there, and
turned back. Beyond the paper, Adam's moments are turned too where the axes move, the first one exactly and the second
as that of entries that are uncorrelated: else it would be of other axes than the steps that it scales. And the first
axes are of several gradients, for those of one leave some sides without any: until then the steps are AdamW's.
"""

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adamw import adamw

from minitron import parallel
from minitron.model.logits import float32_logits

# Steps from one change of the axes to the next, as in the paper.
AXES_STEPS = 10
# Decay of the moments that the axes are of, at each step.
AXES_BETA = 0.95
# A side of a matrix that is longer keeps the axes it has.
MOST_AXES = 4096
# Entries of a matrix from which on products with rounded inputs are faster; below, converting them takes longer.
ROUNDED_FROM = 128 * 128
EPSILON = 1e-8  # torch's default
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, by torch's names
SIDES = ("left", "right")


def turned_sides(shape: tuple[int, ...]) -> dict[str, int]:
    """The sides of a matrix that get axes of their own, and their lengths."""
    return {side: length for side, length in zip(SIDES, shape, strict=True) if length <= MOST_AXES}


def axes_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a matrix's axes and of the moments that they are of; every process holds them whole."""
    return sum(2 * 4 * length**2 for length in turned_sides(shape).values())


class Soap(torch.optim.Optimizer):
    """AdamW of float32 weights whose groups say whether their matrices are `turned`; torch moves the others.

    Of a matrix that is divided among processes, Adam's moments are divided as it is; its axes are whole in each, and so
    is, while it moves, its gradient.
    """

    whole_entries = tuple(f"{side}_{entry}" for side in SIDES for entry in ("moment", "axes"))

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], dtype: torch.dtype = torch.float32
    ):
        """
        Args:
            dtype: that products of large matrices may round their inputs to. Axes stay orthonormal all the same.
        """
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "weight_decay": 0.0})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient; torch's signature, without the closure."""
        assert closure is None
        for large, group in product((False, True), self.param_groups):
            with float32_logits(self.dtype if large else torch.float32):
                for parameter in group["params"]:
                    of_size = large == (parameter.numel() >= ROUNDED_FROM)
                    if group["turned"] and parameter.grad is not None and of_size:
                        self._move(parameter, group)
        for group in self.param_groups:
            if not group["turned"]:
                self._move_as_torch_does(group)

    def _move_as_torch_does(self, group: dict[str, Any]) -> None:
        members = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not members:
            return
        (slow, slower), states = group["betas"], [self._state_of(parameter, parameter.device) for parameter in members]
        means, squares = ([parallel.local(state[name]) for state in states] for name in MOMENTS)
        adamw(
            [parallel.local(parameter) for parameter in members],
            [parallel.local(parameter.grad) for parameter in members],
            means,
            squares,
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=slow,
            beta2=slower,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=EPSILON,
            maximize=False,
        )

    def _state_of(self, parameter: Tensor, device: torch.device | str) -> dict[str, Any]:
        """What is held of a parameter.

        Args:
            device: of the number of its steps.
        """
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=device)
            state |= {name: torch.zeros_like(parameter) for name in MOMENTS}
        return state

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state, gradient = self._state_of(parameter, "cpu"), parallel.whole(parameter.grad)
        state["step"] += 1
        step, sides = int(state["step"]), turned_sides(tuple(parameter.shape))
        if step == 1:
            state |= {f"{side}_moment": gradient.new_zeros(length, length) for side, length in sides.items()}
        self._step(parameter, gradient, group, step)
        for side in sides:
            own = gradient if side == "left" else gradient.T
            state[f"{side}_moment"].lerp_(own @ own.T, 1 - AXES_BETA)
        if step % AXES_STEPS == 0:
            self._follow(parameter, sides)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], step: int) -> None:
        """Adam's step along the axes."""
        state, (slow, slower), rate = self.state[parameter], group["betas"], group["lr"]
        left, right = (state.get(f"{side}_axes") for side in SIDES)
        own = parallel.own_rows(_turned(gradient, left, right), parameter)
        mean, square = (parallel.local(state[name]) for name in MOMENTS)
        mean.lerp_(own, 1 - slow)
        square.mul_(slower).addcmul_(own, own, value=1 - slower)
        change = mean / square.sqrt().div_((1 - slower**step) ** 0.5).add_(EPSILON)
        back = (None if axes is None else axes.T for axes in (left, right))
        change = parallel.own_rows(_turned(parallel.gathered(change, parameter), *back), parameter)
        weight = parallel.local(parameter)
        weight.mul_(1 - rate * group["weight_decay"]).add_(change, alpha=-rate / (1 - slow**step))

    def _follow(self, parameter: Tensor, sides: Iterable[str]) -> None:
        """Bring the axes nearer to the moments' eigenvectors, and Adam's moments along."""
        state, changes = self.state[parameter], {}
        for side in sides:
            moment, axes = state[f"{side}_moment"], state.get(f"{side}_axes")
            nearer = _eigenvectors(moment) if axes is None else _iterated(moment, axes)
            changes[side] = nearer if axes is None else axes.T @ nearer
            state[f"{side}_axes"] = nearer
        left, right = (changes.get(side) for side in SIDES)
        mean, square = (parallel.whole(state[name]) for name in MOMENTS)
        shares = (None if change is None else change.square() for change in (left, right))
        for name, turned in zip(MOMENTS, (_turned(mean, left, right), _turned(square, *shares)), strict=True):
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
