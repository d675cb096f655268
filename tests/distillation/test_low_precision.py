"""bfloat16 weights lose no small update."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minitron.distillation.optim import low_precision
from minitron.distillation.optim.low_precision import BFloat16AdamW, KahanAdamW, StochasticAdamW, stochastically_rounded

BETAS, DECAY = (0.9, 0.95), 0.1


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.LayerNorm(40), nn.Linear(40, 5)).to(dtype)


def train(of: nn.Module, by: torch.optim.Optimizer, steps: int, rate: float) -> None:
    """Steps on random gradients, the same for every model of the shape, whatever its weights became."""
    draw = noise(1)
    for group in by.param_groups:
        group["lr"] = rate
    for _ in range(steps):
        for parameter in of.parameters():
            parameter.grad = (1 + torch.randn(parameter.shape, generator=draw)).to(parameter.dtype)
        by.step()


def plain(parameters: Any, kind: type[BFloat16AdamW], betas: tuple[float, float] = BETAS) -> BFloat16AdamW:
    return kind([{"params": list(parameters), "weight_decay": DECAY}], betas=betas, seed=0)


def ulp(values: Tensor) -> Tensor:
    """The distance of neighbouring bfloat16 numbers."""
    return torch.exp2(values.float().abs().log2().floor() - 7)


def test_a_value_becomes_one_of_its_two_neighbours_and_is_right_in_the_mean() -> None:
    values = torch.randn(300, generator=noise()) * torch.logspace(-30, 30, 300)
    below = (values.view(torch.int32) & -65536).view(torch.float32)  # towards zero
    above = below + ulp(below) * below.sign()
    draw, draws = noise(), 4000
    drawn = torch.stack([stochastically_rounded(values, draw).float() for _ in range(draws)])
    assert ((drawn == below) | (drawn == above)).all()
    share = (values - below) / (above - below)
    error = ((drawn == above).float().mean(0) - share).abs()
    assert (error < 5 * (share * (1 - share) / draws).sqrt() + 1e-6).all()


def test_a_bfloat16_stays_what_it_is() -> None:
    values = torch.cat([torch.randn(500, generator=noise()).bfloat16().float(), torch.tensor([0.0, -0.0, 1.0, -3e38])])
    values = values.bfloat16().float()
    assert torch.equal(stochastically_rounded(values, noise()).float(), values)


@pytest.mark.parametrize("kind", [BFloat16AdamW, KahanAdamW, StochasticAdamW])
def test_float32_parameters_move_as_torch_moves_them(
    kind: type[BFloat16AdamW], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_precision, "CHUNK", 50)  # some rows at a time
    ours, theirs = model(), model()
    train(ours, plain(ours.parameters(), kind), 20, 1e-2)
    train(theirs, torch.optim.AdamW(theirs.parameters(), betas=BETAS, weight_decay=DECAY), 20, 1e-2)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [BFloat16AdamW, KahanAdamW, StochasticAdamW])
def test_one_step_is_torchs_rounded_to_a_neighbour(kind: type[BFloat16AdamW]) -> None:
    ours = model(torch.bfloat16)
    exact = model(torch.bfloat16).float()
    train(ours, plain(ours.parameters(), kind), 1, 3e-3)
    draw = noise(1)
    theirs = torch.optim.AdamW(exact.parameters(), betas=BETAS, weight_decay=DECAY, lr=3e-3)
    for parameter in exact.parameters():
        parameter.grad = (1 + torch.randn(parameter.shape, generator=draw)).bfloat16().float()
    theirs.step()
    for one, other in zip(ours.parameters(), exact.parameters(), strict=True):
        assert ((one.float() - other).abs() <= ulp(other) * 1.01 + 1e-6).all()


def moved(kind: type[BFloat16AdamW], start: Tensor, steps: int, rate: float) -> Tensor:
    """How far weights went, with what Kahan summation keeps beside them."""
    weight = nn.Parameter(start.clone())
    own = plain([weight], kind)
    train(nn.ParameterList([weight]), own, steps, rate)
    kept = own.state[weight].get("compensation", torch.zeros(()))
    return (weight.detach().float() + kept.float() - start.float()).detach()


def test_many_small_steps_go_as_far_as_in_float32_where_plain_rounding_stands_still() -> None:
    start = torch.rand(4000, 1, generator=noise()).add(0.5).bfloat16()
    steps, rate = 300, 1e-4  # a fortieth to an eightieth of the distance of neighbours
    weight = nn.Parameter(start.float())
    train(nn.ParameterList([weight]), torch.optim.AdamW([weight], betas=BETAS, weight_decay=DECAY), steps, rate)
    exact = (weight - start.float()).detach()
    assert -0.05 < exact.mean() < -0.01
    assert moved(BFloat16AdamW, start, steps, rate).abs().max() == 0
    kahan = moved(KahanAdamW, start, steps, rate)
    assert (kahan - exact).abs().max() < 0.02 * exact.abs().mean()
    stochastic = moved(StochasticAdamW, start, steps, rate)
    assert stochastic.mean() == pytest.approx(exact.mean().item(), rel=0.02)
    assert (stochastic - exact).square().mean().sqrt() < 3 * ulp(start).mean()


@pytest.mark.parametrize("kind", [KahanAdamW, StochasticAdamW])
def test_a_second_moment_falls_again_however_slowly_it_decays(kind: type[BFloat16AdamW]) -> None:
    weight, steps = nn.Parameter(torch.ones(500, 1).bfloat16()), 400
    own = plain([weight], kind, betas=(0.9, 0.999))
    for step in range(steps):
        weight.grad = torch.full_like(weight, 1.0 if step == 0 else 0.0)
        own.step()
    # To the nearest, 0.999 of a bfloat16 is the same number.
    square = own.state[weight]["exp_avg_sq"].float().mean().item()
    assert square == pytest.approx(0.001 * 0.999 ** (steps - 1), rel=0.01)


@pytest.mark.parametrize("kind", [KahanAdamW, StochasticAdamW])
def test_the_noise_is_a_function_of_the_seed(kind: type[BFloat16AdamW]) -> None:
    def made(seed: int, state: int) -> Tensor:
        torch.manual_seed(state)
        weight = nn.Parameter(torch.ones(50, 3).bfloat16())
        own = kind([{"params": [weight]}], betas=BETAS, seed=seed)
        for _ in range(3):
            weight.grad = torch.full_like(weight, 0.3)
            own.step()
        return own.state[weight]["exp_avg_sq"]

    assert torch.equal(made(0, 0), made(0, 1)) and not torch.equal(made(0, 0), made(1, 0))
