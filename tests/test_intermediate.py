"""States between layers are compared as a plain loop over tokens does it, and counted as much as the logits."""

from dataclasses import replace
from pathlib import Path

import pytest
import small
import tiny
import torch

from minitron.distill.intermediate import IntermediateLoss, default_pairs
from minitron.distill.losses import Objective
from minitron.distill.pupil import Pupil
from minitron.distill.teacher import OnlineTeacher
from minitron.distill.train import DistillConfig, resolve
from minitron.model.architecture import Shape
from minitron.model.checkpoint import load_model, open_checkpoint
from minitron.packing import Batch
from minitron.prune.cut import cut

SHAPE = Shape(layers=4, hidden=12, ffn=8, heads=2, kv_heads=2, head_dim=4, vocab=50)


def random_states(*sizes: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*sizes, generator=generator) for _ in range(5)]


def test_the_default_pairs_are_those_of_the_paper() -> None:
    """The embedding, and the outputs of layers 13 of 16 and 29 of 32, counted from 0: the 14th and the 30th."""
    assert default_pairs(replace(SHAPE, layers=16), replace(SHAPE, layers=32)) == [(0, 0), (14, 30)]
    assert default_pairs(replace(SHAPE, layers=2), SHAPE) == [(0, 0)]


@pytest.mark.parametrize("centred", [False, True])
def test_the_loss_is_a_plain_loop_over_tokens_and_pairs(centred: bool) -> None:
    student, teacher = random_states(2, 3, 12, seed=0), random_states(2, 3, 12, seed=1)
    loss = IntermediateLoss([(0, 0), (2, 3)], SHAPE, SHAPE, centred=centred)
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
    loss = IntermediateLoss([(0, 0), (2, 2)], SHAPE, SHAPE, centred=False)
    assert loss(states, states).item() == pytest.approx(0, abs=1e-5)


def test_maps_between_widths_start_as_the_least_squares_fit() -> None:
    narrow, wide = replace(SHAPE, hidden=6), SHAPE
    student = random_states(4, 50, 6, seed=0)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2))).Q[:6]
    teacher = [states @ turn for states in student]  # which a linear map reaches exactly
    loss = IntermediateLoss([(0, 0), (2, 2)], narrow, wide, centred=False)
    before = loss(student, teacher).item()
    loss.fit(student, teacher)
    assert loss(student, teacher).item() < 1e-4 < before
    assert [tuple(each.shape) for each in loss.parameters()] == [(12, 6), (12, 6)]


@pytest.mark.parametrize("hidden", [32, 24])
def test_the_states_count_as_much_as_the_logits_and_only_in_training(hidden: int, tmp_path: Path) -> None:
    teacher = open_checkpoint(small.teacher(tmp_path / "teacher"))
    (tmp_path / "student").mkdir()
    cut(teacher, tiny.plan(teacher.shape, hidden=hidden, layers=3), tmp_path / "student")
    student = open_checkpoint(tmp_path / "student")
    batch = Batch(tiny.tokens(2, 9, seed=4))
    guide = OnlineTeacher(teacher.path, student, torch.float32, torch.device("cpu"), states=True)
    pairs = default_pairs(student.shape, teacher.shape)
    between = IntermediateLoss(pairs, student.shape, teacher.shape, centred=False)
    pupil = Pupil(load_model(student.path, torch.float32), Objective(), between, torch.float32).train()
    lesson = guide(batch)
    pupil.fit_maps(batch, lesson)
    minimised, objective = pupil(batch, lesson)
    alone = Pupil(pupil.model, Objective(), None, torch.float32)(batch, lesson)[0]
    torch.testing.assert_close(objective, alone.detach())
    torch.testing.assert_close(minimised.detach(), 2 * objective)
    minimised.backward()
    assert all(parameter.grad is not None for parameter in pupil.parameters())
    assert len(list(between.parameters())) == (0 if hidden == 32 else 2)
    assert torch.equal(pupil.eval()(batch, lesson)[0], objective)


def test_a_deep_cut_has_them_by_default_and_a_width_cut_does_not() -> None:
    options = {"weights_rms": 1.0, "block_tokens": 16, "train_tokens": 100_000}
    for layers, expected in ((4, False), (3, False), (2, True)):
        assert resolve(DistillConfig(), replace(SHAPE, layers=layers), SHAPE, **options).intermediate is expected
    alone = DistillConfig(loss="cross_entropy")
    assert resolve(alone, replace(SHAPE, layers=1), SHAPE, **options).intermediate is False
