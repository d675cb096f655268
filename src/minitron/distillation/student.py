"""The student while it is taught: a module whose forward pass gives the loss of a batch."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from minitron.core import parallel
from minitron.distillation.chunked import chunked_loss
from minitron.distillation.hidden_loss import HiddenLoss, pairs_of
from minitron.distillation.objective import Objective, TeacherOutput
from minitron.distillation.optim import hold_weights
from minitron.distillation.schedule import Schedule
from minitron.distillation.setup import products_in, trainable_model
from minitron.model.checkpoint import Checkpoint
from minitron.model.hidden_states import capture_hidden_states, decoder_layers
from minitron.model.logits import LazyLogits, logit_transform
from minitron.model.samples import Batch


class StudentModule(nn.Module):
    """The trained parameters: the student's and, where hidden states of other widths are compared, the maps'."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[nn.Module],
        objective: Objective,
        intermediate: HiddenLoss | None,
        dtype: torch.dtype,
    ):
        """Take over a model.

        Args:
            layers: the model's decoder layers.
            dtype: of the student's matrix products; hidden states and losses are float32, whatever the weights are.
        """
        super().__init__()
        model.get_input_embeddings().register_forward_hook(lambda module, arguments, states: states.float())
        self.model, self.intermediate, self.layers = model, intermediate, list(layers)
        self.objective, self.dtype, self.transform = objective, dtype, logit_transform(model)

    def forward(self, batch: Batch, output: TeacherOutput | None, *, fitting: bool = False) -> Any:
        """Return the objective, and while training the loss on hidden states, each as a sum over tokens.

        The second is 0 where no hidden states are compared.

        Args:
            output: the teacher's, for the same batch.
            fitting: return the batch's `HiddenLoss.products` instead. They are made here, for parameters that are
                sharded among processes are whole only while this runs.
        """
        intermediate = self.intermediate if self.training or fitting else None
        depths = [] if intermediate is None else [depth for depth, _ in intermediate.pairs]
        with products_in(self.dtype, batch.tokens.device), capture_hidden_states(self.layers, depths) as states:
            hidden = self.model.base_model(**batch.inputs, use_cache=False).last_hidden_state
        if fitting:
            assert intermediate is not None and output is not None
            return intermediate.products(states, output.hidden_states)
        loss = chunked_loss(
            self.objective,
            LazyLogits(batch.predicting(hidden), self.model.get_output_embeddings().weight, self.transform),
            None if output is None else output.logits,
            batch.targets,
            dtype=self.dtype,
        )
        if intermediate is None:
            return loss, torch.zeros_like(loss)
        assert output is not None
        return loss, intermediate(states, output.hidden_states)

    @torch.no_grad()
    def fit_maps(self, outputs: Iterable[tuple[Batch, TeacherOutput, float]]) -> None:
        """Start the maps, if there are any, as the least-squares fit on these batches, those of all processes.

        Args:
            outputs: batches, the teacher's outputs for them, and their weights.
        """
        if self.intermediate is None or not self.intermediate.maps:
            return
        products = torch.stack([weight * self(batch, output, fitting=True) for batch, output, weight in outputs]).sum(0)
        parallel.all_reduce_sum(products)
        for linear, weight in zip(self.intermediate.maps, self.intermediate.fitted(products), strict=True):
            linear.weight.copy_(parallel.shard_like(weight, linear.weight))


def student_module(
    checkpoint: Checkpoint, teacher: Checkpoint | None, schedule: Schedule, dtype: torch.dtype
) -> StudentModule:
    """Make the student of a checkpoint, set up to be trained; hidden states are compared with those of the teacher."""
    config, shape, intermediate = schedule.config, checkpoint.shape, None
    model = trainable_model(checkpoint, config, schedule.initialize, schedule.seed)
    if config.intermediate not in (None, "off"):
        assert teacher is not None, "hidden states are those of a teacher in memory"
        pairs = pairs_of(config.intermediate, shape, teacher.shape)
        intermediate = HiddenLoss(pairs, shape, teacher.shape, centred=checkpoint.architecture.centred_norms)
        hold_weights(intermediate, config.weights)  # FSDP shards parameters of one format only
    return StudentModule(model, decoder_layers(model, checkpoint), config.objective, intermediate, dtype)
