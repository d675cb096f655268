"""What a teacher says of a batch: logits, and states between layers where they are asked for."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from minitron.core import parallel
from minitron.core.errors import MinitronError
from minitron.distillation.compiling import compile_layers
from minitron.distillation.losses import TopK
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.hidden_states import capture_hidden_states, decoder_layers
from minitron.model.logits import LazyLogits, logit_transform
from minitron.model.samples import Batch
from minitron.model.sharded import load_for_training, shard_into
from minitron.model.tokenizer import load_tokenizer
from minitron.model.tokens import num_rows_needed


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says of every token of a batch that another is predicted from."""

    logits: LazyLogits | TopK
    # Of all tokens, at the places asked for: 0 is what enters the first layer, n what leaves the nth.
    states: Mapping[int, Float[Tensor, "blocks tokens hidden"]] = field(default_factory=dict)


Teacher = Callable[[Batch], TeacherOutput]


class OnlineTeacher:
    """A model in memory."""

    def __init__(
        self,
        path: Path,
        student: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        places: Collection[int] = (),
        compiled: bool = False,
    ):
        """
        Args:
            places: of the states in its lessons.
            compiled: its layers, with torch.compile.

        Raises: MinitronError if logits of the two models cannot be compared.
        """
        teacher = open_checkpoint(path)
        require_same_vocabulary(teacher, student)
        self.model = load_for_training(teacher, dtype).requires_grad_(False)
        self.layers, self.places = decoder_layers(self.model, teacher), places
        if compiled:
            compile_layers(self.layers)
        shard_into(self.model.base_model, self.model, self.layers, teacher, dtype, device)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        with capture_hidden_states(self.layers, self.places) as states:
            made = self.model.base_model(**batch.inputs, use_cache=False)
        hidden = batch.predicting(made.last_hidden_state)
        logits = LazyLogits(
            hidden, parallel.full(self.model.get_output_embeddings().weight), logit_transform(self.model)
        )
        return TeacherOutput(logits, states)


def require_same_vocabulary(teacher: Checkpoint, student: Checkpoint, *, padding: bool = False) -> None:
    """
    Args:
        padding: whether their embeddings may differ in rows that no token of their tokenizer has.

    Raises: MinitronError if logits of the two models cannot be compared.
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
    """A student whose directory has no tokenizer is taken to have its teacher's; False for both without one.

    Raises: MinitronError if a token is another text to one of them.
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
