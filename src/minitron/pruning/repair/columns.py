"""Remove columns of a matrix and change the others to make up for them: least squares and optimal brain surgeon.

A matrix W [rows, columns] is applied to inputs z with second moment H = E[z z']. If columns D are removed and the
others changed by the update of Hassibi and Stork (1993), which uses the inverse of H, the result is the W' that
minimises E|W z - W' z|^2 over all matrices without these columns: least squares. If the columns are chosen one by one
by their costs, it is optimal brain surgeon.

This goes beyond the papers, which drop columns and leave the others as they are.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitron.core.errors import PlanError
from minitron.pruning.given import Units
from minitron.pruning.plan import Plan

# BLOCK columns are chosen between two updates of the whole inverse, from CANDIDATES times as many of the cheapest ones.
# Among these the choice is exact, one by one; the costs of the others are as of the last update.
BLOCK, CANDIDATES = 64, 4
# Added to the correlations of the inputs, so that directions that the inputs hardly determine get no large weights.
CORRELATION_RIDGE = 1e-3


def correlation_factor(
    moment: Float[Tensor, "columns columns"], ridge: float
) -> tuple[Float[Tensor, " columns"], Float[Tensor, "columns columns"]]:
    """The root mean squares of inputs, and the Cholesky factor of their correlations with a ridge.

    Args:
        moment: E[z z'] up to a constant, of which the upper triangle is read. It is overwritten by the factor, for in
            a large model it takes most of the memory.

    Raises: PlanError if the moment is not finite.
    """
    scale = moment.diagonal().clamp_min(0).sqrt()
    if not scale.isfinite().all():
        raise PlanError("the second moment of a layer's activations is not finite: the model's weights are damaged")
    # To remove a column that is never active costs nothing, whatever its weights.
    scale = scale.clamp_min(torch.finfo(scale.dtype).tiny ** 0.25)
    moment.div_(scale[:, None]).div_(scale)
    moment.diagonal().fill_(1 + ridge)
    return scale, torch.linalg.cholesky(moment.mT, out=moment.mT)


class Surgeon:
    """A matrix from which columns are removed; the columns that are left always hold the least-squares weights."""

    def __init__(self, weight: Float[Tensor, "rows columns"], moment: Float[Tensor, "columns columns"]):
        """
        Args:
            moment: E[z z'] of the inputs up to a constant, in the upper triangle. It is overwritten by the inverse.

        Raises: PlanError if the moment is not finite.
        """
        self._scale, factor = correlation_factor(moment, CORRELATION_RIDGE)
        self._weight = weight.to(moment) * self._scale
        self._inverse = torch.cholesky_inverse(factor, out=factor)
        self._alive = torch.ones(len(factor), dtype=torch.bool, device=factor.device)

    def add(self, errors: Float[Tensor, "rows columns"]) -> None:
        """Change the matrix so that its outputs approach other ones: by least squares, before columns are removed.

        Args:
            errors: E[e z'] of what the outputs lack, up to the constant of the moment.
        """
        assert self._alive.all()
        self._weight += (errors.to(self._scale) / self._scale) @ self._inverse

    def remove(self, columns: Tensor) -> None:
        """Remove columns all at once, by their indices."""
        columns = columns.to(self._alive.device)
        rows = torch.linalg.solve(self._inverse[columns][:, columns], self._inverse[columns])
        self._weight.addmm_(self._weight[:, columns], rows, alpha=-1)
        self._inverse.addmm_(self._inverse[:, columns], rows, alpha=-1)
        self._alive[columns] = False
        # The rest is rounding errors, which must not come back.
        self._weight[:, columns] = 0
        self._inverse[columns] = 0
        self._inverse[:, columns] = 0

    def eliminate(self, count: int, block: int = BLOCK) -> None:
        """Remove `count` columns, each time the column whose removal costs least."""
        while count > 0:
            chosen = self._cheapest(min(block, count))
            self.remove(chosen)
            count -= len(chosen)

    def keep_blocks(self, blocks: Iterable[int], count: int, size: int) -> tuple[int, ...]:
        """Keep `count` of some blocks of `size` columns each, such as heads; returns the kept blocks in order."""
        left = set(blocks)
        while len(left) > count:
            one = min(sorted(left), key=lambda block: self._cost(self._block(block, size)))
            self.remove(self._block(one, size))
            left.remove(one)
        return tuple(sorted(left))

    @property
    def kept(self) -> tuple[int, ...]:
        """The indices of the columns that are left."""
        return tuple(self._alive.nonzero().flatten().tolist())

    @property
    def weight(self) -> Float[Tensor, "rows kept"]:
        """The columns that are left, with their least-squares weights."""
        return self._weight[:, self._alive] / self._scale[self._alive]

    def _cost(self, columns: Tensor) -> float:
        """The rise of E|W z - W' z|^2 when these columns are removed together."""
        weight = self._weight[:, columns]
        return torch.linalg.solve(self._inverse[columns][:, columns], weight.T).mul(weight.T).sum().item()

    def _block(self, block: int, size: int) -> Tensor:
        return torch.arange(block * size, (block + 1) * size, device=self._alive.device)

    def _cheapest(self, count: int) -> Tensor:
        """The next `count` columns to remove, chosen one by one among the candidates.

        After each choice the costs of the others change: the inverse loses a matrix of rank one, and the weights' Gram
        matrix one of rank three. The matrices stay as they are; what they lost is kept by the rows of the chosen.
        """
        costs = self._weight.square().sum(0) / self._inverse.diagonal()
        costs[~self._alive] = torch.inf
        candidates = costs.topk(min(int(self._alive.sum()), CANDIDATES * count), largest=False).indices
        weight, inverse = self._weight[:, candidates], self._inverse[candidates][:, candidates]
        products = weight.T @ weight
        norms, inverses = products.diagonal().clone(), inverse.diagonal().clone()
        # Of each chosen column: its row of the inverse then, over its own entry there, that entry, its row of the Gram
        # matrix then, and its own entry there.
        rows, grams = (inverse.new_zeros(count, len(candidates)) for _ in range(2))
        entries, squares = inverse.new_zeros(count), inverse.new_zeros(count)
        chosen = torch.zeros(count, dtype=torch.long, device=inverse.device)
        for number in range(count):
            one = (norms / inverses).argmin().view(1)
            before, own = slice(0, number), slice(number, number + 1)
            along = rows[before].index_select(1, one).squeeze(1)
            row = inverse.index_select(0, one) - (entries[before] * along) @ rows[before]
            row /= inverses.index_select(0, one)
            gram = products.index_select(0, one) - along @ grams[before]
            gram -= (grams[before].index_select(1, one).squeeze(1) - squares[before] * along) @ rows[before]
            rows[own], grams[own], chosen[own] = row, gram, one
            entries[own] = inverses.index_select(0, one)
            squares[own] = norms.index_select(0, one)
            # The removed column's weights, spread over the others along its row of the inverse.
            norms -= (2 * gram - squares[own] * row).mul_(row)[0]
            inverses -= (row * row).mul_(entries[own])[0]
            norms.index_fill_(0, one, torch.inf)  # gone
            inverses.index_fill_(0, one, 1.0)
        return candidates[chosen]


def drop_planned_ffn(surgeon: Surgeon, plan: Plan, layer: int) -> dict[str, Units]:
    surgeon.remove(_others(plan.ffn[layer], plan.teacher.ffn))
    return {}


def drop_ffn_one_by_one(surgeon: Surgeon, plan: Plan, layer: int) -> dict[str, Units]:
    surgeon.eliminate(plan.teacher.ffn - plan.student.ffn)
    return {"ffn": surgeon.kept}


def drop_planned_heads(surgeon: Surgeon, plan: Plan, layer: int) -> dict[str, Units]:
    dropped, size = _others(plan.heads[layer], plan.teacher.heads), plan.teacher.head_dim
    surgeon.remove((dropped[:, None] * size + torch.arange(size)).flatten())
    return {}


def drop_heads_one_by_one(surgeon: Surgeon, plan: Plan, layer: int) -> dict[str, Units]:
    """Drop key-value heads first, each with its query heads, and then query heads within each group that stays."""
    teacher, student = plan.teacher, plan.student
    kv_heads = surgeon.keep_blocks(range(teacher.kv_heads), student.kv_heads, teacher.group * teacher.head_dim)
    groups = [range(kv * teacher.group, (kv + 1) * teacher.group) for kv in kv_heads]
    heads = [surgeon.keep_blocks(group, student.group, teacher.head_dim) for group in groups]
    return {"kv_heads": kv_heads, "heads": tuple(head for group in heads for head in group)}


def _others(units: Units, total: int) -> Int[Tensor, " others"]:
    """The indices below `total` that are not among the units."""
    left = torch.ones(total, dtype=torch.bool)
    left[list(units)] = False
    return left.nonzero().flatten()
