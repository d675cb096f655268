"""SOAP moves matrices the same whatever axes they are written along, and all else as AdamW does."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from trainings import resolved

from minitron.distillation.config import DistillConfig
from minitron.distillation.optim import (
    OPTIMIZERS,
    TRAINING_BYTES,
    OptimizerOptions,
    hold_weights,
    make_optimizer,
    soap,
    training_bytes,
)
from minitron.distillation.optim.soap import FULL, LIGHT, Soap, Turning
from minitron.distillation.schedule import MOST_OF_PASSES, usual_optimizer
from minitron.model.architecture import Shape
from minitron.model.families import FAMILIES

BETAS, DECAY, RATE = (0.9, 0.95), 0.1, 0.01


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(
    weight: Tensor, gradients: list[Tensor], *, turned: bool = True, turning: Turning = FULL, dtype: Any = torch.float32
) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    groups = [{"params": [parameter], "lr": RATE, "weight_decay": DECAY, "turned": turned}]
    own = Soap(groups, betas=BETAS, dtype=dtype, turning=turning)
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


def by_hand(weight: np.ndarray, gradients: list[np.ndarray], turning: Turning) -> np.ndarray:
    """The module's text, in float64."""
    slow, slower = BETAS
    axes = [np.eye(length) for length in weight.shape]
    moments = [np.zeros((length, length)) for length in weight.shape]
    turned_sides = [n for n in (0, 1) if turning.longer_sides or weight.shape[n] == min(weight.shape)]
    kept = soap.AXES_BETA**turning.moment_steps
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        turned = axes[0].T @ gradient @ axes[1]
        mean, square = slow * mean + (1 - slow) * turned, slower * square + (1 - slower) * turned**2
        change = mean / (1 - slow**step) / (np.sqrt(square / (1 - slower**step)) + 1e-8)
        weight = (1 - RATE * DECAY) * weight - RATE * axes[0] @ change @ axes[1].T
        if step <= soap.AXES_STEPS or step % turning.moment_steps == 0:
            products = gradient @ gradient.T, gradient.T @ gradient
            moments = [kept * old + (1 - kept) * new for old, new in zip(moments, products, strict=True)]
        if step == soap.AXES_STEPS or step % (turning.axes_every * soap.AXES_STEPS) == 0:
            before = [*axes]
            for side in turned_sides:
                moment, old = moments[side], axes[side]
                axes[side] = (
                    np.linalg.eigh(moment)[1][:, ::-1]
                    if step == soap.AXES_STEPS
                    else np.linalg.qr((moment @ old)[:, np.argsort(-np.diag(old.T @ moment @ old))])[0]
                )
            rows, columns = (old.T @ new for old, new in zip(before, axes, strict=True))
            mean, square = rows.T @ mean @ columns, (rows**2).T @ square @ columns**2
    return weight


@pytest.mark.parametrize("turning", [FULL, LIGHT], ids=["full", "light"])
@pytest.mark.parametrize("shape", [(6, 6), (9, 5), (4, 7)])
def test_steps_are_those_of_the_formulas(shape: tuple[int, int], turning: Turning) -> None:
    gradients = gradients_of(shape, 2 * turning.axes_every * soap.AXES_STEPS + 5)
    weight = random(*shape, seed=0)
    expected = by_hand(weight.double().numpy(), [gradient.double().numpy() for gradient in gradients], turning)
    made = moved(weight, gradients, turning=turning).double().numpy()
    assert np.linalg.norm(made - expected) < 1e-3 * np.linalg.norm(expected - weight.numpy())


def test_rounded_products_move_a_matrix_nearly_as_exact_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soap, "ROUNDED_FROM", 1)
    weight, gradients = random(24, 16, seed=0), gradients_of((24, 16), soap.AXES_STEPS + 5)
    exact = moved(weight, gradients, turning=LIGHT)
    rounded = moved(weight, gradients, turning=LIGHT, dtype=torch.bfloat16)
    assert 0 < (rounded - exact).norm() < 0.02 * (exact - weight).norm()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(16, 16), (32, 24)])
def test_an_update_takes_the_operations_that_torch_counts(name: str, shape: tuple[int, int]) -> None:
    weight, cycle = nn.Parameter(random(*shape, seed=0)), soap.AXES_STEPS * LIGHT.axes_every
    own = optimizer_of([weight], name)
    for step in range(cycle):  # until the axes are known
        weight.grad = random(*shape, seed=step)
        own.step()
    with FlopCounterMode(display=False) as counter:
        for step in range(cycle):
            weight.grad = random(*shape, seed=step)
            own.step()
    assert counter.get_total_flops() == pytest.approx(cycle * OPTIMIZERS[name].flops(shape))


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
    assert soap.FULL.sides((7, 4)) == {"right": 4} and soap.FULL.sides((3, 7)) == {"left": 3}


def test_what_is_not_turned_is_moved_as_torch_moves_it() -> None:
    weight, gradients = random(7, 5, seed=0), gradients_of((7, 5), 12)
    torch.testing.assert_close(moved(weight, gradients, turned=False), moved_by_torch(weight, gradients))


def test_inputs_along_skew_axes_are_learnt_sooner() -> None:
    # |(W - goal) x|^2 of a few inputs a step, whose standard deviations go from 1 to 0.01 along random axes.
    scales = torch.logspace(0, -2, 12)
    inputs = random(500 * 8, 12, seed=3) * scales @ torch.linalg.qr(random(12, 12, seed=4)).Q
    goal, errors = random(12, 12, seed=5), {}
    for name in OPTIMIZERS:
        weight = nn.Parameter(torch.zeros(12, 12))
        own = optimizer_of([weight], name)
        for step, batch in enumerate(inputs.split(8)):
            for group in own.param_groups:
                group["lr"] = 0.05 * (1 - step / 500)
            own.zero_grad()
            ((weight - goal) @ batch.T).square().sum().backward()
            own.step()
        errors[name] = (weight - goal).square().mean().item()
    assert max(errors["soap"], errors["soap_light"]) < 0.5 * errors["adamw"], errors


def optimizer_of(parameters: list[nn.Parameter], optimizer: Any, weights: Any = "float32", **kwargs: Any) -> Any:
    vocabulary = kwargs.pop("vocabulary", [])
    how = {"betas": BETAS, "weight_decay": 0.0, "dtype": torch.float32, "seed": 0} | kwargs
    return make_optimizer({"student": parameters}, optimizer, OptimizerOptions(weights, **how), vocabulary=vocabulary)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_matrices_decay_vectors_do_not_and_a_vocabulary_is_not_turned(optimizer: Any) -> None:
    matrix, vocabulary, vector = (nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (9, 3), (4,)))
    own = optimizer_of([matrix, vocabulary, vector], optimizer, vocabulary=[vocabulary], weight_decay=DECAY)
    found = {
        id(parameter): (group["weight_decay"], group["turned"], group["of"])
        for group in own.param_groups
        for parameter in group["params"]
    }
    turned = optimizer != "adamw"
    assert found == {
        id(matrix): (DECAY, turned, "student"),
        id(vocabulary): (DECAY, False, "student"),
        id(vector): (0.0, False, "student"),
    }


@pytest.mark.parametrize(
    ("optimizer", "weights"),
    [("soap", "float32"), ("soap_light", "float32"), *(("adamw", weights) for weights in TRAINING_BYTES)],
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
    assert promised > without_axes if optimizer != "adamw" else promised == without_axes


DEMO, SMOLLM2 = Shape(6, 256, 704, 4, 2, 64, 4096), Shape(30, 576, 1536, 9, 3, 64, 49152)


@pytest.mark.parametrize(
    ("student", "teacher", "tokens", "expected"),
    [
        (replace(DEMO, hidden=160, ffn=448), DEMO, 1024, "adamw"),
        (replace(DEMO, hidden=160, ffn=448), DEMO, 2048, "soap_light"),
        (replace(DEMO, hidden=160, ffn=448), DEMO, 6144, "soap"),
        (DEMO, None, 4096, "soap_light"),
        (replace(SMOLLM2, ffn=1152), SMOLLM2, 2048, "adamw"),
        (replace(SMOLLM2, ffn=1152), SMOLLM2, 8192, "soap_light"),
        (replace(SMOLLM2, ffn=1152), SMOLLM2, 20480, "soap"),
    ],
)
def test_the_usual_optimizer_is_the_first_that_takes_little_beside_the_passes(
    student: Shape, teacher: Shape | None, tokens: int, expected: str
) -> None:
    assert usual_optimizer("float32", student, tokens, teacher) == expected
    assert usual_optimizer("bfloat16_kahan", student, tokens, teacher) == "adamw"
    passes = 2 * tokens * sum(matrix.numel() for matrix in matrices_of(student)) * 3
    if teacher is not None:
        passes += 2 * tokens * sum(matrix.numel() for matrix in matrices_of(teacher))
    *in_layers, _ = matrices_of(student)
    shares = [sum(OPTIMIZERS[name].flops(tuple(p.shape)) for p in in_layers) / passes for name in OPTIMIZERS]
    small = [name for name, share in zip(OPTIMIZERS, shares, strict=True) if share <= MOST_OF_PASSES]
    assert small[0] == expected


def matrices_of(shape: Shape) -> list[Tensor]:
    """Those that tokens are multiplied by in transformers' own model, the output projection last."""
    config = transformers.LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    return [*(p for p in model.model.layers.parameters() if p.ndim == 2), model.lm_head.weight]


def test_a_students_optimizer_follows_from_its_shape_and_one_that_is_given_stays() -> None:
    student, text = replace(DEMO, hidden=160, ffn=448), {"block_tokens": 256, "train_tokens": 800_000}
    for config, expected in [
        (DistillConfig(), "soap_light"),
        (DistillConfig(tokens=20_000), "adamw"),
        (DistillConfig(tokens=20_000_000), "soap"),
        (DistillConfig(optimizer="adamw"), "adamw"),
        (DistillConfig(weights="bfloat16_kahan"), "adamw"),
    ]:
        settled = resolved(config, student, DEMO, **text)
        assert settled.optimizer == expected
        assert resolved(settled, student, DEMO, **text) == settled
