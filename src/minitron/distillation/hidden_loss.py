"""The loss on hidden states: those of the student are compared with those of the teacher at several depths.

Paper: P1, "Retraining", intermediate state-based distillation. P1 compares the embedding and one late state, and only
after deep cuts (practices 6 and 7); this compares states along the whole depth after any cut, and gives them less and
less weight.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitron.core.numerics import normalized
from minitron.model.architecture import Shape

Depths = Literal["off", "p1", "all"]
# Most pairs along the depth, so that maps between widths stay small beside the student.
MOST_PAIRS = 9
# The weight of the loss at first, in units of the objective on logits.
FIRST_SHARE = 2.0
# Ridge of the fit that a projection starts from, in units of the states' mean square.
MAP_RIDGE = 1e-3

# The student's state and the teacher's: 0 is the embedding's output, n that of the nth layer.
Pair = tuple[int, int]


def pairs_of(places: Depths, student: Shape, teacher: Shape) -> list[Pair]:
    """Return the pairs of depths to compare, the student's and the teacher's.

    `all`: the embedding's output, the last layer's, and between them every layer's or as many as `MOST_PAIRS` allows,
    each with the teacher's state at the same share of the depth. `p1`: the embedding's output, and that of the last
    layer but two: layers 13 of 16 and 29 of 32, counted from 0.
    """
    if places == "off":
        return []
    if places == "p1":
        return [(0, 0), *([(student.layers - 2, teacher.layers - 2)] if student.layers > 2 else [])]
    number = min(student.layers, MOST_PAIRS - 1)
    ours = [round(index * student.layers / number) for index in range(number + 1)]
    return [(place, round(place * teacher.layers / student.layers)) for place in ours]


def share_at(step: int, steps: int) -> float:
    """Return the weight of the loss at a step, in units of the objective: it falls to 0, and training ends without."""
    return FIRST_SHARE * (1 - step / steps)


class HiddenLoss(nn.Module):
    """The loss is 1 - cosine between normalized states of student and teacher, summed over pairs and over tokens.

    Where the widths differ, each pair has a linear map from the student's width to the teacher's, which is learned with
    the student and thrown away in the end.
    """

    def __init__(self, pairs: Sequence[Pair], student: Shape, teacher: Shape, *, centred: bool):
        """Make the maps, where there are any.

        Args:
            centred: whether norms of the family subtract the mean.
        """
        super().__init__()
        self.pairs, self.centred = list(pairs), centred
        widths_differ = student.hidden != teacher.hidden
        self.maps = [nn.Linear(student.hidden, teacher.hidden, bias=False) for _ in self.pairs if widths_differ]
        for index, linear in enumerate(self.maps):
            self.add_module(f"map{index}", linear)

    def forward(
        self, student: Mapping[int, Float[Tensor, "batch tokens hidden"]], teacher: Mapping[int, Tensor]
    ) -> Float[Tensor, ""]:
        """Return the loss of a batch.

        Args:
            student, teacher: depth -> hidden states.
        """
        total = torch.zeros((), device=next(iter(student.values())).device)
        for index, (one, other) in enumerate(self.pairs):
            ours, theirs = self._normalized(student[one]), self._normalized(teacher[other])
            mapped = nn.functional.linear(ours, self.maps[index].weight.float()) if self.maps else ours
            total = total + (1 - nn.functional.cosine_similarity(mapped, theirs, dim=-1)).sum()
        return total

    @torch.no_grad()
    def products(
        self, student: Mapping[int, Float[Tensor, "batch tokens hidden"]], teacher: Mapping[int, Tensor]
    ) -> Float[Tensor, "pairs ours both"]:
        """Return the sums over tokens of the student's state times the student's and the teacher's, for `fitted`."""
        made = []
        for one, other in self.pairs:
            ours, theirs = self._normalized(student[one]).flatten(0, 1), self._normalized(teacher[other]).flatten(0, 1)
            made.append(ours.T @ torch.cat([ours, theirs], dim=1))
        return torch.stack(made)

    @staticmethod
    def fitted(products: Float[Tensor, "pairs ours both"]) -> list[Float[Tensor, "theirs ours"]]:
        """Return the least-squares fit of each pair's map, from the sum of several batches' `products`."""
        weights = []
        for pair in products:  # one at a time: MKL's solver of many systems at once can hang with several threads
            own, targets = pair[:, : len(pair)].clone(), pair[:, len(pair) :]
            own.diagonal().add_(MAP_RIDGE * own.diagonal().mean())
            weights.append(torch.cholesky_solve(targets, torch.linalg.cholesky(own)).T)
        return weights

    def _normalized(self, states: Tensor) -> Tensor:
        return normalized(states, centred=self.centred)
