"""SOAP: AdamW that moves each matrix along the principal axes of its own gradients.

Vyas et al., arXiv:2409.11321, "SOAP: Improving and Stabilizing Shampoo using Adam". Adam divides every entry of a step
by the entry's own usual size, so it matters along which axes a matrix is written. Here gradients are turned to the
eigenvectors of their second moments, sums of G G' on the left and G' G on the right, Adam's step is made there, and
turned back. Beyond the paper, Adam's moments are turned too where the axes move, the first one exactly and the second
as that of entries that are uncorrelated: else it would be of other axes than the steps that it scales. And the first
axes are of several gradients, for those of one leave some sides without any: until then the steps are AdamW's.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adamw import adamw

from minitron.core import parallel
from minitron.core.numerics import matmul_precision
from minitron.distillation.optim.low_precision import EPSILON, Group

# Steps from one change of the axes to the next, as in the paper.
AXES_STEPS = 10
# Decay of the moments that the axes are of, at each step.
AXES_BETA = 0.95
# A side of a matrix that is longer keeps the axes it has.
MOST_AXES = 4096
# Entries of a matrix from which on products with rounded inputs are faster; below, converting them takes longer.
ROUNDED_FROM = 128 * 128
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, by torch's names
SIDES = ("left", "right")


@dataclass(frozen=True)
class Turning:
    """How much SOAP does for the axes.

    longer_sides: turn a matrix that is not square along its longer side too.
    moment_steps: steps from one gradient that the axes' moments take in to the next.
    axes_every: times AXES_STEPS, the steps from one change of the axes to the next, after the first one.
    rounded: products of large matrices have inputs and results in the products' dtype, not only inputs.
    """

    longer_sides: bool = True
    moment_steps: int = 1
    axes_every: int = 1
    rounded: bool = False

    def sides(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Return the sides of a matrix along which it is turned, and their lengths."""
        most = MOST_AXES if self.longer_sides else min(MOST_AXES, *shape)
        return {side: length for side, length in zip(SIDES, shape, strict=True) if length <= most}

    def held_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the state of a turned matrix: Adam's moments, and each side's axes and second moment."""
        squares = {
            f"{side}_{entry}": (length, length)
            for side, length in self.sides(shape).items()
            for entry in ("moment", "axes")
        }
        return dict.fromkeys(MOMENTS, shape) | squares

    def axes_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a turned matrix's state beyond AdamW's moments."""
        return 4 * sum(math.prod(size) for name, size in self.held_shapes(shape).items() if name not in MOMENTS)

    def flops(self, shape: tuple[int, ...]) -> float:
        """Return the operations of the matrix products in an update of a matrix of a shape, in the mean over many."""
        lengths = self.sides(shape).values()
        turned = 2 * math.prod(shape) * sum(lengths)  # once, and as many for the moments of one gradient
        changed = 4 * sum(length**3 for length in lengths) + 2 * turned
        return 2 * turned + turned / self.moment_steps + changed / (self.axes_every * AXES_STEPS)


FULL = Turning()
LIGHT = Turning(longer_sides=False, moment_steps=5, axes_every=5, rounded=True)


class Soap(torch.optim.Optimizer):
    """AdamW of float32 weights whose groups say whether their matrices are `turned`; torch moves the others.

    Among several processes, each holds the state of some of the turned matrices, and moves these for all.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        betas: tuple[float, float],
        dtype: torch.dtype = torch.float32,
        turning: Turning = FULL,
    ):
        """Share the turned matrices out among the processes.

        Args:
            dtype: products of large matrices may round their inputs to it, except those that axes come from.
        """
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "weight_decay": 0.0})
        self.dtype, self.turning = dtype, turning
        for group in self.param_groups:
            group["fused"] = not group["turned"]  # of torch's functions
        turned = [parameter for group in self.param_groups if group["turned"] for parameter in group["params"]]
        # Matrix -> the process that holds what is held of it.
        self.holders = _shared_out(turned, parallel.joined().size, turning)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient; torch's signature, without the closure. Gradients are used up."""
        assert closure is None
        turned = [
            (parameter, group)
            for group in self.param_groups
            if group["turned"]
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        # All gradients first and all changes last: between, no process waits for another.
        changes = {p: parallel.at_owner(parallel.full(p.grad), self.holders[p]) for p, _ in turned}
        for large in (False, True):
            with matmul_precision(self.dtype if large else torch.float32):
                for parameter, group in turned:
                    if large == (parameter.numel() >= ROUNDED_FROM):
                        self._count(parameter)
                        self._to_change(changes[parameter], parameter, group)
        for parameter, group in turned:
            change = parallel.from_owner(changes.pop(parameter), self.holders[parameter], parameter.device)
            weight = parallel.local_shard(parameter)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(parallel.local_rows(change, parameter), alpha=-group["lr"])
        for group in self.param_groups:
            if not group["turned"]:
                self._move_as_torch_does(group)

    def _move_as_torch_does(self, group: Group) -> None:
        members = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not members:
            return
        for parameter in members:
            if parameter not in self.state:
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device)}
                self.state[parameter] |= {name: torch.zeros_like(parameter) for name in MOMENTS}
        (slow, slower), states = group["betas"], [self.state[parameter] for parameter in members]
        means, squares = ([parallel.local_shard(state[name]) for state in states] for name in MOMENTS)
        adamw(
            [parallel.local_shard(parameter) for parameter in members],
            [parallel.local_shard(parameter.grad) for parameter in members],
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

    def _count(self, parameter: Tensor) -> None:
        """Count a step of a turned matrix; the first one makes its state."""
        if parameter not in self.state:
            device = parameter.device if self.holders[parameter] == parallel.joined().rank else "meta"
            shapes = self.turning.held_shapes(tuple(parameter.shape))
            self.state[parameter] = {"step": torch.tensor(0.0)}
            self.state[parameter] |= {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        # Not in place: so its value is known where tensors are fake.
        self.state[parameter]["step"] = self.state[parameter]["step"] + 1

    def _to_change(self, gradient: Tensor, parameter: Tensor, group: Group) -> None:
        """Replace a matrix's gradient, where its state is held, by the step to subtract at a learning rate of 1."""
        if gradient.is_meta:
            return
        state, sides = self.state[parameter], self.turning.sides(tuple(parameter.shape))
        step, taken = int(state["step"]), self.turning.moment_steps
        large = self.turning.rounded and parameter.numel() >= ROUNDED_FROM
        own = gradient.to(self.dtype) if large else gradient
        if step <= AXES_STEPS or step % taken == 0:
            for side in sides:
                across = own if side == "left" else own.T
                state[f"{side}_moment"].lerp_((across @ across.T).float(), 1 - AXES_BETA**taken)
        known = step > AXES_STEPS
        axes = [state[f"{side}_axes"].to(own.dtype) if known and side in sides else None for side in SIDES]
        (slow, slower), own = group["betas"], _turned(own, *axes).float()
        mean, square = (state[name] for name in MOMENTS)
        mean.lerp_(own, 1 - slow)
        square.mul_(slower).addcmul_(own, own, value=1 - slower)
        change = mean / square.sqrt().div_((1 - slower**step) ** 0.5).add_(EPSILON)
        if large:
            change = change.to(self.dtype)
        gradient.copy_(_turned(change, *(None if side is None else side.T for side in axes))).div_(1 - slow**step)
        if step == AXES_STEPS or step % (self.turning.axes_every * AXES_STEPS) == 0:
            self._follow(state, sides, first=step == AXES_STEPS)

    @staticmethod
    def _follow(state: dict[str, Tensor], sides: Iterable[str], *, first: bool) -> None:
        """Bring the axes nearer to the moments' eigenvectors, and Adam's moments along."""
        changes = {}
        for side in sides:
            moment, axes = state[f"{side}_moment"], state[f"{side}_axes"]
            # Rounded, the moment's largest directions would drown the axes of the small ones.
            with matmul_precision(torch.float32):
                nearer = _eigenvectors(moment) if first else _iterated(moment, axes)
            changes[side] = nearer if first else axes.T @ nearer
            axes.copy_(nearer)
        left, right = (changes.get(side) for side in SIDES)
        mean, square = (state[name] for name in MOMENTS)
        mean.copy_(_turned(mean, left, right))
        square.copy_(_turned(square, *(None if change is None else change.square() for change in (left, right))))


def _shared_out(matrices: Iterable[Tensor], processes: int, turning: Turning) -> dict[Tensor, int]:
    """Share the matrices out so that all processes hold about as much: the largest first, each to the emptiest."""
    loads, found = [0] * processes, {}
    sizes = {matrix: sum(map(math.prod, turning.held_shapes(tuple(matrix.shape)).values())) for matrix in matrices}
    for matrix in sorted(sizes, key=lambda matrix: -sizes[matrix]):
        found[matrix] = loads.index(min(loads))
        loads[found[matrix]] += sizes[matrix]
    return found


def _eigenvectors(moment: Float[Tensor, "length length"]) -> Float[Tensor, "length length"]:
    """Return orthonormal columns, the one of the largest eigenvalue first."""
    return torch.linalg.eigh(moment.double()).eigenvectors.flip(1).float().contiguous()


def _iterated(
    moment: Float[Tensor, "length length"], axes: Float[Tensor, "length length"]
) -> Float[Tensor, "length length"]:
    """Make one step of orthogonal iteration from axes that are near the eigenvectors."""
    nearer = moment @ axes
    order = (axes * nearer).sum(0).argsort(descending=True, stable=True)
    return torch.linalg.qr(nearer[:, order]).Q.contiguous()


def _turned(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Write a matrix [rows, columns] along other axes, the columns of `left` [rows, rows] and `right`."""
    if left is not None:
        matrix = left.T @ matrix
    return matrix if right is None else matrix @ right
