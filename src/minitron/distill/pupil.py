"""The student while it is taught: a module whose forward pass gives the loss of a batch."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from minitron import parallel
from minitron.distill.intermediate import IntermediateLoss
from minitron.distill.losses import Objective, chunked_loss
from minitron.distill.teacher import Lesson
from minitron.model.checkpoint import Checkpoint
from minitron.model.logits import LazyLogits, logit_transform
from minitron.packing import Batch


class Pupil(nn.Module):
    """All that is trained: the student and, where states of other widths are compared, the maps between them."""

    def __init__(self, model: Any, objective: Objective, intermediate: IntermediateLoss | None, dtype: torch.dtype):
        """
        Args:
            dtype: of the student's matrix products; its weights and the losses are float32.
        """
        super().__init__()
        self.model, self.intermediate = model, intermediate
        self.objective, self.dtype, self.transform = objective, dtype, logit_transform(model)

    def forward(self, batch: Batch, lesson: Lesson | None, *, fitting: bool = False) -> Any:
        """The objective, and while training the loss of states between layers, each as a sum over tokens.

        The second is 0 where no states are compared.

        Args:
            fitting: return the batch's `IntermediateLoss.products` instead. They are made here, for parameters that
                are divided among processes are whole only while this runs.
        """
        with_states = self.intermediate is not None and (self.training or fitting)
        hidden, states = self._run(batch, with_states)
        if fitting:
            assert self.intermediate is not None and lesson is not None and lesson.states is not None
            return self.intermediate.products(states, lesson.states)
        loss = chunked_loss(
            self.objective,
            LazyLogits(batch.predicting(hidden), self.model.get_output_embeddings().weight, self.transform),
            None if lesson is None else lesson.logits,
            batch.targets,
            dtype=self.dtype,
        )
        if self.intermediate is None or not with_states:
            return loss, torch.zeros_like(loss)
        assert lesson is not None and lesson.states is not None
        return loss, self.intermediate(states, lesson.states)

    def layers(self, checkpoint: Checkpoint) -> list[nn.Module]:
        """The decoder layers of the student, whose checkpoint is given."""
        name = checkpoint.architecture.layer
        return [self.model.get_submodule(name.format(layer=layer)) for layer in range(checkpoint.shape.layers)]

    @torch.no_grad()
    def fit_maps(self, lessons: Iterable[tuple[Batch, Lesson]]) -> None:
        """Start the maps, if there are any, as the least-squares fit on these batches, those of all processes."""
        if self.intermediate is None or not self.intermediate.maps:
            return
        products = torch.stack([self(batch, lesson, fitting=True) for batch, lesson in lessons]).sum(0)
        parallel.all_reduce_sum(products)
        for linear, weight in zip(self.intermediate.maps, self.intermediate.fitted(products), strict=True):
            linear.weight.copy_(parallel.divided_like(weight, linear.weight))

    def _run(self, batch: Batch, with_states: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        with products_in(self.dtype, batch.tokens.device):
            made = self.model.base_model(**batch.inputs, use_cache=False, output_hidden_states=with_states)
        return made.last_hidden_state, made.hidden_states if with_states else ()


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, matrix products of float32 weights are made in `dtype`: bfloat16, or float32 as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
