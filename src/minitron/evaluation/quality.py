"""Quality on held-out text: LM loss, perplexity, bits per byte, and KL and top-1 agreement with a teacher."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from minitron.core.config import Section, UserPath
from minitron.core.errors import CheckpointError, DataError
from minitron.data.corpus import Blocks
from minitron.model.logits import LazyLogits, logit_transform, matmul_precision, usual_chunk
from minitron.model.samples import Batch

DEFAULT_PROMPTS = ("Once upon a time", "The most important thing is", "def main(")


class EvaluateConfig(Section):
    blocks: int | None = Field(default=512, ge=1)
    """Held-out blocks to measure on; null for all."""
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
    def for_record(self) -> dict[str, Any]:
        """What evaluations are; those of runs without benchmarks do not name them."""
        return self.model_dump(mode="json", exclude=None if self.benchmarks else set(_OF_TASKS))

    @property
    def benchmarks(self) -> bool:
        return bool(self.tasks or self.tasks_dir)


_OF_TASKS = ("tasks", "tasks_dir", "limit", "allow_code")


@dataclass(frozen=True)
class Evaluation:
    """Means over predicted tokens: every token of a block but its first, or of a document where documents are kept
    apart. Losses in nats.

    `bits_per_byte` compares models of different tokenizers; None where the text's bytes are not known.
    """

    lm_loss: float
    perplexity: float
    bits_per_byte: float | None
    kl_to_teacher: float | None
    top1_agreement: float | None
    tokens: int

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
            rows, of padding, both are compared on those that both have.

    Raises: CheckpointError if the loss is not finite; DataError if no token is predicted.
    """
    sums = torch.zeros(3, dtype=torch.float64)  # nats, KL, agreeing tokens
    count = text_bytes = 0
    device = next(model.parameters()).device
    for start in range(0, len(blocks), batch):
        rows = slice(start, start + batch)
        here = Batch(torch.from_numpy(blocks.select(rows)).to(device), blocks.separator)
        targets = here.targets
        sums += _token_sums(_logits(model, here), None if teacher is None else _logits(teacher, here), targets)
        count += len(targets)
        if blocks.bytes is not None:
            text_bytes += int(blocks.bytes[rows][here.predicted.cpu().numpy()].sum(dtype="int64"))
        progress(min(start + batch, len(blocks)), len(blocks))
    if count == 0:
        raise DataError("no token of the held-out text is predicted: every document in it is a single token")
    nats, kl, agreeing = (sums / count).tolist()
    if not math.isfinite(nats):
        raise CheckpointError("the model's loss on held-out text is not finite: its weights are damaged")
    if not math.isfinite(kl):
        raise CheckpointError("the KL to the teacher is not finite: the teacher's weights are damaged")
    return Evaluation(
        lm_loss=nats,
        perplexity=math.exp(nats) if nats < 700 else math.inf,
        bits_per_byte=nats * count / math.log(2) / text_bytes if text_bytes else None,
        kl_to_teacher=None if teacher is None else kl,
        top1_agreement=None if teacher is None else agreeing,
        tokens=count,
    )


def _logits(model: Any, batch: Batch) -> LazyLogits:
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
    head = model.get_output_embeddings().weight
    # The head in float32 once, not once per chunk; the hidden states tell the model's own dtype.
    return LazyLogits(batch.predicting(hidden), head.float(), logit_transform(model))


def _token_sums(model: LazyLogits, teacher: LazyLogits | None, targets: Tensor) -> Tensor:
    sums = torch.zeros(3, dtype=torch.float64)
    chunk = usual_chunk(model.head)
    with matmul_precision(model.hidden.dtype):
        for rows in (slice(start, start + chunk) for start in range(0, len(targets), chunk)):
            logits = model.rows(rows)
            sums[0] += torch.nn.functional.cross_entropy(logits, targets[rows], reduction="sum").item()
            if teacher is not None:
                reference = teacher.rows(rows)
                both = min(reference.shape[1], logits.shape[1])
                reference, logits = reference[:, :both], logits[:, :both]
                log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
                sums[1] += torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
                sums[2] += (logits.argmax(-1) == reference.argmax(-1)).sum().item()
    return sums
