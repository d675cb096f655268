"""Which layers to drop: the loss of the model without some of them, measured in one streamed pass.

A variant is the model without some of its layers. All variants run in the same pass. As long as two variants have
dropped the same layers their states are the same, and are computed and stored once: the pass is a tree that branches
where variants begin to differ. So the L models without one layer each take half the time of L passes, and the weights
are read once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minitron.core.config import choice
from minitron.core.errors import CheckpointError, PlanError
from minitron.evaluation.tasks.questions import Question, encode
from minitron.model.checkpoint import Checkpoint
from minitron.model.likelihood import Scored, score_tokens
from minitron.model.samples import Batch, Samples
from minitron.model.stream import Pass, Stream

Variant = frozenset[int]  # the dropped layers
# The states of all variants in one pass. Where they take more, samples are split and the weights are read again.
VARIANT_STATES_BYTES = 16 << 30


@dataclass(frozen=True)
class Likelihoods:
    """For the scored tokens of each sample, the sum of log-likelihoods in nats, and whether each token was the most
    likely one of the vocabulary."""

    nats: Float[Tensor, "variants samples"]
    greedy: Bool[Tensor, "variants samples"]


# The losses of variants, in any unit: [variants].
Measure = Callable[[Sequence[Variant]], Tensor]


def leave_one_out(measure: Measure, num_layers: int) -> Float[Tensor, " layers"]:
    """How much the loss rises without each layer.

    Paper: P1, "Importance Analysis", for the LM loss; P2, "Layer Importance", for the accuracy in a task.
    """
    measured = measure([frozenset(), *(frozenset([layer]) for layer in range(num_layers))])
    return measured[1:] - measured[0]


def contiguous_blocks(measure: Measure, num_layers: int, num_dropped: int) -> Float[Tensor, " layers"]:
    """How much the loss rises without the best block of `num_dropped` consecutive layers that contains a layer.

    So the layers with the lowest score are the block that costs least. The last layer is in no block and has an
    infinite score: P2 keeps it.

    Raises: PlanError if there is no such block.
    """
    starts = range(num_layers - num_dropped)
    if not 0 < num_dropped < num_layers:
        raise PlanError(f"a block of {num_dropped} layers cannot be dropped from {num_layers}, of which the last stays")
    measured = measure([frozenset(), *(frozenset(range(start, start + num_dropped)) for start in starts)])
    scores = torch.full((num_layers,), torch.inf, dtype=torch.float64)
    for start, loss in zip(starts, measured[1:] - measured[0], strict=True):
        block = slice(start, start + num_dropped)
        scores[block] = scores[block].minimum(loss)
    return scores


@dataclass(frozen=True)
class LayerCriterion:
    """A row of LAYER_CRITERIA.

    reads: the data for the scores. `statistics`: the statistics of the calibration contain the scores; `text`: the LM
        loss on calibration blocks; `questions`: the share of wrong answers to the questions of `prune.layer_task`.
    score: a function from a Measure, the number of layers and, with `drops`, the number of dropped layers to scores;
        None where the statistics contain the scores.
    title: the name of the criterion in the report.
    meaning: what a layer's bar in the report shows.
    unit: the unit of the bar's length.
    drops: whether scores depend on the number of dropped layers.
    """

    reads: Literal["statistics", "text", "questions"]
    score: Callable[..., Float[Tensor, " layers"]] | None
    title: str
    meaning: str
    unit: str
    doc: str
    drops: bool = False

    @property
    def needs_a_pass(self) -> bool:
        """Whether the teacher is read once more to score its layers."""
        return self.reads != "statistics"


LAYER_CRITERIA: dict[str, LayerCriterion] = {
    "block_influence": LayerCriterion(
        "statistics",
        None,
        title="Block Influence",
        meaning="1 - cosine between a layer’s input and output",  # noqa: RUF001
        unit="Block Influence",
        doc="by the cosine between input and output, which costs nothing",
    ),
    "loss": LayerCriterion(
        "text",
        leave_one_out,
        title="LM loss without each layer",
        meaning="by how much the loss rises without a layer",
        unit="nats per token",
        doc="by the LM loss without each one",
    ),
    "contiguous": LayerCriterion(
        "text",
        contiguous_blocks,
        title="LM loss without each block of neighbours",
        meaning="by how much the loss rises without the best block that a layer is part of; the last layer has no bar, "
        "for it always stays",
        unit="nats per token",
        doc="by the LM loss without each block of neighbours, of which one is dropped",
        drops=True,
    ),
    "task": LayerCriterion(
        "questions",
        leave_one_out,
        title="accuracy in a task without each layer",
        meaning="the share of answers lost without a layer",
        unit="accuracy lost",
        doc="by the accuracy in `layer_task` without each one",
    ),
}
LayerCriterionName = Annotated[str, choice(LAYER_CRITERIA)]


def layer_criteria_that_read(*kinds: Literal["statistics", "text", "questions"]) -> list[str]:
    """The names of the layer criteria that read one of these kinds of data."""
    return [name for name, criterion in LAYER_CRITERIA.items() if criterion.reads in kinds]


def by_loss(checkpoint: Checkpoint, samples: Samples, pass_: Pass) -> Measure:
    """The LM loss in nats per token."""
    scored = Batch(samples.tokens, samples.separator).predicted

    def measure(variants: Sequence[Variant]) -> Tensor:
        found = likelihoods(checkpoint, samples, scored, variants, pass_)
        losses = -found.nats.sum(1) / scored.sum()
        if not losses.isfinite().all():
            raise CheckpointError(f"{checkpoint.path}: the loss of the model is not finite: its weights are damaged")
        return losses

    return measure


def by_task(
    checkpoint: Checkpoint, questions: Sequence[Question], tokenizer: Any, max_tokens: int, pass_: Pass
) -> Measure:
    """The share of questions that are answered wrong."""
    rows = encode(questions, tokenizer, max_tokens)

    def measure(variants: Sequence[Variant]) -> Tensor:
        found = likelihoods(checkpoint, Samples(rows.tokens), rows.scored, variants, pass_)
        results = [
            zip(nats, greedy, strict=True)
            for nats, greedy in zip(found.nats.tolist(), found.greedy.tolist(), strict=True)
        ]
        grades = [[question.grade([next(of) for _ in question.requests]) for question in questions] for of in results]
        return 1 - torch.tensor(grades, dtype=torch.float64).mean(1)

    return measure


def likelihoods(
    checkpoint: Checkpoint,
    samples: Samples,
    scored: Bool[Tensor, "samples tokens"],
    variants: Sequence[Variant],
    pass_: Pass,
) -> Likelihoods:
    """The likelihoods of the scored tokens under each variant, in one streamed pass.

    Args:
        scored: True for the tokens to score: no first token of a sample and no pad. Pads are on the right.
    """
    assert not scored[:, 0].any()
    shape = checkpoint.shape
    most = max(len(_prefixes(variants, layer)) for layer in range(shape.layers + 1))
    of_sample = most * samples.block_tokens * shape.hidden * pass_.dtype.itemsize
    parts = samples.tokens.split(max(pass_.batch_of(shape, samples), VARIANT_STATES_BYTES // of_sample))
    found, start = [], 0
    for number, part in enumerate(parts):
        stream = Stream(checkpoint, Samples(part, samples.separator), pass_, num_states=most)
        before = number * shape.layers
        states_of: dict[Variant, Tensor] = {}
        for layer, after_layer in enumerate(_after_layers(stream, variants), start=1):
            states_of = after_layer
            pass_.progress(before + layer, len(parts) * shape.layers)
        sums = _of_samples(stream, list(states_of.values()), scored[start : start + len(part)])
        order = [list(states_of).index(variant) for variant in variants]
        found.append(Likelihoods(sums.nats[order], sums.greedy[order]))
        start += len(part)
    return Likelihoods(torch.cat([part.nats for part in found], 1), torch.cat([part.greedy for part in found], 1))


def _prefixes(variants: Sequence[Variant], layer: int) -> set[Variant]:
    """The sets of layers that variants have dropped before a layer."""
    return {frozenset(dropped for dropped in variant if dropped < layer) for variant in variants}


def _after_layers(stream: Stream, variants: Sequence[Variant]) -> Iterator[dict[Variant, Tensor]]:
    """After each layer, the states of variants by the layers that they have dropped so far."""
    stream.embed()
    branches: dict[Variant, Tensor] = {frozenset(): stream.states}
    for index, layer in stream.layers():
        wanted = _prefixes(variants, index + 1)
        after = {}
        for dropped, states in branches.items():
            if dropped | {index} in wanted:
                after[dropped | {index}] = stream.more_states().copy_(states) if dropped in wanted else states
            if dropped in wanted:
                stream.advance(index, layer, states)
                after[dropped] = states
        branches = after
        yield branches


def _of_samples(stream: Stream, branches: Sequence[Tensor], scored: Bool[Tensor, "samples tokens"]) -> Likelihoods:
    """The likelihoods from the states after the last layer, which are overwritten."""
    sample, position = scored[:, 1:].nonzero(as_tuple=True)
    nats, greedy = score_tokens(stream, branches, Scored(sample, position, stream.tokens[:, 1:][scored[:, 1:]]))
    sums = torch.zeros(len(branches), len(scored), dtype=torch.float64).index_add_(1, sample, nats)
    missed = torch.zeros(len(branches), len(scored)).index_add_(1, sample, (~greedy).float())
    return Likelihoods(sums, missed == 0)
