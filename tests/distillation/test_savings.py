"""The settings that are chosen for a memory fit it, none of them could be left out, and the user's own stay."""

import itertools
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import tiny
import torch
from trainings import resolved

from minitron.distillation.config import DistillConfig
from minitron.distillation.memory import step_memory
from minitron.distillation.savings import SAVINGS, Changes, fitted
from minitron.distillation.schedule import Schedule
from minitron.model.architecture import Shape, with_sizes
from minitron.model.checkpoint import open_checkpoint, planned_checkpoint

SHAPE = Shape(layers=2, hidden=32, ffn=64, heads=4, kv_heads=2, head_dim=8, vocab=99)
BLOCK = 64
SETTINGS = {"tokens": 100 * BLOCK, "batch_blocks": 8, "compile": False}
OPTIMIZERS = {"soap": 80, "soap_light": 70, "adamw": 40}


def config(**settings: Any) -> DistillConfig:
    given = DistillConfig(**(SETTINGS | {"optimizer": "soap", "precision": "bfloat16"} | settings))
    return resolved(given, SHAPE, SHAPE, block_tokens=BLOCK, train_tokens=100 * BLOCK)


def sum_of(draw: random.Random) -> Callable[[DistillConfig], int]:
    """A memory that is a sum over settings, each with a weight of its own."""
    weights = {key: draw.randint(0, 40) for key in ("activations", "student", "teacher")}

    def taken(config: DistillConfig) -> int:
        blocks = config.micro_batch_tokens // BLOCK
        halves = 2 if config.weights == "float32" else 1
        kept = 1 if config.activation_checkpointing else 4
        online = config.teacher == "online"
        return (
            weights["activations"] * kept * blocks // 4
            + weights["student"] * halves
            + OPTIMIZERS[config.optimizer or ""] * halves
            + weights["teacher"] * online
        )

    return taken


@pytest.mark.parametrize("seed", range(20))
def test_what_is_chosen_fits_and_none_of_it_could_be_left_out(seed: int) -> None:
    draw, asked = random.Random(seed), config(micro_batch_tokens=8 * BLOCK)
    taken = sum_of(draw)

    def takes(changes: Mapping[str, Any]) -> int:
        return taken(asked.model_copy(update=dict(changes)))

    def at_least(changes: Mapping[str, Any]) -> int:
        return takes(changes) // 2

    least = min(takes(changes) for changes in every_set_of_changes(asked))
    for memory in sorted({least - 1, least, *(draw.randint(least, takes({})) for _ in range(8))}):
        found = fitted(asked, BLOCK, memory, takes=takes, at_least=at_least)
        assert takes(found) == least if memory < least else takes(found) <= memory
        if memory < least:
            continue
        for name in SAVINGS:
            keys = {key for changes in SAVINGS[name](asked, BLOCK) for key in changes}
            fewer = {key: value for key, value in found.items() if key not in keys}
            goes_with_weights = name == "optimizer" and "weights" in found
            assert fewer == found or goes_with_weights or takes(fewer) > memory


def every_set_of_changes(asked: DistillConfig) -> list[Changes]:
    """One change, or none, of each saving; the later ones count."""
    rows = [[{}, *saving(asked, BLOCK)] for saving in SAVINGS.values()]
    return [{key: value for each in chosen for key, value in each.items()} for chosen in itertools.product(*rows)]


def test_settings_that_must_stay_are_never_among_the_changes() -> None:
    for kept in SETTINGS.keys() | {"activation_checkpointing", "optimizer", "weights", "teacher", "micro_batch_tokens"}:
        found = fitted(config(), BLOCK, 0, takes=lambda changes: 1, at_least=lambda changes: 1, kept=[kept])
        assert found and kept not in found


@pytest.mark.parametrize(
    ("settings", "never"),
    [
        ({"loss": "mse"}, "teacher"),
        ({"correction": "parallel"}, "teacher"),
        ({"loss": "cross_entropy"}, "teacher"),
        ({"weights": "bfloat16_kahan", "optimizer": "adamw"}, "weights"),
        ({"micro_batch_tokens": BLOCK}, "micro_batch_tokens"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"optimizer": "adamw"}, "optimizer"),
    ],
)
def test_what_could_not_be_trained_is_not_chosen(settings: dict[str, Any], never: str) -> None:
    asked = config(**settings)
    found = fitted(asked, BLOCK, 0, takes=lambda changes: 1, at_least=lambda changes: 1)
    assert never not in found
    # What is chosen can be resolved again, which refuses settings that exclude each other.
    again = DistillConfig(**(SETTINGS | settings | found))
    resolved(again, SHAPE, SHAPE, block_tokens=BLOCK, train_tokens=100 * BLOCK)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.45])
def test_a_step_of_a_real_model_takes_at_most_the_memory(share: float, tmp_path: Any) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 16, "vocab_size": 640}
    teacher = open_checkpoint(tiny.checkpoint("llama", tmp_path / "teacher", **sizes))
    student = planned_checkpoint(teacher, with_sizes(teacher.shape, hidden=96, ffn=256, layers=3))

    def takes(changes: Changes) -> int:
        given = DistillConfig(**(SETTINGS | {"optimizer": "soap", "precision": "bfloat16"} | dict(changes)))
        full = resolved(given, student.shape, teacher.shape, block_tokens=BLOCK, train_tokens=100 * BLOCK)
        return step_memory(student, teacher, Schedule.of_student(full, BLOCK, 0), torch.bfloat16, "cpu").peak

    memory = int(share * takes({}))
    asked = resolved(
        DistillConfig(**(SETTINGS | {"optimizer": "soap", "precision": "bfloat16"})),
        *(student.shape, teacher.shape),
        block_tokens=BLOCK,
        train_tokens=100 * BLOCK,
    )
    found = fitted(asked, BLOCK, memory, takes=takes, at_least=lambda changes: 0)
    assert found and takes(found) <= memory
