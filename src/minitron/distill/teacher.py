"""What a teacher says of a batch: logits, and states between layers where they are asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from minitron import parallel
from minitron.distill.losses import TopK
from minitron.errors import MinitronError
from minitron.model.checkpoint import Checkpoint, load_model, open_checkpoint
from minitron.model.logits import LazyLogits, logit_transform
from minitron.packing import Batch


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of every token of a batch that another is predicted from."""

    logits: LazyLogits | TopK
    states: Sequence[Float[Tensor, "blocks tokens hidden"]] | None = None  # of the embedding and each layer, all tokens


Teacher = Callable[[Batch], Lesson]


class OnlineTeacher:
    """A model in memory."""

    def __init__(self, path: Path, student: Checkpoint, dtype: torch.dtype, device: torch.device, *, states: bool):
        """
        Args:
            states: whether its lessons have states.

        Raises: MinitronError if logits of the two models cannot be compared.
        """
        require_same_vocabulary(open_checkpoint(path), student)
        teacher = open_checkpoint(path)
        self.model = load_model(path, dtype).requires_grad_(False)
        layers = (teacher.architecture.layer.format(layer=layer) for layer in range(teacher.shape.layers))
        parallel.shard(self.model.base_model, map(self.model.get_submodule, layers), dtype, device)
        self.model.to(device)
        self.states = states

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Lesson:
        made = self.model.base_model(**batch.inputs, use_cache=False, output_hidden_states=self.states)
        hidden = batch.predicting(made.last_hidden_state)
        logits = LazyLogits(
            hidden, parallel.whole(self.model.get_output_embeddings().weight), logit_transform(self.model)
        )
        return Lesson(logits, made.hidden_states if self.states else None)


def require_same_vocabulary(teacher: Checkpoint, student: Checkpoint) -> None:
    """Raises: MinitronError if logits of the two models cannot be compared."""
    if teacher.shape.vocab != student.shape.vocab:
        raise MinitronError(
            f"teacher and student vocabularies differ: {teacher.path} has {teacher.shape.vocab} tokens, "
            f"{student.path} has {student.shape.vocab}; KL compares logits token by token, so they must be the same"
        )
