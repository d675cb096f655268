"""Laws of the repaired cut: it finds what an independent solver finds, and changes nothing that it need not."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import Statistics
from minitron.core.errors import PlanError
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.families import FAMILIES
from minitron.model.samples import Samples
from minitron.model.stream import Pass, Stream
from minitron.model.writing import write_checkpoint
from minitron.pruning.importance import activation_scores
from minitron.pruning.plan import Plan
from minitron.pruning.repair import BEST, REPAIRS, RepairConfig, Step, needed_steps, resolve_repair
from minitron.pruning.repair import writer as module
from minitron.pruning.repair.residual_basis import Basis, Channels, basis_obstacle, read_norm, residual_basis
from minitron.pruning.repair.writer import Evidence, Repaired, repaired_cut

TOKENS = tiny.tokens(8, 24)
CUT = {"hidden": 24, "ffn": 23, "kv_heads": 3, "heads": 3, "layers": 3}
FILLED = {"hidden": 24, "ffn": 23, "kv_heads": 3, "heads": 6, "layers": 3}
BASES = [*tiny.FIRST.values(), "llama-tied", "llama-biases", "nemotron-biases", "gemma2-untied"]


def known(checkpoint: Checkpoint) -> Evidence:
    statistics = measure_statistics(checkpoint, Samples(TOKENS), Pass(torch.float32), second_moment=True)
    scores = activation_scores(statistics, checkpoint.shape)
    return Evidence(statistics, scores, Samples(TOKENS))


def a_plan(checkpoint: Checkpoint, **sizes: int) -> Plan:
    return tiny.plan(checkpoint.shape, **(sizes or (FILLED if checkpoint.architecture.heads_fill_hidden else CUT)))


def repaired(checkpoint: Checkpoint, plan: Plan, out: Path, *steps: Step, batch: int = 3, **options: Any) -> Repaired:
    out.mkdir()
    given = {name: options.pop(name) for name in ("statistics", "scores", "samples") if name in options}
    evidence = replace(known(checkpoint), **given)
    return repaired_cut(checkpoint, plan, out, steps, evidence, Pass(torch.float32, batch), **options)


def every_possible_step(checkpoint: Checkpoint) -> list[Step]:
    steps = resolve_repair(RepairConfig(), checkpoint).steps
    assert steps is not None
    return steps if checkpoint.architecture.channel_norms else [*steps, "refit"]


def turned(checkpoint: Checkpoint, out: Path) -> Path:
    """The whole model in a residual basis of all directions."""
    plan, given = tiny.identity_plan(checkpoint.shape), known(checkpoint)
    architecture = checkpoint.architecture
    tied = read_norm(checkpoint, architecture.final_norm) if architecture.tied(checkpoint.config) else None
    moment = given.statistics.second_moment
    basis = residual_basis(moment, checkpoint.shape.hidden, centred=architecture.centred_norms, tied=tied)
    stream = Stream(checkpoint, Samples(TOKENS), Pass(torch.float32, batch=4))
    work = module._Repair(stream, plan, [REPAIRS["basis"]], basis, given.scores, lambda done, total: None)
    out.mkdir()
    with closing(work.pieces()) as pieces:
        shapes = {spec.name: (work.stored_dtype(spec), spec.shape(plan.student)) for spec in work.specs}
        write_checkpoint(out, config=work.config, tensors=shapes, pieces=pieces, carry_from=checkpoint.path)
    return out


def logits_differ_by(one: Path, other: Path) -> float:
    tokens = tiny.tokens(2, 12, seed=3)
    expected = tiny.logits(tiny.model(one), tokens)
    return ((tiny.logits(tiny.model(other), tokens) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("variant", BASES)
def test_a_model_in_a_full_residual_basis_gives_the_same_logits(variant: str, tmp_path: Path) -> None:
    path = tiny.checkpoint(variant, tmp_path / "teacher")
    checkpoint = open_checkpoint(path)
    tied = checkpoint.architecture.tied(checkpoint.config)
    if basis_obstacle(checkpoint.architecture, tied=tied):
        with pytest.raises(PlanError, match="cannot have a residual basis"):
            resolve_repair(RepairConfig(steps=["basis"]), checkpoint)
        return
    out = turned(checkpoint, tmp_path / "turned")
    assert logits_differ_by(path, out) < 1e-5
    assert ("lm_head.weight" in tiny.tensors(out)) == (not tied)
    name = checkpoint.architecture.embedding
    assert not torch.allclose(tiny.tensors(out)[name], tiny.tensors(path)[name], atol=1e-2)


@pytest.mark.parametrize("directory", tiny.FIRST.values(), indirect=True)
def test_with_nothing_removed_every_repair_leaves_the_same_bits(directory: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory)
    made = repaired(
        checkpoint, tiny.identity_plan(checkpoint.shape), tmp_path / "student", *every_possible_step(checkpoint)
    )
    assert made.plan == tiny.identity_plan(checkpoint.shape)
    before, after = tiny.tensors(directory), tiny.tensors(tmp_path / "student")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("directory", tiny.FIRST.values(), indirect=True)
def test_a_repaired_student_has_the_planned_shape_and_loads(directory: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory)
    plan = a_plan(checkpoint)
    made = repaired(checkpoint, plan, tmp_path / "student", *every_possible_step(checkpoint))
    student = open_checkpoint(tmp_path / "student")
    assert student.shape == plan.student and made.plan.student == plan.student
    assert student.parameters == checkpoint.architecture.count(plan.student, student.config)
    assert tiny.logits(tiny.model(student.path), tiny.tokens(1, 9)).isfinite().all()
    assert student.dtype == checkpoint.dtype


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "gemma2", "olmo2", "nemotron", "phi3"])
def test_without_fitted_steps_a_repaired_cut_is_the_plain_cut(variant: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.checkpoint(variant, tmp_path / "teacher"))
    plan = a_plan(checkpoint)
    repaired(checkpoint, plan, tmp_path / "plain")
    stream = Stream(checkpoint, Samples(TOKENS), Pass(torch.float32, batch=4))
    scores, kept = known(checkpoint).scores, Channels(torch.tensor(plan.hidden))
    work = module._Repair(stream, plan, [], kept, scores, lambda done, total: None)
    plain = tiny.tensors(tmp_path / "plain")
    with closing(work.pieces()) as pieces:
        parts = list(pieces)
    for spec in work.specs:
        found: list[Tensor] = []
        while sum(map(len, found)) < spec.shape(plan.student)[0]:
            found.append(parts.pop(0))
        torch.testing.assert_close(torch.cat(found), plain[spec.name], rtol=0, atol=1e-6)


def activations(path: Path, name: str) -> Tensor:
    """Inputs of a module in transformers' own model, float64 [tokens, channels]."""
    model, seen = tiny.model(path), []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
    tiny.logits(model, TOKENS)
    return torch.cat(seen)


@pytest.mark.parametrize("variant", ["llama", "mistral-head_dim", "gemma2", "phi3", "nemotron"])
def test_least_squares_gives_the_kept_neurons_the_weights_that_a_regression_finds(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron.pruning.repair.columns.CORRELATION_RIDGE", 0.0)
    checkpoint = open_checkpoint(tiny.checkpoint(variant, tmp_path / "teacher"))
    plan = a_plan(checkpoint, ffn=23)
    repaired(checkpoint, plan, tmp_path / "student", "ffn_least_squares")
    name = "model.layers.{}.mlp.down_proj"
    for layer in (0, 3):
        inputs = activations(checkpoint.path, name.format(layer))
        weight = tiny.tensors(checkpoint.path)[f"{name.format(layer)}.weight"].double()
        found = tiny.tensors(tmp_path / "student")[f"{name.format(layer)}.weight"].double()
        expected = torch.linalg.lstsq(inputs[:, list(plan.ffn[layer])], inputs @ weight.T).solution.T
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_least_squares_on_heads_is_the_regression_too(llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("minitron.pruning.repair.columns.CORRELATION_RIDGE", 0.0)
    checkpoint = open_checkpoint(llama)
    plan = a_plan(checkpoint, heads=4)
    repaired(checkpoint, plan, tmp_path / "student", "heads_least_squares")
    name, size = "model.layers.1.self_attn.o_proj", checkpoint.shape.head_dim
    inputs = activations(llama, name)
    weight = tiny.tensors(llama)[f"{name}.weight"].double()
    kept = [head * size + channel for head in plan.heads[1] for channel in range(size)]
    expected = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T).solution.T
    found = tiny.tensors(tmp_path / "student")[f"{name}.weight"].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def output_error(checkpoint: Checkpoint, student: Path, kept: Sequence[int], layer: int) -> float:
    name = f"model.layers.{layer}.mlp.down_proj"
    inputs = activations(checkpoint.path, name)
    whole = inputs @ tiny.tensors(checkpoint.path)[f"{name}.weight"].double().T
    part = inputs[:, list(kept)] @ tiny.tensors(student)[f"{name}.weight"].double().T
    return (whole - part).square().sum().item()


def test_what_obs_chooses_and_fits_loses_less_than_a_random_choice_and_that_less_than_no_fit(
    llama: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(llama)
    plan = a_plan(checkpoint, ffn=20)
    chosen = repaired(checkpoint, plan, tmp_path / "obs", "ffn_obs").plan
    repaired(checkpoint, plan, tmp_path / "fitted", "ffn_least_squares")
    repaired(checkpoint, plan, tmp_path / "plain")
    for layer in range(4):
        obs = output_error(checkpoint, tmp_path / "obs", chosen.ffn[layer], layer)
        fitted = output_error(checkpoint, tmp_path / "fitted", plan.ffn[layer], layer)
        assert obs < fitted < output_error(checkpoint, tmp_path / "plain", plan.ffn[layer], layer)


def test_obs_keeps_equal_heads_in_every_kept_group(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama)
    plan = repaired(checkpoint, a_plan(checkpoint, kv_heads=2, heads=2), tmp_path / "student", "heads_obs").plan
    for heads, kv_heads in zip(plan.heads, plan.kv_heads, strict=True):
        assert [head // plan.teacher.group for head in heads] == list(kv_heads)


def test_residual_heads_are_the_papers_formula(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.checkpoint("mistral", tmp_path / "mqa", num_key_value_heads=1))
    plan = replace(a_plan(checkpoint, heads=5), heads=((0, 1, 2, 3, 4),) * 4)
    scores = known(checkpoint).scores
    ranked = torch.arange(8, 0, -1, dtype=torch.float64).expand(4, 8)  # head 0 is the best
    repaired(checkpoint, plan, tmp_path / "student", "residual_heads", scores=replace(scores, heads=ranked))
    name, size = "model.layers.2.self_attn.q_proj.weight", checkpoint.shape.head_dim
    before = tiny.tensors(checkpoint.path)[name].unflatten(0, (8, size))
    after = tiny.tensors(tmp_path / "student")[name].unflatten(0, (5, size))
    # L=8 heads, K=5 stay: head i gains head_i - head_(2K-i+1), counted from 1, for i in K-(L-K)+1..K.
    expected = [before[i] + (before[i] - before[10 - i - 1] if i + 1 > 2 else 0) for i in range(5)]
    torch.testing.assert_close(after, torch.stack(expected))


def test_a_norm_gain_makes_up_for_the_length_that_channels_take_along(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama)
    plan = a_plan(checkpoint, hidden=24)
    repaired(checkpoint, plan, tmp_path / "student", "norm_gain")
    model, states = tiny.model(llama), []
    model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    tiny.logits(model, TOKENS)
    (stream,) = states
    kept = stream[..., list(plan.hidden)]
    expected = (kept.square().mean(-1) / stream.square().mean(-1)).sqrt().mean()
    name = "model.layers.1.post_attention_layernorm.weight"
    ratio = tiny.tensors(tmp_path / "student")[name] / tiny.tensors(llama)[name][list(plan.hidden)]
    torch.testing.assert_close(ratio, expected.expand(24), rtol=1e-4, atol=0)


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "nemotron", "granite", "qwen2", "phi3"])
def test_a_refit_brings_the_student_nearer_to_the_teacher(variant: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.checkpoint(variant, tmp_path / "teacher"))
    plan = a_plan(checkpoint)
    steps = [step for step in every_possible_step(checkpoint) if step != "refit"]
    repaired(checkpoint, plan, tmp_path / "once", *steps)
    repaired(checkpoint, plan, tmp_path / "twice", *steps, "refit")

    def error(student: Path) -> float:
        wanted = tiny.logits(tiny.model(checkpoint.path), TOKENS).log_softmax(-1)
        found = tiny.logits(tiny.model(student), TOKENS).log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1).mean().item()

    assert error(tmp_path / "twice") < 0.9 * error(tmp_path / "once")


def added_between(path: Path, first: int, last: int) -> Tensor:
    """What the layers after `first`, up to `last`, add to the stream, as the outputs of a matrix: float64 [tokens,
    hidden]."""
    model, ends = tiny.model(path), {}
    for layer in (first, last):
        model.model.layers[layer].register_forward_hook(
            lambda _, args, made, layer=layer: ends.update({layer: made[0] if isinstance(made, tuple) else made})
        )
    tiny.logits(model, TOKENS)
    times = getattr(model.config, "residual_multiplier", 1.0)
    return (ends[last] - ends[first]).flatten(0, 1).double() / times


@pytest.mark.parametrize("step", ["refit", "layers_least_squares"])
@pytest.mark.parametrize("variant", ["llama", "granite", "nemotron"])
def test_what_a_dropped_layer_added_is_fitted_to_the_inputs_of_the_one_before(
    variant: str, step: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the last layer gone, the one before it writes what both wrote, as far as its own inputs tell."""
    monkeypatch.setattr("minitron.pruning.repair.refit.PRIOR_WEIGHT", 1e-6)
    monkeypatch.setattr("minitron.pruning.repair.columns.CORRELATION_RIDGE", 1e-6)
    path = tiny.checkpoint(variant, tmp_path / "teacher")
    checkpoint = open_checkpoint(path)
    plan = replace(a_plan(checkpoint, layers=3), layers=(0, 1, 2))
    repaired(checkpoint, plan, tmp_path / "student", step)
    name = "model.layers.2.mlp.down_proj"
    weight = tiny.tensors(path)[f"{name}.weight"].double()
    expected = weight + torch.linalg.lstsq(activations(path, name), added_between(path, 2, 3)).solution.T
    found = tiny.tensors(tmp_path / "student")[f"{name}.weight"].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_kept_neurons_take_over_from_dropped_neurons_and_from_the_dropped_layers_after_them(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron.pruning.repair.columns.CORRELATION_RIDGE", 1e-7)
    checkpoint = open_checkpoint(llama)
    plan = replace(a_plan(checkpoint, layers=2, ffn=23), layers=(0, 3))
    repaired(checkpoint, plan, tmp_path / "student", "ffn_least_squares", "layers_least_squares")
    student = tiny.tensors(tmp_path / "student")
    for number, layer in enumerate(plan.layers):
        inputs = activations(llama, f"model.layers.{layer}.mlp.down_proj")
        goal = inputs @ tiny.tensors(llama)[f"model.layers.{layer}.mlp.down_proj.weight"].double().T
        if layer == 0:
            goal = goal + added_between(llama, 0, 2)
        expected = torch.linalg.lstsq(inputs[:, list(plan.ffn[number])], goal).solution.T
        found = student[f"model.layers.{number}.mlp.down_proj.weight"].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    for name, tensor in student.items():
        if ".mlp." not in name:
            source = name.replace(".layers.1.", ".layers.3.")
            assert torch.equal(tensor, tiny.tensors(llama)[source]), name


def test_layers_dropped_before_the_first_have_no_one_to_take_over(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama)
    plan = replace(a_plan(checkpoint, layers=3), layers=(1, 2, 3))
    repaired(checkpoint, plan, tmp_path / "student", "layers_least_squares")
    before = tiny.tensors(llama)
    for name, tensor in tiny.tensors(tmp_path / "student").items():
        moved = {f".layers.{number}.": f".layers.{number + 1}." for number in range(3)}
        source = next((name.replace(*pair) for pair in moved.items() if pair[0] in name), name)
        assert torch.equal(tensor, before[source]), name


def test_a_repaired_cut_does_not_depend_on_the_batch_size_or_the_shards(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama)
    plan = a_plan(checkpoint)
    repaired(checkpoint, plan, tmp_path / "one", *BEST, "refit", batch=8)
    repaired(checkpoint, plan, tmp_path / "other", *BEST, "refit", batch=1, shard_bytes=20_000)
    assert logits_differ_by(tmp_path / "one", tmp_path / "other") < 1e-3


def test_steps_that_repair_what_is_not_cut_are_left_out(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    shape = checkpoint.shape
    assert needed_steps(list(REPAIRS), shape, replace(shape, ffn=20)) == ["ffn_least_squares", "ffn_obs", "refit"]
    assert needed_steps(list(REPAIRS), shape, shape) == []


def test_defaults_are_steps_that_the_family_can_have() -> None:
    for family in FAMILIES.values():
        obstacle = basis_obstacle(family, tied=False)
        assert (obstacle is not None) == (family.name in ("gemma2", "gemma3_text", "olmo2"))
    assert set(BEST) <= set(REPAIRS)


@pytest.mark.parametrize(
    ("variant", "steps", "message"),
    [
        ("llama", ["ffn_obs", "ffn_least_squares"], "both ffn_least_squares and ffn_obs, which do the same thing"),
        ("llama", ["basis", "norm_gain"], "both norm_gain and basis"),
        ("gemma2", ["basis"], r"this gemma2 model cannot have a residual basis, for .*post_attention_layernorm"),
        (
            "olmo2",
            ["refit"],
            r"matrices of olmo2 models cannot be fitted to the residual stream, for .* and `refit` out of repair.steps",
        ),
        ("nemotron-biases", ["basis"], r"with tied embeddings there is no matrix .*leave `basis` out"),
    ],
)
def test_steps_that_cannot_be_had_are_refused(variant: str, steps: list[Step], message: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.checkpoint(variant, tmp_path))
    with pytest.raises(PlanError, match=message):
        resolve_repair(RepairConfig(steps=steps), checkpoint)


def test_too_few_tokens_say_how_many_are_needed(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama)
    with pytest.raises(PlanError, match=r"ffn_obs solves for 40 columns .* there are 24: raise calibrate.samples"):
        repaired(checkpoint, a_plan(checkpoint, ffn=20), tmp_path / "student", "ffn_obs", samples=Samples(TOKENS[:1]))


def test_a_basis_without_a_second_moment_says_how_to_get_it(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama)
    statistics: Statistics = replace(known(checkpoint).statistics, second_moment=None)
    with pytest.raises(PlanError, match=r"no second moment of the residual stream.*calibrate --second-moment"):
        repaired(checkpoint, a_plan(checkpoint, hidden=24), tmp_path / "student", "basis", statistics=statistics)


def test_a_basis_holds_more_of_the_stream_than_any_channels(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    moment = known(checkpoint).statistics.second_moment
    basis = residual_basis(moment, 24)
    assert isinstance(basis, Basis)
    held = torch.trace(basis.directions.double().T @ moment @ basis.directions.double())
    assert held > moment.diagonal().sort(descending=True).values[:24].sum()
    torch.testing.assert_close(basis.directions.T @ basis.directions, torch.eye(24), atol=1e-5, rtol=0)


def test_units_that_are_given_are_fitted_and_not_chosen_again(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    assert resolve_repair(RepairConfig(), checkpoint, ["ffn", "hidden"]).steps == [
        "ffn_least_squares",
        "heads_obs",
        "layers_least_squares",
    ]
    assert resolve_repair(RepairConfig(), checkpoint, ["kv_heads"]).steps == [
        "basis",
        "ffn_obs",
        "heads_least_squares",
        "layers_least_squares",
    ]
    with pytest.raises(PlanError, match=r"ffn_obs chooses which ffn stay, but the plan lists them: use ffn_least_sq"):
        resolve_repair(RepairConfig(steps=["ffn_obs"]), checkpoint, ["ffn"])


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen3", "nemotron"])
def test_matrices_read_what_a_regression_guesses_of_the_teachers_states(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron.pruning.repair.residual_basis.CORRELATION_RIDGE", 1e-5)
    checkpoint = open_checkpoint(tiny.checkpoint(variant, tmp_path / "teacher"))
    architecture = checkpoint.architecture
    repaired(checkpoint, a_plan(checkpoint, hidden=24), tmp_path / "student", "basis")
    tied = read_norm(checkpoint, architecture.final_norm) if architecture.tied(checkpoint.config) else None
    moment, centred = known(checkpoint).statistics.second_moment, architecture.centred_norms
    directions = residual_basis(moment, 24, centred=centred, tied=tied).directions.double()
    student, teacher = tiny.tensors(tmp_path / "student"), tiny.tensors(checkpoint.path)
    for norm, matrices in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.up_proj",)),
    ):
        states = activations(checkpoint.path, f"model.layers.1.{norm}")
        states = states - states.mean(-1, keepdim=True) if centred else states
        full = states / states.square().mean(-1, keepdim=True).sqrt()
        part = full @ directions
        part = part / part.square().mean(-1, keepdim=True).sqrt()
        gains = [tensors[f"model.layers.1.{norm}.weight"].double() for tensors in (teacher, student)]
        gains = [gain + architecture.norm_gain_offset for gain in gains]
        for matrix in matrices:
            before, after = (tensors[f"model.layers.1.{matrix}.weight"].double() for tensors in (teacher, student))
            wanted, found = (full * gains[0]) @ before.T, (part * gains[1]) @ after.T
            if centred:  # what the matrices make of the norms' biases
                found = found + after.sum(1) - before @ teacher[f"model.layers.1.{norm}.bias"].double()
            best = part @ torch.linalg.lstsq(part, wanted, rcond=1e-6, driver="gelsd").solution
            torch.testing.assert_close(found, best, rtol=0, atol=5e-3 * wanted.abs().max().item())
