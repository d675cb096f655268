"""The student while it is taught: a module whose forward pass gives the loss of a batch."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

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
            dtype: of the student's matrix products; the states between layers and the losses are float32, whatever its
                weights are.
        """
        super().__init__()
        model.get_input_embeddings().register_forward_hook(lambda module, arguments, states: states.float())
        self.model, self.intermediate = model, intermediate
        self.objective, self.dtype, self.transform = objective, dtype, logit_transform(model)

    def forward(self, batch: Batch, lesson: Lesson | None) -> tuple[Tensor, Tensor]:
        """What to minimise, and the objective alone, each as a sum over predicted tokens.

        While training, what to minimise holds the loss of states between layers as well, scaled to count as much as the
        objective (P1's dynamic weight).
        """
        with_states = self.intermediate is not None and self.training
        hidden, states = self._run(batch, with_states)
        loss = chunked_loss(
            self.objective,
            LazyLogits(batch.predicting(hidden), self.model.get_output_embeddings().weight, self.transform),
            None if lesson is None else lesson.logits,
            batch.targets,
            dtype=self.dtype,
        )
        if self.intermediate is None or not with_states:
            return loss, loss
        assert lesson is not None and lesson.states is not None
        between = self.intermediate(states, lesson.states)
        weight = (loss / between.clamp_min(torch.finfo(torch.float32).tiny)).detach()
        return loss + weight * between, loss.detach()

    def layers(self, checkpoint: Checkpoint) -> list[nn.Module]:
        """The decoder layers of the student, whose checkpoint is given."""
        name = checkpoint.architecture.layer
        return [self.model.get_submodule(name.format(layer=layer)) for layer in range(checkpoint.shape.layers)]

    @torch.no_grad()
    def fit_maps(self, batch: Batch, lesson: Lesson) -> None:
        """Start the maps, if there are any, as the least-squares fit on some tokens."""
        if self.intermediate is not None and self.intermediate.maps:
            assert lesson.states is not None
            self.intermediate.fit(self._run(batch, with_states=True)[1], lesson.states)

    def _run(self, batch: Batch, with_states: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        with self._autocast(batch.tokens.device):
            made = self.model.base_model(**batch.inputs, use_cache=False, output_hidden_states=with_states)
        return made.last_hidden_state, made.hidden_states if with_states else ()

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
