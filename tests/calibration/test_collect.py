"""The statistics of one streamed pass are those of plain loops over transformers' own model."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from minitron.calibration import collect as module
from minitron.calibration.collect import cosine_sum, measure_statistics, sample_sums
from minitron.calibration.statistics import Statistics
from minitron.core.errors import RunError
from minitron.model.checkpoint import open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass

LENGTHS = [11, 4, 7, 1, 9]


def measure(path: Path, tokens: Tensor, batch: int | None = 2, **options: Any) -> Statistics:
    named = {name: options.pop(name) for name in ("scratch", "progress") if name in options}
    pass_ = Pass(options.pop("dtype", torch.float32), batch, **named)
    return measure_statistics(open_checkpoint(path), Samples(tokens), pass_, **{"second_moment": True} | options)


@torch.no_grad()
def by_loops(path: Path, samples: list[Tensor], dtype: torch.dtype = torch.float32) -> Statistics:
    """Hooks on a whole model, one sample without pads at a time, every sum in float64 and written out."""
    model = tiny.model(path, dtype)
    layers = model.model.layers
    seen: dict[tuple[str, int], Tensor] = {}
    made: dict[tuple[str, int], Tensor] = {}  # the outputs of the matrices that write to the stream
    inputs: dict[str, Tensor] = {}  # hidden states, and the stream where a layer reads it
    for index, layer in enumerate(layers):
        for site, matrix in (("attention_out", layer.self_attn.o_proj), ("mlp_out", layer.mlp.down_proj)):
            _watch(matrix, lambda x, y, i=index, site=site: (seen.update({(site, i): x}), made.update({(site, i): y})))
        _watch(layer, lambda x, y, i=index: inputs.update({f"before{i}": x, f"after{i}": y}))
        for site, norm, reader in (
            ("attention_in", _norm(layer, ATTENTION_NORM), _first(layer.self_attn, ("q_proj", "qkv_proj"))),
            ("mlp_in", _norm(layer, MLP_NORM), _first(layer.mlp, ("gate_proj", "gate_up_proj", "up_proj"))),
        ):
            _watch(reader, lambda x, y, i=index, site=site: seen.update({(site, i): x}))
            _watch(norm or reader, lambda x, y, i=index, site=site: inputs.update({f"{site}{i}": x}))
    _watch(model.model.norm, lambda x, y: (seen.update({("head_in", 0): y}), inputs.update({"head_in0": x})))

    sums: dict[tuple[str, int], Tensor] = {}
    cosine = torch.zeros(len(layers), dtype=torch.float64)
    written = {dim: torch.zeros_like(squares) for dim, squares in weight_squares(path, model.config, dtype).items()}
    moment, mean, num_units, num_tokens = 0, 0, 0, 0
    for sample in samples:
        model(input_ids=sample[None], use_cache=False)
        for key, activation in seen.items():
            absolute = activation.abs()
            reductions = [absolute.mean(0), activation.square().sum(0).sqrt(), absolute.var(0, unbiased=False)]
            added = torch.stack([torch.stack([value, value**2]) for value in reductions])
            sums[key] = sums.get(key, 0) + added
        for index in range(len(layers)):
            for before, after in zip(inputs[f"before{index}"], inputs[f"after{index}"], strict=True):
                cosine[index] += before @ after / (before.norm() * after.norm())
            add_written(written, index, layers[index], inputs, seen, made)
        for name, states in inputs.items():
            if name.startswith(("before", "after")):
                continue
            first = int(name.startswith("mlp_in"))  # each read takes every second token, the two of a layer in turn
            for state in states[first::2]:
                unit = state / state.square().mean().sqrt()
                moment, mean, num_units = moment + torch.outer(unit, unit), mean + unit, num_units + 1
        num_tokens += len(sample)
    sites = {site: max(index for other, index in sums if other == site) + 1 for site, _ in sums}
    return Statistics(
        sums={site: torch.stack([sums[site, index] for index in range(count)]) for site, count in sites.items()},
        cosine=cosine / num_tokens,
        second_moment=moment / num_units,
        mean=mean / num_units,
        samples=len(samples),
        tokens=num_tokens,
        model=open_checkpoint(path).fingerprint(),
        weight_squares=weight_squares(path, model.config, dtype),
        written={dim: written[dim] / num_tokens for dim in ("layers", "heads", "ffn")},
    )


def add_written(
    written: dict[str, Tensor],
    index: int,
    layer: nn.Module,
    inputs: dict[str, Tensor],
    seen: dict[tuple[str, int], Tensor],
    made: dict[tuple[str, int], Tensor],
) -> None:
    """The energy of each unit's own output, by the share of the output that gets into the stream."""
    before, middle, after = (inputs[f"{place}{index}"] for place in ("before", "mlp_in", "after"))
    o_proj, down_proj = (matrix.weight.double() for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj))
    heads = written["heads"].shape[1]
    size = o_proj.shape[1] // heads
    for token in range(len(before)):
        written["layers"][index] += (after[token] - before[token]).norm() ** 2 / after[token].norm() ** 2
        z, out = seen["attention_out", index][token], made["attention_out", index][token]
        passes = (middle[token] - before[token]).norm() / out.norm() / middle[token].norm()
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            written["heads"][index, head] += (o_proj[:, own] @ z[own] * passes).norm() ** 2
        z, out = seen["mlp_out", index][token], made["mlp_out", index][token]
        passes = (after[token] - middle[token]).norm() / out.norm() / after[token].norm()
        written["ffn"][index] += (down_proj * z * passes).square().sum(0)


def weight_squares(path: Path, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """By the names of the matrices, which are fused in Phi-3."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    ffn, hidden, count = config.intermediate_size, config.hidden_size, config.num_hidden_layers
    zeros = torch.zeros(count, dtype=torch.float64)
    found = {"layers": zeros.clone(), "hidden": torch.zeros(hidden, dtype=torch.float64)}
    found |= {dim: zeros[:, None].repeat(1, n) for dim, n in (("ffn", ffn), ("heads", heads), ("kv_heads", kv_heads))}
    for name, tensor in tiny.tensors(path).items():
        if ".layers." not in name or tensor.ndim != 2:
            continue
        layer, kind = int(name.split(".")[2]), name.split(".")[-2]
        square = tensor.to(dtype).double().square()
        inner = square if kind in ("o_proj", "down_proj") else square.T  # [hidden, others]
        found["layers"][layer] += square.sum()
        found["hidden"] += inner.sum(1)
        others = inner.sum(0)
        if kind in ("q_proj", "o_proj"):
            found["heads"][layer] += others.view(heads, -1).sum(1)
        elif kind in ("k_proj", "v_proj"):
            found["kv_heads"][layer] += others.view(kv_heads, -1).sum(1)
        elif kind == "qkv_proj":
            by_head = others.view(heads + 2 * kv_heads, -1).sum(1)
            found["heads"][layer] += by_head[:heads]
            found["kv_heads"][layer] += by_head[heads : heads + kv_heads] + by_head[heads + kv_heads :]
        else:
            found["ffn"][layer] += others.view(-1, ffn).sum(0)
    return found


ATTENTION_NORM = ("input_layernorm",)
MLP_NORM = ("pre_feedforward_layernorm", "post_attention_layernorm")  # Gemma 2 has both, and the first is the MLP's


def _norm(layer: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The norm in front of attention or MLP; OLMo 2 has none."""
    return _first(layer, names) if hasattr(layer, "input_layernorm") else None


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _watch(module: nn.Module, keep: Any) -> None:
    """Calls `keep` with the module's first input and its output, of the only sample, in float64."""
    module.register_forward_hook(lambda _, args, output: (keep(args[0][0].double(), output[0].double()), None)[1])


def assert_same(one: Statistics, other: Statistics, **tolerance: float) -> None:
    assert one.model == other.model
    for field in fields(Statistics):
        if field.name == "model":
            continue
        torch.testing.assert_close(getattr(one, field.name), getattr(other, field.name), **tolerance)


@pytest.mark.parametrize("directory", tiny.FIRST.values(), indirect=True)
def test_streamed_statistics_are_those_of_plain_loops(directory: Path) -> None:
    tokens = tiny.tokens(5, 12)
    assert_same(measure(directory, tokens), by_loops(directory, list(tokens)), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("directory", ["llama", "mistral-window", "qwen2", "gemma2", "gemma3"], indirect=True)
def test_statistics_of_padded_samples_are_those_of_the_samples_alone(directory: Path) -> None:
    tokens = tiny.tokens(len(LENGTHS), max(LENGTHS))
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    alone = [sample[:length] for sample, length in zip(tokens, LENGTHS, strict=True)]
    padded = measure(directory, tokens.where(valid, 0), valid=valid, batch=3)
    assert padded.tokens == sum(LENGTHS)
    assert_same(padded, by_loops(directory, alone), rtol=2e-5, atol=2e-6)


def test_what_stands_in_the_pads_does_not_matter(llama: Path) -> None:
    tokens = tiny.tokens(len(LENGTHS), max(LENGTHS))
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    one, other = (measure(llama, tokens.where(valid, pad), valid=valid) for pad in (0, 7))
    assert_same(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("directory", ["llama", "mistral-window", "gemma3"], indirect=True)
def test_statistics_do_not_depend_on_the_batch_size(directory: Path) -> None:
    tokens = tiny.tokens(7, 10)
    assert_same(measure(directory, tokens, 3), measure(directory, tokens, 7), rtol=1e-5, atol=1e-6)


def test_every_sum_is_float64(llama: Path) -> None:
    statistics = measure(llama, tiny.tokens(2, 6))
    sums = [
        *statistics.sums.values(),
        *statistics.weight_squares.values(),
        statistics.cosine,
        statistics.second_moment,
        statistics.mean,
    ]
    assert {tensor.dtype for tensor in sums} == {torch.float64}


@pytest.mark.parametrize("directory", ["llama-bfloat16", "gemma2", "phi3", "granite"], indirect=True)
def test_sums_of_bfloat16_activations_are_those_of_plain_loops(directory: Path) -> None:
    tokens = tiny.tokens(5, 12)
    found = measure(directory, tokens, batch=1, dtype=torch.bfloat16)
    expected = by_loops(directory, list(tokens), torch.bfloat16)
    # Products of the second moment are of values rounded to bfloat16, to 8 bits, which may be none of the machine's.
    rounded = {"second_moment": found.second_moment, "mean": found.mean}
    assert_same(found, replace(expected, **rounded), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.second_moment, expected.second_moment, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3, 700])
def test_sums_of_a_sample_are_those_in_float64(num_tokens: int, dtype: torch.dtype) -> None:
    activation = (3 + torch.randn(num_tokens, 40, generator=torch.Generator().manual_seed(0))).to(dtype)
    absolute = activation.double().abs()
    reductions = [absolute.mean(0), absolute.square().sum(0).sqrt(), absolute.var(0, unbiased=False)]
    expected = torch.stack([torch.stack([value, value.square()]) for value in reductions])
    torch.testing.assert_close(sample_sums([activation.abs()])[0], expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosines_summed_in_pieces_are_those_in_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(11, 40, generator=generator).to(dtype) for _ in range(2))
    one[5] = 0
    monkeypatch.setattr(module, "PIECE_BYTES", 3 * 40 * 4)
    dots = (one.double() * other.double()).sum(1)
    norms = one.double().norm(dim=1) * other.double().norm(dim=1)
    expected = sum(dot / norm for dot, norm in zip(dots, norms, strict=True) if norm)
    torch.testing.assert_close(cosine_sum(one, other).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_moment_of_values_that_bfloat16_holds_is_exact(dtype: torch.dtype) -> None:
    signs = torch.randint(0, 2, (4, 333, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    moment = module._Moment(64, torch.device("cpu"))
    moment.add(iter(signs[:2].to(dtype)))
    moment.add(iter(signs[2:].to(dtype)))
    units = signs.flatten(0, 1).double()
    expected = units.T @ units / len(units), units.mean(0)
    torch.testing.assert_close(moment.means(), expected, rtol=0, atol=1e-12)


def test_the_second_moment_is_left_out_unless_asked_for(llama: Path, tmp_path: Path) -> None:
    tokens = tiny.tokens(2, 6)
    without = measure(llama, tokens, second_moment=False)
    assert without.second_moment is None and without.mean is None
    assert_same(without, replace(measure(llama, tokens), second_moment=None, mean=None), rtol=0, atol=0)
    without.save(tmp_path)
    assert_same(Statistics.load(tmp_path), without, rtol=0, atol=0)


def test_progress_names_each_layer_once(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    measure(llama, tiny.tokens(2, 6), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_save_and_load_round_trip(llama: Path, tmp_path: Path) -> None:
    statistics = measure(llama, tiny.tokens(2, 6))
    statistics.save(tmp_path)
    assert_same(Statistics.load(tmp_path), statistics, rtol=0, atol=0)


def test_missing_statistics_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no statistics; make them with `minitron calibrate`"):
        Statistics.load(tmp_path)
