"""SOAP moves matrices the same whatever axes they are written along, and all else as AdamW does."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minitron.distillation.optim import (
    TRAINING_BYTES,
    OptimizerOptions,
    hold_weights,
    make_optimizer,
    soap,
    training_bytes,
)
from minitron.distillation.optim.soap import Soap
from minitron.model.architecture import Shape
from minitron.model.families import FAMILIES

BETAS, DECAY, RATE = (0.9, 0.95), 0.1, 0.01


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(weight: Tensor, gradients: list[Tensor], *, turned: bool = True) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    own = Soap([{"params": [parameter], "lr": RATE, "weight_decay": DECAY, "turned": turned}], betas=BETAS)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        own.step()
    return parameter.detach()


def moved_by_torch(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    own = torch.optim.AdamW([parameter], lr=RATE, betas=BETAS, weight_decay=DECAY)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        own.step()
    return parameter.detach()


def gradients_of(shape: tuple[int, int], steps: int) -> list[Tensor]:
    """Of entries that are correlated, along axes that move."""
    left, right = random(shape[0], shape[0], seed=1), random(shape[1], shape[1], seed=2)
    drift = random(*shape, seed=3)
    return [left @ random(*shape, seed=10 + step) @ right + 0.3 * step * drift for step in range(steps)]


def by_hand(weight: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """The module's text, in float64."""
    slow, slower = BETAS
    axes, others = (np.eye(length) for length in weight.shape)
    left, right = (np.zeros((length, length)) for length in weight.shape)
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        turned = axes.T @ gradient @ others
        mean, square = slow * mean + (1 - slow) * turned, slower * square + (1 - slower) * turned**2
        change = mean / (1 - slow**step) / (np.sqrt(square / (1 - slower**step)) + 1e-8)
        weight = (1 - RATE * DECAY) * weight - RATE * axes @ change @ others.T
        left = soap.AXES_BETA * left + (1 - soap.AXES_BETA) * gradient @ gradient.T
        right = soap.AXES_BETA * right + (1 - soap.AXES_BETA) * gradient.T @ gradient
        if step % soap.AXES_STEPS == 0:
            before, others_before = axes, others
            axes, others = (
                np.linalg.eigh(moment)[1][:, ::-1]
                if step == soap.AXES_STEPS
                else np.linalg.qr((moment @ old)[:, np.argsort(-np.diag(old.T @ moment @ old))])[0]
                for moment, old in ((left, axes), (right, others))
            )
            rows, columns = before.T @ axes, others_before.T @ others
            mean, square = rows.T @ mean @ columns, (rows**2).T @ square @ columns**2
    return weight


@pytest.mark.parametrize("shape", [(6, 6), (9, 5), (4, 7)])
def test_steps_are_those_of_the_formulas(shape: tuple[int, int]) -> None:
    gradients = gradients_of(shape, 2 * soap.AXES_STEPS + 5)
    weight = random(*shape, seed=0)
    expected = by_hand(weight.double().numpy(), [gradient.double().numpy() for gradient in gradients])
    made = moved(weight, gradients).double().numpy()
    assert np.linalg.norm(made - expected) < 1e-3 * np.linalg.norm(expected - weight.numpy())


def test_steps_along_axes_do_not_depend_on_those_a_matrix_is_written_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soap, "AXES_STEPS", 1)
    shape, steps = (6, 6), 25
    left, right = (torch.linalg.qr(random(6, 6, seed=seed)).Q for seed in (20, 21))
    weight, gradients = random(*shape, seed=0), gradients_of(shape, steps)
    one = moved(weight, gradients)
    other = moved(left @ weight @ right, [left @ gradient @ right for gradient in gradients])
    difference = (left @ one @ right - other).abs().max()
    assert difference < 2.5 * RATE  # of the first step, which had no axes yet
    adam = moved_by_torch(weight, gradients)
    adam_turned = moved_by_torch(left @ weight @ right, [left @ gradient @ right for gradient in gradients])
    assert (left @ adam @ right - adam_turned).abs().max() > 0.05  # AdamW's do


def test_a_matrix_with_sides_that_are_too_long_is_moved_as_torch_moves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soap, "MOST_AXES", 4)
    weight, gradients = random(7, 5, seed=0), gradients_of((7, 5), 2 * soap.AXES_STEPS)
    torch.testing.assert_close(moved(weight, gradients), moved_by_torch(weight, gradients))
    assert soap.turned_sides((7, 4)) == {"right": 4} and soap.turned_sides((3, 7)) == {"left": 3}


def test_what_is_not_turned_is_moved_as_torch_moves_it() -> None:
    weight, gradients = random(7, 5, seed=0), gradients_of((7, 5), 12)
    torch.testing.assert_close(moved(weight, gradients, turned=False), moved_by_torch(weight, gradients))


def test_inputs_along_skew_axes_are_learnt_sooner() -> None:
    # |(W - goal) x|^2 of a few inputs a step, whose standard deviations go from 1 to 0.01 along random axes.
    scales = torch.logspace(0, -2, 12)
    inputs = random(500 * 8, 12, seed=3) * scales @ torch.linalg.qr(random(12, 12, seed=4)).Q
    goal, errors = random(12, 12, seed=5), {}
    for name in ("soap", "adamw"):
        weight = nn.Parameter(torch.zeros(12, 12))
        own = optimizer_of([weight], name)
        for step, batch in enumerate(inputs.split(8)):
            for group in own.param_groups:
                group["lr"] = 0.05 * (1 - step / 500)
            own.zero_grad()
            ((weight - goal) @ batch.T).square().sum().backward()
            own.step()
        errors[name] = (weight - goal).square().mean().item()
    assert errors["soap"] < 0.5 * errors["adamw"], errors


def optimizer_of(parameters: list[nn.Parameter], optimizer: Any, weights: Any = "float32", **kwargs: Any) -> Any:
    vocabulary = kwargs.pop("vocabulary", [])
    how = {"betas": BETAS, "weight_decay": 0.0, "dtype": torch.float32, "seed": 0} | kwargs
    return make_optimizer({"student": parameters}, optimizer, OptimizerOptions(weights, **how), vocabulary=vocabulary)


@pytest.mark.parametrize("optimizer", ["soap", "adamw"])
def test_matrices_decay_vectors_do_not_and_a_vocabulary_is_not_turned(optimizer: Any) -> None:
    matrix, vocabulary, vector = (nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (9, 3), (4,)))
    own = optimizer_of([matrix, vocabulary, vector], optimizer, vocabulary=[vocabulary], weight_decay=DECAY)
    found = {
        id(parameter): (group["weight_decay"], group["turned"], group["of"])
        for group in own.param_groups
        for parameter in group["params"]
    }
    turned = optimizer == "soap"
    assert found == {
        id(matrix): (DECAY, turned, "student"),
        id(vocabulary): (DECAY, False, "student"),
        id(vector): (0.0, False, "student"),
    }


@pytest.mark.parametrize(
    ("optimizer", "weights"), [("soap", "float32"), *(("adamw", weights) for weights in TRAINING_BYTES)]
)
def test_training_takes_the_bytes_that_are_promised(optimizer: Any, weights: Any) -> None:
    config = {"tie_word_embeddings": False, "num_key_value_heads": 2}
    shape = Shape(layers=2, hidden=12, ffn=20, heads=4, kv_heads=2, head_dim=3, vocab=50)
    architecture = FAMILIES["llama"]
    specs = [*architecture.specs(config, shape.layers)]
    held = nn.ParameterList([nn.Parameter(torch.ones(spec.shape(shape))) for spec in specs])
    hold_weights(held, weights)
    of_tokens = [parameter for parameter, spec in zip(held, specs, strict=True) if spec.layer is None]
    own = optimizer_of([*held], optimizer, weights, vocabulary=of_tokens)
    for parameter in held:
        parameter.grad = torch.ones_like(parameter)
    for _ in range(soap.AXES_STEPS):
        own.step()
    tensors = [tensor for p in held for tensor in (p, p.grad, *(v for k, v in own.state[p].items() if k != "step"))]
    promised = training_bytes(architecture, config, shape, optimizer, weights)
    assert sum(tensor.nbytes for tensor in tensors if tensor is not None) == promised
    without_axes = TRAINING_BYTES[weights] * sum(math.prod(spec.shape(shape)) for spec in specs)
    assert promised > without_axes if optimizer == "soap" else promised == without_axes
