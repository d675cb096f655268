"""Laws of removing columns: against regressions in float64, and against trying every choice."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from minitron.core.errors import PlanError
from minitron.pruning.repair import columns as module
from minitron.pruning.repair.columns import Surgeon


@pytest.fixture(autouse=True)
def no_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CORRELATION_RIDGE", 0.0)


def problem(columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix, and inputs that are correlated and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    sizes = 10 ** (4 * torch.rand(columns, generator=generator) - 2)
    return torch.randn(5, columns, generator=generator).double(), (mixed * sizes).double()


def least_error(weight: Tensor, inputs: Tensor, kept: list[int]) -> float:
    """The error that a regression on the kept columns leaves."""
    outputs = inputs @ weight.T
    solution = torch.linalg.lstsq(inputs[:, kept], outputs).solution
    return (outputs - inputs[:, kept] @ solution).square().sum().item()


def error(surgeon: Surgeon, weight: Tensor, inputs: Tensor) -> float:
    found = inputs[:, list(surgeon.kept)] @ surgeon.weight.T.double()
    return (inputs @ weight.T - found).square().sum().item()


def operate(weight: Tensor, inputs: Tensor) -> Surgeon:
    return Surgeon(weight, inputs.T @ inputs)


def test_removed_columns_leave_the_least_squares_weights() -> None:
    weight, inputs = problem(20)
    surgeon = operate(weight, inputs)
    surgeon.remove(torch.tensor([3, 17, 4]))
    surgeon.remove(torch.tensor([0]))
    kept = [column for column in range(20) if column not in (0, 3, 4, 17)]
    assert surgeon.kept == tuple(kept)
    expected = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T).solution.T
    torch.testing.assert_close(surgeon.weight, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("block", [1, 3, 64])
def test_elimination_is_greedy_one_by_one_whatever_the_block(block: int) -> None:
    weight, inputs = problem(24)
    kept = list(range(24))
    for _ in range(10):
        cheapest = min(kept, key=lambda one: least_error(weight, inputs, [other for other in kept if other != one]))
        kept.remove(cheapest)
    surgeon = operate(weight, inputs)
    surgeon.eliminate(10, block)
    assert surgeon.kept == tuple(kept)
    assert error(surgeon, weight, inputs) == pytest.approx(least_error(weight, inputs, kept), rel=1e-6)


def test_elimination_among_few_candidates_stays_near_the_greedy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = problem(120, seed=1)
    exact, coarse = operate(weight, inputs), operate(weight, inputs)
    exact.eliminate(60, 1)
    monkeypatch.setattr(module, "CANDIDATES", 2)
    coarse.eliminate(60, 8)
    assert error(coarse, weight, inputs) < 1.1 * error(exact, weight, inputs)


def test_blocks_are_kept_by_what_they_cost_together() -> None:
    weight, inputs = problem(12)
    surgeon = operate(weight, inputs)
    kept = surgeon.keep_blocks(range(4), 3, size=3)
    every = [[3 * block + column for block in blocks for column in range(3)] for blocks in combinations(range(4), 3)]
    best = min(every, key=lambda columns: least_error(weight, inputs, columns))
    assert [3 * block + column for block in kept for column in range(3)] == best


def test_a_column_that_is_never_active_goes_first_and_costs_nothing() -> None:
    weight, inputs = problem(10)
    inputs[:, 6] = 0
    surgeon = operate(weight, inputs)
    surgeon.eliminate(1)
    assert 6 not in surgeon.kept and error(surgeon, weight, inputs) < 1e-12 * (inputs @ weight.T).square().sum()


def test_float32_is_enough_with_the_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CORRELATION_RIDGE", 1e-3)
    weight, inputs = problem(60)
    exact, rounded = operate(weight, inputs), operate(weight.float(), inputs.float())
    for surgeon in (exact, rounded):
        surgeon.eliminate(25)
    assert error(rounded, weight, inputs) == pytest.approx(error(exact, weight, inputs), rel=0.02)


def test_activations_that_are_not_finite_are_refused() -> None:
    weight, inputs = problem(5)
    inputs[0, 0] = torch.inf
    with pytest.raises(PlanError, match="not finite: the model's weights are damaged"):
        operate(weight, inputs)
