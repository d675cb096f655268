"""The teachers of a distillation: a model in memory, which may go on learning, or logits that were recorded."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitron.core import parallel
from minitron.core.errors import MinitronError
from minitron.distillation.chunked import chunked_loss
from minitron.distillation.config import DistillConfig
from minitron.distillation.hidden_loss import pairs_of
from minitron.distillation.objective import Objective, TeacherOutput
from minitron.distillation.recording import RecordedTeacher
from minitron.distillation.setup import compile_layers, products_in, trainable_model
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.hidden_states import capture_hidden_states, decoder_layers
from minitron.model.logits import LazyLogits, logit_transform
from minitron.model.samples import Batch
from minitron.model.sharded import load_for_training, shard_into
from minitron.model.tokenizer import load_tokenizer
from minitron.model.tokens import num_rows_needed

Teacher = Callable[[Batch], TeacherOutput]
ON_TEXT = Objective({"cross_entropy": 1.0})


@dataclass(frozen=True)
class TeacherSource:
    """The source of a student's teacher: a checkpoint, or a directory of recorded logits.

    Without both, the student is trained on the text alone.
    """

    checkpoint: Path | None = None
    recording: Path | None = None

    def opened(self) -> Checkpoint | None:
        """Open the checkpoint, where there is one."""
        return None if self.checkpoint is None else open_checkpoint(self.checkpoint)


def open_teacher(
    teacher: Checkpoint | None,
    recording: Path | None,
    student: Checkpoint,
    config: DistillConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Teacher | None:
    """Open the teacher that the settings ask for; return None where no loss of the objective asks a teacher.

    Args:
        recording: the directory of a teacher's recorded logits, which teach instead of the model.

    Raises: MinitronError if its logits cannot be compared with the student's.
    """
    if not config.objective.needs_teacher:
        return None
    if recording is not None:
        return _recorded(recording, student, config, device)
    if teacher is None:
        return None
    require_same_vocabulary(teacher, student)
    depths = [of_teacher for _, of_teacher in pairs_of(config.intermediate or "off", student.shape, teacher.shape)]
    if config.correction == "parallel":
        return LearningTeacher(trainable_model(teacher, config), teacher, dtype, device, depths=depths)
    return OnlineTeacher(teacher, dtype, device, depths=depths, compiled=bool(config.compile))


def _recorded(path: Path, student: Checkpoint, config: DistillConfig, device: torch.device) -> Teacher:
    recorded = RecordedTeacher(path, device)
    needs = {"vocab": student.shape.vocab, "temperature": config.temperature, "top_k": config.top_k}
    for name, wanted in needs.items():
        found = getattr(recorded.facts, name)
        if found != wanted:
            raise MinitronError(
                f"the logits recorded in {path} have {name} {found}, and {wanted} is wanted: record them again"
            )
    return recorded


class OnlineTeacher:
    """A teacher in memory, whose weights stay as they are."""

    def __init__(
        self,
        teacher: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        depths: Collection[int] = (),
        compiled: bool = False,
    ):
        """Load the teacher.

        Args:
            depths: of the hidden states that its output holds.
            compiled: run its layers with torch.compile.
        """
        self.model = load_for_training(teacher, dtype).requires_grad_(False)
        self.layers, self.depths = decoder_layers(self.model, teacher), depths
        if compiled:
            compile_layers(self.layers)
        shard_into(self.model.base_model, self.model, self.layers, teacher, dtype, device)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        with capture_hidden_states(self.layers, self.depths) as states:
            made = self.model.base_model(**batch.inputs, use_cache=False)
        hidden = batch.predicting(made.last_hidden_state)
        head = parallel.full(self.model.get_output_embeddings().weight)
        return TeacherOutput(LazyLogits(hidden, head, logit_transform(self.model)), states)


class LearningTeacher:
    """A teacher in memory that is trained on the text while it teaches.

    Its output is that of its weights at that moment. `learn` adds up gradients; the training loop makes the steps.

    Paper: P2, "Teacher correction": the teacher was pretrained on other text than the distillation reads, so it is
    trained on that text too, which may go on beside the distillation.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        depths: Collection[int] = (),
    ):
        """Take over a model.

        Args:
            model: the checkpoint's, see `load_for_training`.
            dtype: of its matrix products.
            depths: of the hidden states that its output holds.
        """
        self.checkpoint = checkpoint
        layers = decoder_layers(model, checkpoint)
        self.module = _TeacherModule(model, layers, dtype, depths)
        shard_into(self.module, model, layers, checkpoint, dtype, device)
        # Output and gradient come from one forward pass, so it has no dropout. A layer that is in training itself,
        # while its parts are not, only does what activation checkpointing asks for.
        self.module.eval()
        for layer in layers:
            layer.training = True

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        hidden, states, _ = self.module(batch, with_loss=False)
        return self._output(hidden, states)

    def learn(self, batch: Batch, weight: float, num_predicted: int) -> tuple[TeacherOutput, Float[Tensor, ""]]:
        """Return the output of a call, and the sum of the cross-entropy over the batch's tokens, in nats.

        The gradient of that sum, times `weight` and divided by `num_predicted`, is added to the parameters'.
        """
        hidden, states, loss = self.module(batch, with_loss=True)
        (weight * loss / num_predicted).backward()
        return self._output(hidden, states), loss.detach()

    def parameters(self) -> dict[str, Tensor]:
        """The trained parameters by their names."""
        return dict(self.module.named_parameters())

    def _output(self, hidden: Tensor, states: Mapping[int, Tensor]) -> TeacherOutput:
        head = parallel.full(self.module.model.get_output_embeddings().weight).detach()
        return TeacherOutput(LazyLogits(hidden, head, self.module.transform), states)


class _TeacherModule(nn.Module):
    """A forward pass to the last hidden states, the hidden states at some depths, and the cross-entropy.

    Both kinds of states come without their history.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module], dtype: torch.dtype, depths: Collection[int]):
        super().__init__()
        self.model, self.dtype, self.transform = model, dtype, logit_transform(model)
        self.layers, self.depths = list(layers), depths

    def forward(self, batch: Batch, *, with_loss: bool) -> tuple[Tensor, dict[int, Tensor], Tensor | None]:
        with products_in(self.dtype, batch.tokens.device), capture_hidden_states(self.layers, self.depths) as states:
            made = self.model.base_model(**batch.inputs, use_cache=False)
        hidden, loss = batch.predicting(made.last_hidden_state), None
        if with_loss:
            logits = LazyLogits(hidden, self.model.get_output_embeddings().weight, self.transform)
            loss = chunked_loss(ON_TEXT, logits, None, batch.targets, dtype=self.dtype)
        return hidden.detach(), {depth: state.detach() for depth, state in states.items()}, loss


def require_same_vocabulary(teacher: Checkpoint, student: Checkpoint, *, padding: bool = False) -> None:
    """Refuse two models whose logits cannot be compared token by token.

    Args:
        padding: whether their embeddings may differ in rows that no token of their tokenizer has.

    Raises: MinitronError.
    """
    ours, theirs = student.shape.vocab, teacher.shape.vocab
    if ours == theirs:
        return
    differ = f"teacher and student vocabularies differ: {teacher.path} has {theirs} tokens, {student.path} has {ours}"
    same = require_same_tokenizer(teacher, student) and num_rows_needed(load_tokenizer(teacher.path)) <= min(
        ours, theirs
    )
    if not same:
        raise MinitronError(f"{differ}; KL compares logits token by token, so they must be the same")
    if not padding:
        raise MinitronError(
            f"{differ}, of which only rows of padding differ: the tokenizer is the same; bring both to one size with "
            f"transformers, model.resize_token_embeddings({min(ours, theirs)}), or cut the student from this teacher"
        )


def require_same_tokenizer(teacher: Checkpoint, student: Checkpoint) -> bool:
    """Refuse two models to which a token is not the same text; return whether there is a tokenizer to compare by.

    A student whose directory has no tokenizer is taken to have its teacher's.

    Raises: MinitronError.
    """
    if not any(student.path.glob("tokenizer*")):
        return any(teacher.path.glob("tokenizer*"))
    ours, theirs = (load_tokenizer(checkpoint.path).get_vocab() for checkpoint in (student, teacher))
    texts = sorted(theirs.keys() | ours.keys(), key=lambda text: theirs.get(text, ours.get(text)))
    for text in texts:
        if theirs.get(text) != ours.get(text):
            raise MinitronError(
                f"teacher and student have different tokenizers: {text!r} is token {theirs.get(text)} of "
                f"{teacher.path} and {ours.get(text)} of {student.path}; KL compares logits token by token, so give a "
                "student that was cut from this teacher, or one with its tokenizer"
            )
    return True
