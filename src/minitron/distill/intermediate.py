"""Losses on the states between layers, for students that lost many of them.

Paper: P1, "Retraining", intermediate state-based distillation; its practices 6 and 7 for when.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitron.model.architecture import Shape
from minitron.model.norms import normalized

# The student keeps at most this share of the layers where the losses are on by default.
DEEP_CUT = 2 / 3
# Ridge of the fit that a projection starts from, in units of the states' mean square.
RIDGE = 1e-3

# The student's state and the teacher's: 0 is the embedding's output, n that of the nth layer.
Pair = tuple[int, int]


def default_pairs(student: Shape, teacher: Shape) -> list[Pair]:
    """The embedding's output, and the output of the last layer but two: 29 of 32 to 13 of 16, counted from 0 (P1)."""
    last = [(student.layers - 2, teacher.layers - 2)] if student.layers > 2 else []
    return [(0, 0), *last]


class IntermediateLoss(nn.Module):
    """1 - cosine between normalized states of student and teacher, summed over pairs of places and over tokens.

    Where the widths differ, each pair has a linear map of its own from the student's width to the teacher's, which
    is learned with the student and thrown away after.
    """

    def __init__(self, pairs: Sequence[Pair], student: Shape, teacher: Shape, *, centred: bool):
        """
        Args:
            centred: whether norms of the family take the mean off.
        """
        super().__init__()
        self.pairs, self.centred = list(pairs), centred
        widths_differ = student.hidden != teacher.hidden
        self.maps = [nn.Linear(student.hidden, teacher.hidden, bias=False) for _ in self.pairs if widths_differ]
        for index, linear in enumerate(self.maps):
            self.add_module(f"map{index}", linear)

    def forward(
        self, student: Sequence[Float[Tensor, "batch tokens hidden"]], teacher: Sequence[Tensor]
    ) -> Float[Tensor, ""]:
        """
        Args:
            student, teacher: the output of the embedding and of each layer.
        """
        total = torch.zeros((), device=student[0].device)
        for index, (one, other) in enumerate(self.pairs):
            ours, theirs = self._normalized(student[one]), self._normalized(teacher[other])
            mapped = self.maps[index](ours) if self.maps else ours
            total = total + (1 - nn.functional.cosine_similarity(mapped, theirs, dim=-1)).sum()
        return total

    @torch.no_grad()
    def fit(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        """Start the maps as the least-squares fit on some tokens."""
        for linear, (one, other) in zip(self.maps, self.pairs, strict=False):
            ours, theirs = self._normalized(student[one]).flatten(0, 1), self._normalized(teacher[other]).flatten(0, 1)
            products = ours.T @ ours
            products.diagonal().add_(RIDGE * len(ours))
            linear.weight.copy_(torch.linalg.solve(products, ours.T @ theirs).T)

    def _normalized(self, states: Tensor) -> Tensor:
        return normalized(states, centred=self.centred)
