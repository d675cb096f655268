"""A teacher that goes on learning while it teaches.

Paper: P2, "Teacher correction": the distillation's text is not what the teacher was pretrained on, so the teacher is
trained on that text too, which may go on beside the distillation.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minitron.core import parallel
from minitron.distillation.losses import Objective, chunked_loss
from minitron.distillation.student import products_in
from minitron.distillation.teachers import TeacherOutput
from minitron.model.checkpoint import Checkpoint
from minitron.model.hidden_states import capture_hidden_states, decoder_layers
from minitron.model.logits import LazyLogits, logit_transform
from minitron.model.samples import Batch
from minitron.model.sharded import shard_into

ON_TEXT = Objective({"cross_entropy": 1.0})


class LearningTeacher:
    """A model in memory that says what its weights, as they are at that moment, make of a batch.

    `learn` adds up gradients; the steps are those of whoever trains it.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        places: Collection[int] = (),
    ):
        """
        Args:
            model: of the checkpoint, see `load_for_training`.
            dtype: of its matrix products.
            places: of the states in its lessons.
        """
        self.checkpoint = checkpoint
        layers = decoder_layers(model, checkpoint)
        self.reader = _Reader(model, layers, dtype, places)
        shard_into(self.reader, model, layers, checkpoint, dtype, device)
        # Output and gradient come from one forward pass, so it has no dropout. A layer that is in training itself, and
        # not what is in it, only does what activation checkpointing asks for.
        self.reader.eval()
        for layer in layers:
            layer.training = True

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        hidden, states, _ = self.reader(batch, with_loss=False)
        return self._lesson(hidden, states)

    def learn(self, batch: Batch, weight: float, num_predicted: int) -> tuple[TeacherOutput, float]:
        """The same lesson, and the sum of the cross-entropy over the batch's tokens, in nats.

        The gradient of that sum, times `weight` and divided by `num_predicted`, is added to the parameters'.
        """
        hidden, states, loss = self.reader(batch, with_loss=True)
        (weight * loss / num_predicted).backward()
        return self._lesson(hidden, states), loss.item()

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.reader.named_parameters())

    def _lesson(self, hidden: Tensor, states: Mapping[int, Tensor]) -> TeacherOutput:
        head = parallel.full(self.reader.model.get_output_embeddings().weight).detach()
        return TeacherOutput(LazyLogits(hidden, head, self.reader.transform), states)


class _Reader(nn.Module):
    """A forward pass that gives the last states of tokens that others are predicted from, states between layers, both
    without their history, and the cross-entropy."""

    def __init__(self, model: Any, layers: Sequence[nn.Module], dtype: torch.dtype, places: Collection[int]):
        super().__init__()
        self.model, self.dtype, self.transform = model, dtype, logit_transform(model)
        self.layers, self.places = list(layers), places

    def forward(self, batch: Batch, *, with_loss: bool) -> tuple[Tensor, dict[int, Tensor], Tensor | None]:
        with products_in(self.dtype, batch.tokens.device), capture_hidden_states(self.layers, self.places) as states:
            made = self.model.base_model(**batch.inputs, use_cache=False)
        hidden, loss = batch.predicting(made.last_hidden_state), None
        if with_loss:
            logits = LazyLogits(hidden, self.model.get_output_embeddings().weight, self.transform)
            loss = chunked_loss(ON_TEXT, logits, None, batch.targets, dtype=self.dtype)
        return hidden.detach(), {place: state.detach() for place, state in states.items()}, loss
