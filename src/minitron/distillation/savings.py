"""The settings of a training whose step fits a memory: the least costly of those that take less.

A new way to save memory takes a row of SAVINGS.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from minitron.distillation.config import DistillConfig
from minitron.distillation.losses import LOSSES
from minitron.distillation.optim import OPTIMIZERS
from minitron.distillation.schedule import USUAL_OPTIMIZERS
from minitron.distillation.step import blocks_at_once

Changes = Mapping[str, Any]  # settings of `distill`, by name


def _smaller_micro_batches(config: DistillConfig, block_tokens: int) -> Iterator[Changes]:
    assert config.batch_blocks is not None
    at_once = min(config.batch_blocks, blocks_at_once(config.micro_batch_tokens, block_tokens))
    while at_once > 1:
        at_once //= 2
        yield {"micro_batch_tokens": at_once * block_tokens}


def _checkpointed(config: DistillConfig, block_tokens: int) -> Iterator[Changes]:
    if not config.activation_checkpointing:
        yield {"activation_checkpointing": True}


def _lighter_optimizers(config: DistillConfig, block_tokens: int) -> Iterator[Changes]:
    if config.optimizer in USUAL_OPTIMIZERS:
        for name in USUAL_OPTIMIZERS[USUAL_OPTIMIZERS.index(config.optimizer) + 1 :]:
            yield {"optimizer": name}


def _bfloat16_weights(config: DistillConfig, block_tokens: int) -> Iterator[Changes]:
    if config.weights == "float32":
        (optimizer,) = (name for name, row in OPTIMIZERS.items() if "bfloat16_stochastic" in row.in_bfloat16)
        yield {"weights": "bfloat16_stochastic", "optimizer": optimizer, "precision": "bfloat16"}


def _recorded_teacher(config: DistillConfig, block_tokens: int) -> Iterator[Changes]:
    whole = any(LOSSES[name].reads == "logits" for name in config.objective.terms)
    if config.teacher == "online" and config.objective.needs_teacher and not whole and config.correction != "parallel":
        yield {"teacher": "recorded", "intermediate": "off"}


# Name -> the changes that it makes to resolved settings with blocks of so many tokens, one after the other, each with
# more effect than the one before. In the order of what they cost: the first two change the student by rounding alone.
SAVINGS: dict[str, Callable[[DistillConfig, int], Iterator[Changes]]] = {
    "micro_batches": _smaller_micro_batches,
    "checkpointing": _checkpointed,
    "optimizer": _lighter_optimizers,
    "weights": _bfloat16_weights,
    "recorded": _recorded_teacher,
}


def fitted(
    config: DistillConfig,
    block_tokens: int,
    memory: int,
    *,
    takes: Callable[[Changes], int],
    at_least: Callable[[Changes], int],
    kept: Collection[str] = (),
) -> dict[str, Any]:
    """Choose the changes with which a step takes at most `memory` bytes, or else those with which it takes the least.

    Savings are added in the order of SAVINGS until the step fits; then those that it does not need beside the last one
    are taken back, the most costly first.

    Args:
        config: resolved settings, which do not fit.
        takes: the bytes of a step with changed settings, which takes seconds to find; it is asked about what is chosen.
        at_least: fewer bytes than that, which are known at once.
        kept: settings that must stay as they are.
    """
    chosen: dict[str, Changes] = {}

    def fits(some: Mapping[str, Changes]) -> bool:
        changes = _together(some.values())
        return at_least(changes) <= memory and takes(changes) <= memory

    for name, changes in _possible(config, block_tokens, kept):
        chosen[name] = {**chosen.get(name, {}), **changes}
        if fits(chosen):
            break
    else:
        takes(_together(chosen.values()))
        return _together(chosen.values())
    for name in [*chosen][-2::-1]:
        fewer = {other: changes for other, changes in chosen.items() if other != name}
        chosen = fewer if fits(fewer) else chosen
    return _together(chosen.values())


def changed_by_savings(config: DistillConfig, block_tokens: int) -> set[str]:
    """Return the settings that savings would change, whoever set them."""
    return {key for _, changes in _possible(config, block_tokens, ()) for key in changes}


def _possible(config: DistillConfig, block_tokens: int, kept: Collection[str]) -> Iterator[tuple[str, Changes]]:
    """Yield savings with their changes, without those of settings that must stay."""
    for name, saving in SAVINGS.items():
        for changes in saving(config, block_tokens):
            new = {key: value for key, value in changes.items() if getattr(config, key) != value}
            if not new.keys() & set(kept):
                yield name, new


def _together(changes: Iterable[Changes]) -> dict[str, Any]:
    """Return several changes as one, of which the later ones count."""
    return {key: value for each in changes for key, value in each.items()}
