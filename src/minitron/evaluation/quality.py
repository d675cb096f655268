"""Quality on held-out text: LM loss, perplexity, bits per byte, and KL and top-1 agreement with a teacher."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from minitron.core.config import Section, UserPath
from minitron.core.errors import CheckpointError, DataError
from minitron.core.numerics import matmul_precision
from minitron.data.corpus import Blocks, Corpus
from minitron.model.logits import LazyLogits, logit_transform, usual_chunk
from minitron.model.quality_sums import QualitySums, perplexity_of
from minitron.model.samples import Batch

DEFAULT_PROMPTS = ("Once upon a time", "The most important thing is", "def main(")


class EvaluateConfig(Section):
    blocks: int | None = Field(default=None, ge=1)
    """Held-out blocks to measure on, at most. Default: as many as hold 65,536 tokens."""
    batch: int = Field(default=8, ge=1)
    """Blocks per forward call."""
    prompts: list[str] = Field(default=list(DEFAULT_PROMPTS))
    """Prompts that teacher, pruned and student continue greedily, side by side in the report."""
    new_tokens: int = Field(default=60, ge=1)
    """Tokens generated for each prompt."""
    speed: bool = True
    """Whether to measure prefill and decode speed of teacher and student."""
    tasks: list[str] = Field(default=[])
    """Benchmarks of teacher and student: tasks of lm-evaluation-harness, folders of `tasks_dir`, or `minitron`, the
    nine of the papers. See docs/guide/evaluation.md."""
    tasks_dir: UserPath | None = None
    """Directory of local rows, one folder per task; without `tasks`, all of its tasks are measured."""
    limit: int | None = Field(default=None, ge=1)
    """Items of each task to measure on, at most; null for all."""
    allow_code: bool = False
    """Whether tasks may run code that the models write, in a sandbox."""

    @property
    def for_record(self) -> Mapping[str, object]:
        """The keys that evaluations depend on; a run without benchmarks does not name those of benchmarks."""
        return self.model_dump(mode="json", exclude=None if self.benchmarks else set(_OF_TASKS))

    @property
    def benchmarks(self) -> bool:
        return bool(self.tasks or self.tasks_dir)


MEASURED_TOKENS = 1 << 16


def usual_blocks(block_tokens: int) -> int:
    """Return the default number of held-out blocks to measure on."""
    return -(-MEASURED_TOKENS // block_tokens)


def measured_blocks(corpus: Corpus, blocks: int | None, *, whole: bool) -> Blocks:
    """Return the first held-out blocks: so many at most, else all with `whole`, else the default number."""
    return corpus.heldout.head(blocks if blocks or whole else usual_blocks(corpus.block_tokens))


_OF_TASKS = ("tasks", "tasks_dir", "limit", "allow_code")


@dataclass(frozen=True)
class Evaluation:
    """The quality of a model on held-out text: means over predicted tokens, losses in nats.

    Predicted is every token of a block but its first, or of a document where documents are kept apart.

    bits_per_byte: the loss over the bytes of the text, which compares models of different tokenizers; None where the
        bytes are not known.
    kl_to_teacher: KL(teacher || model); None without a teacher.
    top1_agreement: the share of tokens for which model and teacher predict the same next token.
    tokens: the number of predicted tokens.
    """

    lm_loss: float
    perplexity: float
    bits_per_byte: float | None
    kl_to_teacher: float | None
    top1_agreement: float | None
    tokens: int

    @classmethod
    def of(cls, sums: QualitySums, *, text_bytes: int, with_teacher: bool) -> "Evaluation":
        """The means of what an engine has summed."""
        return cls(
            lm_loss=sums.nats,
            perplexity=perplexity_of(sums.nats),
            bits_per_byte=sums.bits_per_byte(text_bytes),
            kl_to_teacher=sums.kl if with_teacher else None,
            top1_agreement=sums.top1 if with_teacher else None,
            tokens=sums.tokens,
        )

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


@torch.no_grad()
def measure_quality(
    model: Any,
    blocks: Blocks,
    *,
    teacher: Any = None,
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure a loaded model, running it in its own dtype with float32 logits.

    Args:
        teacher: a loaded model of the same vocabulary; None leaves KL and agreement out. Where one of the two has more
            rows, of padding, both are compared on the rows that both have.

    Raises: CheckpointError if the loss is not finite; DataError if no token is predicted.
    """
    sums, text_bytes = QualitySums(), 0
    device = next(model.parameters()).device
    for start in range(0, len(blocks), batch):
        rows = slice(start, start + batch)
        here = Batch(torch.from_numpy(blocks.select(rows)).to(device), blocks.separator)
        sums += _sums_of(_logits(model, here), None if teacher is None else _logits(teacher, here), here.targets)
        text_bytes += predicted_bytes(blocks, rows, here)
        progress(min(start + batch, len(blocks)), len(blocks))
    if sums.tokens == 0:
        raise DataError("no token of the held-out text is predicted: every document in it is a single token")
    if not math.isfinite(sums.nats):
        raise CheckpointError("the model's loss on held-out text is not finite: its weights are damaged")
    if not math.isfinite(sums.kl):
        raise CheckpointError("the KL to the teacher is not finite: the teacher's weights are damaged")
    return Evaluation.of(sums, text_bytes=text_bytes, with_teacher=teacher is not None)


def predicted_bytes(blocks: Blocks, rows: slice, batch: Batch) -> int:
    """The bytes of the text that the predicted tokens of some blocks spell; 0 where they are not known."""
    return 0 if blocks.bytes is None else int(blocks.bytes[rows][batch.predicted.cpu().numpy()].sum(dtype="int64"))


def _logits(model: Any, batch: Batch) -> LazyLogits:
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
    head = model.get_output_embeddings().weight
    # The head in float32 once, not once per chunk; the hidden states tell the model's own dtype.
    return LazyLogits(batch.predicting(hidden), head.float(), logit_transform(model))


def _sums_of(model: LazyLogits, teacher: LazyLogits | None, targets: Tensor) -> QualitySums:
    """The sums over one batch, a chunk of tokens at a time."""
    sums, chunk = QualitySums(), usual_chunk(model.head)
    with matmul_precision(model.hidden.dtype):
        for rows in (slice(start, start + chunk) for start in range(0, len(targets), chunk)):
            logits, kl, agreeing = model.rows(rows), 0.0, 0
            nats = torch.nn.functional.cross_entropy(logits, targets[rows], reduction="sum").item()
            if teacher is not None:
                reference = teacher.rows(rows)
                both = min(reference.shape[1], logits.shape[1])
                reference, logits = reference[:, :both], logits[:, :both]
                log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
                kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
                agreeing = int((logits.argmax(-1) == reference.argmax(-1)).sum())
            sums.add(len(targets[rows]), nats, kl=kl, agreeing=agreeing)
    return sums
