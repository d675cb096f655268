"""States between layers are compared as a plain loop over tokens does it, and counted as much as the logits."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import small
import tiny
import torch
from trainings import resolved

from minitron.distillation.config import DistillConfig
from minitron.distillation.hidden_loss import HiddenLoss, pairs_of, share_at
from minitron.distillation.objective import Objective
from minitron.distillation.student import StudentModule
from minitron.distillation.teachers import OnlineTeacher
from minitron.model.architecture import Shape
from minitron.model.checkpoint import load_model, open_checkpoint
from minitron.model.hidden_states import capture_hidden_states, decoder_layers
from minitron.model.samples import Batch
from minitron.pruning.cut import cut

SHAPE = Shape(layers=4, hidden=12, ffn=8, heads=2, kv_heads=2, head_dim=4, vocab=50)


def random_states(*sizes: int, seed: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {place: torch.randn(*sizes, generator=generator) for place in range(5)}


def test_the_pairs_of_the_paper() -> None:
    """The embedding, and the outputs of layers 13 of 16 and 29 of 32, counted from 0: the 14th and the 30th."""
    assert pairs_of("p1", replace(SHAPE, layers=16), replace(SHAPE, layers=32)) == [(0, 0), (14, 30)]
    assert pairs_of("p1", replace(SHAPE, layers=2), SHAPE) == [(0, 0)]
    assert pairs_of("off", SHAPE, SHAPE) == []


@pytest.mark.parametrize("layers", [1, 2, 3, 8, 9, 40, 126])
def test_places_along_the_depth_begin_and_end_with_it_and_are_evenly_spread(layers: int) -> None:
    for of_teacher in (layers, 2 * layers, layers + 3):
        pairs = pairs_of("all", replace(SHAPE, layers=layers), replace(SHAPE, layers=of_teacher))
        assert pairs[0] == (0, 0) and pairs[-1] == (layers, of_teacher)
        assert len(pairs) == min(layers + 1, 9)
        steps = [later - one for (one, _), (later, _) in pairwise(pairs)]
        assert max(steps) - min(steps) <= 1 and min(steps) >= 1
        assert all(abs(theirs - ours * of_teacher / layers) <= 0.5 + 1e-9 for ours, theirs in pairs)


def test_they_count_less_and_less() -> None:
    assert [share_at(step, 4) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]


@pytest.mark.parametrize("centred", [False, True])
def test_the_loss_is_a_plain_loop_over_tokens_and_pairs(centred: bool) -> None:
    student, teacher = random_states(2, 3, 12, seed=0), random_states(2, 3, 12, seed=1)
    loss = HiddenLoss([(0, 0), (2, 3)], SHAPE, SHAPE, centred=centred)
    expected = 0.0
    for one, other in ((0, 0), (2, 3)):
        for ours, theirs in zip(student[one].flatten(0, 1), teacher[other].flatten(0, 1), strict=True):
            if centred:
                ours, theirs = ours - ours.mean(), theirs - theirs.mean()
            expected += 1 - (ours @ theirs / (ours.norm() * theirs.norm())).item()
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert not list(loss.parameters())


def test_equal_states_cost_nothing() -> None:
    states = random_states(2, 3, 12, seed=0)
    loss = HiddenLoss([(0, 0), (2, 2)], SHAPE, SHAPE, centred=False)
    assert loss(states, states).item() == pytest.approx(0, abs=1e-5)


def test_maps_between_widths_start_as_the_least_squares_fit() -> None:
    narrow, wide = replace(SHAPE, hidden=6), SHAPE
    student = random_states(4, 50, 6, seed=0)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2))).Q[:6]
    teacher = {place: states @ turn for place, states in student.items()}  # which a linear map reaches exactly
    loss = HiddenLoss([(0, 0), (2, 2)], narrow, wide, centred=False)
    before = loss(student, teacher).item()
    with torch.no_grad():
        for linear, weight in zip(loss.maps, loss.fitted(loss.products(student, teacher)), strict=True):
            linear.weight.copy_(weight)
    assert loss(student, teacher).item() < 1e-4 < before
    assert [tuple(each.shape) for each in loss.parameters()] == [(12, 6), (12, 6)]


@pytest.mark.parametrize("variant", ["llama", "gemma2", "nemotron", "phi3"])
def test_states_are_those_that_transformers_gives(variant: str, tmp_path: Path) -> None:
    """But for the last, which transformers puts through the final norm."""
    checkpoint = open_checkpoint(tiny.checkpoint(variant, tmp_path))
    model, tokens = load_model(checkpoint.path, torch.float32), tiny.tokens(2, 9, seed=4)
    with (
        torch.no_grad(),
        capture_hidden_states(decoder_layers(model, checkpoint), range(checkpoint.shape.layers + 1)) as states,
    ):
        expected = model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert [*states] == [*range(len(expected))]
    for place, state in enumerate(expected[:-1]):
        assert torch.equal(states[place], state)
    assert torch.equal(model.base_model.norm(states[len(expected) - 1]), expected[-1])
    model(input_ids=tokens)
    assert len(states) == len(expected) and torch.equal(states[0], expected[0])


@pytest.mark.parametrize("hidden", [32, 24])
def test_states_are_compared_in_training_only_and_the_objective_is_what_it_is_without(
    hidden: int, tmp_path: Path
) -> None:
    teacher = open_checkpoint(small.teacher(tmp_path / "teacher"))
    (tmp_path / "student").mkdir()
    cut(teacher, tiny.plan(teacher.shape, hidden=hidden, layers=3), tmp_path / "student")
    student = open_checkpoint(tmp_path / "student")
    batch = Batch(tiny.tokens(2, 9, seed=4))
    teach = OnlineTeacher(teacher, torch.float32, torch.device("cpu"), depths=[0, 2])
    pairs = pairs_of("p1", student.shape, teacher.shape)
    between = HiddenLoss(pairs, student.shape, teacher.shape, centred=False)
    model = load_model(student.path, torch.float32)
    layers = decoder_layers(model, student)
    module = StudentModule(model, layers, Objective(), between, torch.float32).train()
    output = teach(batch)
    before = module(batch, output)[1].item()
    module.fit_maps([(batch, output, 1.0)])
    objective, compared = module(batch, output)
    assert 0 < compared.item() <= before * (1 if hidden == 32 else 0.9)
    alone, nothing = StudentModule(model, layers, Objective(), None, torch.float32)(batch, output)
    torch.testing.assert_close(objective, alone)
    assert nothing.item() == 0
    (objective + compared).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert len(list(between.parameters())) == (0 if hidden == 32 else 2)
    assert torch.equal(module.eval()(batch, output)[0], objective)


def test_by_default_every_student_of_a_teacher_beside_it_has_them() -> None:
    changes = [
        ({}, "all"),
        ({"intermediate": "p1"}, "p1"),
        ({"loss": "cross_entropy"}, "off"),
        ({"teacher": "recorded"}, "off"),
    ]
    for change, expected in changes:
        config = resolved(DistillConfig(**change), SHAPE, SHAPE, block_tokens=16, train_tokens=100_000)
        assert config.intermediate == expected
