"""The student while it is taught: a module whose forward pass gives the loss of a batch."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from minitron.core import parallel
from minitron.distillation.hidden_loss import HiddenLoss
from minitron.distillation.losses import Objective, chunked_loss
from minitron.distillation.teachers import TeacherOutput
from minitron.model.hidden_states import capture_hidden_states
from minitron.model.logits import LazyLogits, logit_transform
from minitron.model.samples import Batch


class StudentModule(nn.Module):
    """All that is trained: the student and, where states of other widths are compared, the maps between them."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[nn.Module],
        objective: Objective,
        intermediate: HiddenLoss | None,
        dtype: torch.dtype,
    ):
        """
        Args:
            layers: the model's decoder layers.
            dtype: of the student's matrix products; the states between layers and the losses are float32, whatever its
                weights are.
        """
        super().__init__()
        model.get_input_embeddings().register_forward_hook(lambda module, arguments, states: states.float())
        self.model, self.intermediate, self.layers = model, intermediate, list(layers)
        self.objective, self.dtype, self.transform = objective, dtype, logit_transform(model)

    def forward(self, batch: Batch, lesson: TeacherOutput | None, *, fitting: bool = False) -> Any:
        """The objective, and while training the loss of states between layers, each as a sum over tokens.

        The second is 0 where no states are compared.

        Args:
            fitting: return the batch's `HiddenLoss.products` instead. They are made here, for parameters that
                are divided among processes are whole only while this runs.
        """
        between = self.intermediate if self.training or fitting else None
        with (
            products_in(self.dtype, batch.tokens.device),
            capture_hidden_states(self.layers, _places(between)) as states,
        ):
            hidden = self.model.base_model(**batch.inputs, use_cache=False).last_hidden_state
        if fitting:
            assert between is not None and lesson is not None
            return between.products(states, lesson.states)
        loss = chunked_loss(
            self.objective,
            LazyLogits(batch.predicting(hidden), self.model.get_output_embeddings().weight, self.transform),
            None if lesson is None else lesson.logits,
            batch.targets,
            dtype=self.dtype,
        )
        if between is None:
            return loss, torch.zeros_like(loss)
        assert lesson is not None
        return loss, between(states, lesson.states)

    @torch.no_grad()
    def fit_maps(self, lessons: Iterable[tuple[Batch, TeacherOutput, float]]) -> None:
        """Start the maps, if there are any, as the least-squares fit on these batches, those of all processes.

        Args:
            lessons: batches, what the teacher says of them, and their weights.
        """
        if self.intermediate is None or not self.intermediate.maps:
            return
        products = torch.stack([weight * self(batch, lesson, fitting=True) for batch, lesson, weight in lessons]).sum(0)
        parallel.all_reduce_sum(products)
        for linear, weight in zip(self.intermediate.maps, self.intermediate.fitted(products), strict=True):
            linear.weight.copy_(parallel.shard_like(weight, linear.weight))


def _places(between: HiddenLoss | None) -> list[int]:
    return [] if between is None else [ours for ours, _ in between.pairs]


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, matrix products of float32 weights are made in `dtype`: bfloat16, or float32 as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
