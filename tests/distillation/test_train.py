"""The training loop is plain AdamW on a naive KL, and an interrupted run ends with the bits of an undisturbed one."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from trainings import Heard, resolved, training

from minitron.core.device import pick_device
from minitron.core.errors import Interrupted, MinitronError, RecipeError, RunError
from minitron.data.corpus import Blocks, Corpus, batch_rows, next_rows
from minitron.distillation.config import DistillConfig
from minitron.distillation.schedule import Rates, Schedule, num_steps, of_scratch
from minitron.distillation.train import Training, distill, distill_until
from minitron.model.architecture import Shape
from minitron.model.checkpoint import open_checkpoint
from minitron.model.hidden_states import capture_hidden_states
from minitron.model.samples import Separator
from minitron.pruning.cut import cut

STEPS, BATCH, BLOCK = 10, 4, 16
CONFIG = DistillConfig(
    tokens=STEPS * BATCH * BLOCK,
    batch_blocks=BATCH,
    learning_rate=3e-3,
    warmup_steps=2,
    precision="float32",
    checkpoint_steps=3,
    evaluate_steps=4,
    evaluate_blocks=8,
)
ON_LOGITS = CONFIG.model_copy(update={"intermediate": "off", "optimizer": "adamw"})


def unexpected(text: str) -> None:
    raise AssertionError(text)


@dataclass(frozen=True)
class Bench:
    """A teacher, a student cut from it at random, their text, and the student that one undisturbed run makes of it."""

    teacher: Path
    student: Path
    corpus: Corpus
    undisturbed: Path

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        return open_checkpoint(self.student).shape, open_checkpoint(self.teacher).shape

    def distill(self, at: Path, config: DistillConfig = CONFIG, **options: Any) -> Path:
        """Train in the directory `at`; the student is in `at / "out"`."""
        (at / "out").mkdir(parents=True, exist_ok=True)
        distill(self.training(at, config, **options), at / "out")
        return at / "out"

    def training(self, at: Path, config: DistillConfig, **options: Any) -> Training:
        heard = {name: options.pop(name) for name in ("progress", "warn") if name in options}
        arguments = {"student": self.student, "teacher": self.teacher, "corpus": self.corpus} | options
        listener = Heard(**{"warn": unexpected} | heard)
        return training(**arguments, config=self.resolved(config), work=at / "distill", listener=listener)

    def until(self, step: int, at: Path, config: DistillConfig = CONFIG, **options: Any) -> float:
        """Train up to a step, judged on four held-out blocks."""
        judge = self.corpus.heldout.head(4)
        return distill_until(self.training(at, config, **options), step, judge)

    def rates(self, config: DistillConfig) -> Rates:
        return Schedule.of_student(self.resolved(config), BLOCK, 0).rates

    def resolved(self, config: DistillConfig) -> DistillConfig:
        return resolved(config, *self.shapes, block_tokens=BLOCK, train_tokens=1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("bench")
    teacher = small.teacher(path / "teacher")
    checkpoint = open_checkpoint(teacher)
    (path / "student").mkdir()
    cut(checkpoint, tiny.plan(checkpoint.shape, hidden=24, ffn=24, layers=3), path / "student")
    bench = Bench(teacher, path / "student", small.corpus(path / "data", teacher, BLOCK), path / "undisturbed")
    bench.distill(bench.undisturbed)
    return bench


def at_step(wanted: int, act: Callable[[], None]) -> Callable[[int, int, str], None]:
    return lambda step, steps, note: act() if step == wanted else None


class PowerCut(Exception):
    pass


def power_cut() -> None:
    raise PowerCut


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = tiny.tensors(one), tiny.tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def assert_undisturbed(bench: Bench, at: Path) -> None:
    assert_same_weights(at / "out", bench.undisturbed / "out")
    metrics = [(path / "distill" / "metrics.jsonl").read_text() for path in (at, bench.undisturbed)]
    assert metrics[0] == metrics[1]


def naive_kl(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """Mean KL(teacher || student) over predicted tokens, from full logits."""
    with torch.no_grad():
        p = teacher(input_ids=tokens).logits[:, :-1].softmax(-1)
    q = student(input_ids=tokens).logits[:, :-1].softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean()


def test_learning_rate_is_that_of_torchs_schedulers() -> None:
    rates = Rates(100, 1e-3, 1e-4, 10)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=1e-4)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[10])
    for step in range(100):
        assert rates.at(step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        schedule.step()
    assert rates.at(55) == pytest.approx(5.5e-4)


@pytest.mark.parametrize(
    ("hidden", "tokens", "block", "rate", "batch", "warmup", "evaluate"),
    [
        (48, 1_500_000, 256, 8.3e-3, 8, 14, 73),
        (40, 20_000, 64, 3.5e-3, 4, 10, 64),
        (4096, 600_000_000, 2048, 9.8e-5, 29, 202, 1010),
        (4096, 94_000_000_000, 4096, 9.8e-5, 261, 1758, 8792),
        (4096, 10**13, 4096, 9.8e-5, 2295, 21275, 106379),
    ],
)
def test_resolve_fills_every_default_by_its_rule(
    bench: Bench, hidden: int, tokens: int, block: int, rate: float, batch: int, warmup: int, evaluate: int
) -> None:
    shape = replace(open_checkpoint(bench.student).shape, hidden=hidden)
    config = resolved(DistillConfig(), shape, shape, block_tokens=block, train_tokens=tokens)
    left_open = {name for name, value in config if value is None}
    correction = {"correction", "correction_tokens", "correction_learning_rate", "correction_warmup_steps"}
    assert left_open == {"top_k", "minutes", "stop_at_loss", *correction} and config.precision != "auto"
    assert (config.tokens, config.learning_rate, config.batch_blocks) == (tokens, rate, batch)
    assert config.min_learning_rate == pytest.approx(rate / 10)
    assert config.warmup_steps == warmup
    assert config.evaluate_steps == evaluate
    assert config.checkpoint_steps == num_steps(tokens, batch, block) // 10
    assert resolved(config, shape, shape, block_tokens=block, train_tokens=1) == config


def test_a_long_training_on_a_cpu_with_a_compiler_is_compiled(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_compiled(tokens: int) -> bool | None:
        return resolved(DistillConfig(), *bench.shapes, block_tokens=BLOCK, train_tokens=tokens).compile

    monkeypatch.setenv("CXX", sys.executable)  # some program that is there
    assert (is_compiled(10**6), is_compiled(10**10)) == (False, pick_device().type == "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert is_compiled(10**10) is False


def test_resolve_keeps_what_is_given(bench: Bench) -> None:
    given = CONFIG.model_copy(
        update={"min_learning_rate": 0.0, "warmup_steps": 0, "scratch_learning_rate": 0.5, "intermediate": "p1"}
        | {"optimizer": "adamw", "compile": False}
    )
    assert resolved(given, *bench.shapes, block_tokens=BLOCK, train_tokens=1) == given


def test_the_rate_goes_with_the_size_of_the_weights_and_that_of_scratch_does_not(bench: Bench) -> None:
    shape = bench.shapes[0]
    options = {"block_tokens": 16, "train_tokens": 10_000}

    def rate(weights_rms: float, batch_blocks: int = 128, **more: bool) -> float | None:
        config = DistillConfig(batch_blocks=batch_blocks)
        return resolved(config, shape, shape, weights_rms=weights_rms, **options, **more).learning_rate

    assert (rate(0.02), rate(0.04)) == (1.2e-3, 2.4e-3)
    assert (rate(0.02, repaired=True), rate(0.04, repaired=True)) == (6e-4, 1.2e-3)
    assert rate(10.0) == float(f"{0.4 / shape.hidden:.2g}")
    assert (rate(0.02, batch_blocks=32), rate(0.02, batch_blocks=512)) == (6e-4, 1.2e-3)
    plain, repaired = (
        resolved(DistillConfig(batch_blocks=128), shape, shape, weights_rms=0.02, repaired=flag, **options)
        for flag in (False, True)
    )
    assert of_scratch(repaired) == of_scratch(plain)
    assert of_scratch(plain).learning_rate == float(f"{0.4 / shape.hidden:.2g}")


def test_the_size_of_the_weights_is_their_root_mean_square(bench: Bench) -> None:
    tensors = tiny.tensors(bench.teacher)
    sizes = sorted(tensor.square().mean().sqrt().item() for name, tensor in tensors.items() if "_proj" in name)
    assert open_checkpoint(bench.teacher).weights_rms == pytest.approx(sizes[(len(sizes) - 1) // 2], rel=1e-5)


def test_distillation_lowers_the_kl_on_held_out_text(bench: Bench) -> None:
    heldout = torch.from_numpy(bench.corpus.heldout.select(slice(None)))
    teacher = tiny.model(bench.teacher)
    before, after = (
        naive_kl(tiny.model(path), teacher, heldout).item() for path in (bench.student, bench.undisturbed / "out")
    )
    assert after < 0.9 * before
    # The metrics hold the same number, over the first blocks only.
    rows = [json.loads(line) for line in (bench.undisturbed / "distill" / "metrics.jsonl").read_text().splitlines()]
    first = naive_kl(tiny.model(bench.undisturbed / "out"), teacher, heldout[: CONFIG.evaluate_blocks])
    assert rows[-1]["heldout_loss"] == pytest.approx(first.item(), rel=1e-5)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "heldout_loss" in row] == [4, 8, 10]


@pytest.mark.parametrize("variant", ["nemotron", "gemma2", "gemma3", "phi3", "olmo2", "granite"])
def test_the_loss_of_every_kind_of_family_is_the_naive_one(bench: Bench, variant: str, tmp_path: Path) -> None:
    teacher = tiny.checkpoint(variant, tmp_path / "teacher")
    checkpoint = open_checkpoint(teacher)
    (tmp_path / "student").mkdir()
    cut(checkpoint, tiny.plan(checkpoint.shape, ffn=24, layers=3), tmp_path / "student")
    one_step = CONFIG.model_copy(update={"tokens": BATCH * BLOCK, "warmup_steps": 0})
    bench.distill(tmp_path, one_step, teacher=teacher, student=tmp_path / "student")
    first = json.loads((tmp_path / "distill" / "metrics.jsonl").read_text().splitlines()[0])
    train = bench.corpus.train
    tokens = torch.from_numpy(train.select(batch_rows(len(train), seed=0, step=0, batch=BATCH)))
    expected = naive_kl(tiny.model(tmp_path / "student"), tiny.model(teacher), tokens)
    assert first["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert not torch.equal(*(tiny.tensors(tmp_path / name)["model.embed_tokens.weight"] for name in ("student", "out")))


def test_the_loss_of_documents_kept_apart_is_that_of_documents_alone(bench: Bench, tmp_path: Path) -> None:
    # A token that is in every block, as if each word were a document.
    separator = Separator(int(np.bincount(bench.corpus.train.tokens.flatten()).argmax()), leads=False)
    corpus = replace(bench.corpus, separator=separator)
    still = CONFIG.model_copy(update={"tokens": BATCH * BLOCK, "learning_rate": 1e-30, "micro_batch_tokens": 2 * BLOCK})
    bench.distill(tmp_path, still, corpus=corpus)
    first, last = (json.loads(line) for line in (tmp_path / "distill" / "metrics.jsonl").read_text().splitlines())
    teacher, student = tiny.model(bench.teacher), tiny.model(bench.student)
    train, heldout = corpus.train, corpus.heldout.head(CONFIG.evaluate_blocks)
    drawn = train.select(batch_rows(len(train), seed=0, step=0, batch=BATCH))
    for loss, blocks in ((first["loss"], drawn), (last["heldout_loss"], heldout.select(slice(None)))):
        total, count = 0.0, 0
        for block in torch.from_numpy(blocks):
            cuts = [0, *((block == separator.token).nonzero()[:, 0] + 1).tolist(), len(block)]
            for start, stop in pairwise(cuts):
                if stop - start > 1:
                    total += naive_kl(student, teacher, block[None, start:stop]).item() * (stop - start - 1)
                    count += stop - start - 1
        assert count < 0.9 * (blocks.size - len(blocks))
        assert loss == pytest.approx(total / count, rel=1e-5)


def plain_loop(bench: Bench, rows: Sequence[Any], rates: Sequence[float], clip: float) -> dict[str, Tensor]:
    """What torch and transformers make of the student in one step for each of `rows` and `rates`."""
    teacher, student = tiny.model(bench.teacher), tiny.model(bench.student).train()
    decayed = [p for name, p in student.named_parameters() if "norm" not in name]
    gains = [p for name, p in student.named_parameters() if "norm" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False, foreach=False)
    for blocks, rate in zip(rows, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        naive_kl(student, teacher, torch.from_numpy(bench.corpus.train.select(blocks))).backward()
        norm = torch.stack([p.grad.square().sum() for p in student.parameters()]).sum().sqrt()
        assert norm > clip
        for parameter in student.parameters():
            parameter.grad.mul_(clip / norm)
        optimizer.step()
        optimizer.zero_grad()
    return student.state_dict()


def assert_close(trained: Path, expected: dict[str, Tensor]) -> None:
    made = tiny.tensors(trained)
    for name, tensor in expected.items():
        torch.testing.assert_close(made[name], tensor, atol=5e-6, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_the_loop_is_a_plain_one_of_transformers_and_torch(bench: Bench, tmp_path: Path) -> None:
    steps = 3
    changes = {"tokens": steps * BATCH * BLOCK, "gradient_clip": 0.05, "warmup_steps": 0}
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=3e-4)
    rates = []
    for _ in range(steps):
        rates += cosine.get_last_lr()
        optimizer.step()
        cosine.step()
    rows = [batch_rows(len(bench.corpus.train), seed=0, step=step, batch=BATCH) for step in range(steps)]
    trained = bench.distill(tmp_path, ON_LOGITS.model_copy(update=changes))
    assert_close(trained, plain_loop(bench, rows, rates, 0.05))


def test_with_states_between_layers_too_the_loop_is_a_plain_one(bench: Bench, tmp_path: Path) -> None:
    """Maps between widths start as a least-squares fit to the first batch; the weight is 0, then 2 (1 - progress) times
    the ratio of the two losses in the step before."""
    steps, pairs = 4, [(0, 0), (1, 1), (2, 3), (3, 4)]
    config = CONFIG.model_copy(update={"tokens": steps * BATCH * BLOCK, "warmup_steps": 0, "gradient_clip": 1e9})
    trained = bench.distill(tmp_path, config)

    teacher, student = tiny.model(bench.teacher), tiny.model(bench.student).train()
    rows = [batch_rows(len(bench.corpus.train), seed=0, step=step, batch=BATCH) for step in range(steps)]
    batches = [torch.from_numpy(bench.corpus.train.select(blocks)) for blocks in rows]

    def states(model: Any, tokens: Tensor) -> list[Tensor]:
        with capture_hidden_states([*model.model.layers], range(5 if model is teacher else 4)) as kept:
            model(input_ids=tokens)
        found = [kept[place] for place in sorted(kept)]
        return [(each / each.square().mean(-1, keepdim=True).sqrt()).flatten(0, 1) for each in found]

    maps = []
    with torch.no_grad():
        ours, theirs = states(student, batches[0]), states(teacher, batches[0])
    for one, other in pairs:
        ridge = (1e-3 * len(ours[one])) ** 0.5 * torch.eye(24)  # states have a mean square of 1
        stacked, zeros = torch.cat([ours[one], ridge]), torch.zeros(24, 32)
        maps.append(torch.linalg.lstsq(stacked, torch.cat([theirs[other], zeros])).solution.requires_grad_())
    matrices = [p for p in student.parameters() if p.ndim == 2]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    groups = [{"params": matrices + maps, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    weight = 0.0
    for step, tokens in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = bench.rates(config).at(step)
        kl = naive_kl(student, teacher, tokens)
        with torch.no_grad():
            theirs = states(teacher, tokens)
        ours = states(student, tokens)
        between = sum(
            (1 - torch.cosine_similarity(ours[one] @ maps[number], theirs[other])).sum()
            for number, (one, other) in enumerate(pairs)
        )
        mean = between / (BATCH * (BLOCK - 1))
        (kl + weight * 2 * (1 - step / steps) * mean).backward()
        weight = (kl / mean).item()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(trained, student.state_dict())


@pytest.mark.parametrize("micro_batch_tokens", [1, 2 * BLOCK, 3 * BLOCK + 5])
def test_gradient_accumulation_gives_the_same_weights(bench: Bench, tmp_path: Path, micro_batch_tokens: int) -> None:
    short = {"tokens": 3 * BATCH * BLOCK, "learning_rate": 3e-4}
    whole = bench.distill(tmp_path / "whole", CONFIG.model_copy(update=short))
    short["micro_batch_tokens"] = micro_batch_tokens
    pieces = tiny.tensors(bench.distill(tmp_path / "pieces", CONFIG.model_copy(update=short)))
    for name, tensor in tiny.tensors(whole).items():
        torch.testing.assert_close(pieces[name], tensor, atol=1e-6, rtol=0)


def test_compiled_models_and_loss_give_the_same_weights(bench: Bench, tmp_path: Path) -> None:
    short = {"tokens": 3 * BATCH * BLOCK, "learning_rate": 3e-4}
    plain = tiny.tensors(bench.distill(tmp_path / "plain", CONFIG.model_copy(update=short)))
    torch._dynamo.utils.counters.clear()
    made = bench.distill(tmp_path / "compiled", CONFIG.model_copy(update=short | {"compile": True}))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, tensor in tiny.tensors(made).items():
        torch.testing.assert_close(tensor, plain[name], atol=1e-6, rtol=0)


def test_without_a_compiler_nothing_is_compiled(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RecipeError, match=r"distill.compile=true needs a C\+\+ compiler .*'no-such-compiler'"):
        bench.distill(tmp_path, CONFIG.model_copy(update={"compile": True}))


@pytest.mark.parametrize("steps", [(1,), (3,), (5,), (STEPS,), (2, 4, 7, 8)], ids=str)
def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(
    bench: Bench, tmp_path: Path, steps: tuple[int, ...]
) -> None:
    for step in steps:
        with pytest.raises(PowerCut):
            bench.distill(tmp_path, progress=at_step(step, power_cut))
        assert not any((tmp_path / "out").iterdir())
    bench.distill(tmp_path)
    assert_undisturbed(bench, tmp_path)


@pytest.mark.parametrize("stops", [(0,), (1, 2, 4), (5, 5, STEPS)], ids=str)
def test_a_training_in_rungs_ends_with_the_bits_of_an_undisturbed_one(
    bench: Bench, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    losses = [bench.until(step, tmp_path) for step in stops]
    assert not (tmp_path / "out").exists()
    bench.distill(tmp_path)
    assert_undisturbed(bench, tmp_path)
    if stops == (5, 5, STEPS):
        teacher, student = tiny.model(bench.teacher), tiny.model(tmp_path / "out")
        judged = torch.from_numpy(bench.corpus.heldout.head(4).select(slice(None)))
        assert losses[0] == losses[1]
        assert losses[2] == pytest.approx(naive_kl(student, teacher, judged).item(), rel=1e-5)


def test_after_no_step_the_student_is_judged_as_it_was_cut(bench: Bench, tmp_path: Path) -> None:
    judged = torch.from_numpy(bench.corpus.heldout.head(4).select(slice(None)))
    expected = naive_kl(tiny.model(bench.student), tiny.model(bench.teacher), judged).item()
    assert bench.until(0, tmp_path) == pytest.approx(expected, rel=1e-5)


def test_sigterm_in_a_rung_saves_the_state(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped at step 3 of 10"):
        bench.until(5, tmp_path, progress=at_step(2, terminate))
    bench.until(5, tmp_path)
    bench.distill(tmp_path)
    assert_undisturbed(bench, tmp_path)


@dataclass(frozen=True)
class Disturbed(Corpus):
    """A corpus that asks the training to stop while it reads the batch of a step, from 0."""

    step: int = 0

    @property
    def train(self) -> Blocks:
        left = [self.step]

        class OfStep(Blocks):
            def select(self, rows: np.ndarray | slice) -> np.ndarray:
                if left[0] == 0:
                    terminate()
                left[0] -= 1
                return super().select(rows)

        return OfStep(**vars(super().train))


@pytest.mark.parametrize("step", [0, 5])
def test_a_signal_between_micro_batches_saves_the_state_before_the_step(
    step: int, bench: Bench, tmp_path: Path
) -> None:
    student = shutil.copytree(bench.student, tmp_path / "student")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    small_steps = CONFIG.model_copy(update={"micro_batch_tokens": BLOCK})
    for name in ("undisturbed", "interrupted"):
        torch.manual_seed(0)
        if name == "interrupted":
            corpus = Disturbed(**vars(bench.corpus), step=step)
            with pytest.raises(Interrupted, match=f"stopped at step {step} of 10"):
                bench.distill(tmp_path / name, small_steps, student=student, corpus=corpus)
            torch.manual_seed(2)
        bench.distill(tmp_path / name, small_steps, student=student)
    assert_same_weights(tmp_path / "interrupted" / "out", tmp_path / "undisturbed" / "out")


def test_a_state_is_saved_when_so_much_time_has_passed(bench: Bench, tmp_path: Path) -> None:
    seldom = CONFIG.model_copy(update={"checkpoint_steps": 10, "checkpoint_minutes": 1e-9})
    with pytest.raises(PowerCut):
        bench.distill(tmp_path, seldom, progress=at_step(5, power_cut))
    assert [path.name for path in sorted((tmp_path / "distill").glob("state-*"))] == [
        f"state-{step * 4 * BLOCK:012d}" for step in (4, 5)
    ]


def test_dropout_draws_the_same_numbers_after_a_resume(bench: Bench, tmp_path: Path) -> None:
    student = shutil.copytree(bench.student, tmp_path / "student")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    for seed, at in ((0, tmp_path / "undisturbed"), (1, tmp_path / "other numbers"), (0, tmp_path / "interrupted")):
        torch.manual_seed(seed)
        if at.name == "interrupted":
            with pytest.raises(PowerCut):
                bench.distill(at, student=student, progress=at_step(5, power_cut))
            torch.manual_seed(2)
        bench.distill(at, student=student)
    assert_same_weights(tmp_path / "interrupted" / "out", tmp_path / "undisturbed" / "out")
    weights = [tiny.tensors(tmp_path / name / "out")["lm_head.weight"] for name in ("undisturbed", "other numbers")]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(("damaged", "goes_on_at"), [(1, 4), (2, 1)])
def test_damaged_states_are_named_and_trained_again(
    bench: Bench, tmp_path: Path, damaged: int, goes_on_at: int
) -> None:
    with pytest.raises(PowerCut):
        bench.distill(tmp_path, progress=at_step(8, power_cut))
    states = sorted((tmp_path / "distill").glob("state-*"))
    assert [state.name for state in states] == [f"state-{step * BATCH * BLOCK:012d}" for step in (3, 6)]
    for state in states[-damaged:]:
        (state / "optimizer.safetensors").write_bytes((state / "optimizer.safetensors").read_bytes()[:-100])
    said: list[str] = []
    seen: list[int] = []
    bench.distill(tmp_path, progress=lambda step, steps, note: seen.append(step), warn=said.append)
    assert seen[0] == goes_on_at
    assert f"{states[-1]} cannot be used: optimizer.safetensors is damaged" in said[0]
    assert said[-1].endswith("step 3" if damaged == 1 else "can be used: training starts again from step 0")
    assert_undisturbed(bench, tmp_path)


def test_without_a_listener_a_damaged_state_is_a_warning_of_pythons(bench: Bench, tmp_path: Path) -> None:
    bench.until(1, tmp_path)
    (state,) = (tmp_path / "distill").glob("state-*")
    (state / "state.json").unlink()
    said = [f"{state} cannot be used: state.json is missing", "starts again from step 0"]
    with pytest.warns(UserWarning, match="|".join(said)) as caught:
        bench.until(1, tmp_path, warn=warnings.warn)
    assert all(text in str(warning.message) for text, warning in zip(said, caught, strict=True))


def test_a_disk_that_fills_up_leaves_the_last_state_to_go_on_from(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = (
        r"cannot write .*/state-0+384: No space left on device; free some space and run the same command to go on "
    )
    with monkeypatch.context() as patch, pytest.raises(RunError, match=message + "from step 3"):
        bench.distill(tmp_path, progress=at_step(5, lambda: patch.setattr(os, "write", no_space)))
    assert [path.name for path in (tmp_path / "distill").glob("state-*")] == [f"state-{3 * BATCH * BLOCK:012d}"]
    assert not any((tmp_path / "out").iterdir())
    bench.distill(tmp_path)
    assert_undisturbed(bench, tmp_path)


@pytest.mark.parametrize("batch", [5, 8, 3])
def test_with_another_batch_training_goes_on_behind_the_blocks_read(bench: Bench, tmp_path: Path, batch: int) -> None:
    done, clip = 3, 0.05
    first = {5: 2, 8: 2, 3: 4}[batch]  # of the further steps: the blocks read are 2.4, 1.5 or 4 steps of the new batch
    before = ON_LOGITS.model_copy(update={"gradient_clip": clip})
    after = before.model_copy(update={"batch_blocks": batch})
    bench.until(done, tmp_path, before)
    with pytest.raises(PowerCut):
        bench.distill(tmp_path, after, progress=at_step(first + 2, power_cut))
    trained = bench.distill(tmp_path, after)

    steps, read = num_steps(STEPS * BATCH * BLOCK, batch, BLOCK), done * BATCH
    order = next_rows(len(bench.corpus.train), seed=0, drawn=0, count=read + (steps - first) * batch)
    rows = [*np.split(order[:read], done), *np.split(order[read:], steps - first)]
    rates = [bench.rates(before).at(step) for step in range(done)]
    rates += [bench.rates(after).at(step) for step in range(first, steps)]
    assert_close(trained, plain_loop(bench, rows, rates, clip))
    metrics = [json.loads(line) for line in (tmp_path / "distill" / "metrics.jsonl").read_text().splitlines()]
    seen = [row["tokens"] for row in metrics if "loss" in row]
    assert seen == (np.cumsum([len(part) for part in rows]) * BLOCK).tolist()


def test_another_number_of_tokens_is_another_schedule_from_there_on(bench: Bench, tmp_path: Path) -> None:
    done, steps, clip = 3, 6, 0.05
    before = ON_LOGITS.model_copy(update={"gradient_clip": clip})
    after = before.model_copy(update={"tokens": steps * BATCH * BLOCK})
    bench.until(done, tmp_path, before)
    trained = bench.distill(tmp_path, after)
    rates = [bench.rates(before).at(step) for step in range(done)]
    rates += [bench.rates(after).at(step) for step in range(done, steps)]
    rows = np.split(next_rows(len(bench.corpus.train), seed=0, drawn=0, count=steps * BATCH), steps)
    assert_close(trained, plain_loop(bench, rows, rates, clip))


def test_a_number_of_tokens_that_is_reached_leaves_the_student_as_it_is(bench: Bench, tmp_path: Path) -> None:
    bench.until(5, tmp_path)
    metrics = (tmp_path / "distill" / "metrics.jsonl").read_text()
    trained = bench.distill(tmp_path, CONFIG.model_copy(update={"tokens": 2 * BATCH * BLOCK}))
    newest = max((tmp_path / "distill").glob("state-*"))
    expected = load_file(newest / "student.safetensors")
    assert all(torch.equal(tensor, expected[f"model.{name}"]) for name, tensor in tiny.tensors(trained).items())
    assert (tmp_path / "distill" / "metrics.jsonl").read_text() == metrics


def train_in_a_process(bench: Bench, at: Path) -> None:
    transformers.utils.logging.disable_progress_bar()  # it has semaphores, which a kill would leave behind
    try:
        bench.distill(at, CONFIG.model_copy(update={"checkpoint_steps": 1}))
    except Interrupted:
        sys.exit(130)


def test_a_training_stopped_and_killed_at_random_moments_ends_with_the_same_bits(bench: Bench, tmp_path: Path) -> None:
    """Processes are forked from one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "minitron.distillation.train", "transformers.models.llama.modeling_llama"]
    )
    draw, metrics, codes = random.Random(0), tmp_path / "distill" / "metrics.jsonl", []
    kill, stop = context.Process.kill, context.Process.terminate
    for step, end in ((1, kill), (2, stop), (4, kill), (6, kill), (8, stop)):
        process = context.Process(target=train_in_a_process, args=(bench, tmp_path))
        process.start()
        while process.is_alive() and not (metrics.exists() and metrics.read_text().count('"loss"') >= step):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))  # about a step, much of which is the writing of its state
        end(process)
        process.join()
        codes.append(process.exitcode)
    assert {-signal.SIGKILL} < set(codes) <= {-signal.SIGKILL, -signal.SIGTERM, 130, 0}, codes
    process = context.Process(target=train_in_a_process, args=(bench, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_undisturbed(bench, tmp_path)


def test_a_line_of_metrics_cut_short_by_a_kill_is_forgotten(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(PowerCut):
        bench.distill(tmp_path, progress=at_step(5, power_cut))
    with (tmp_path / "distill" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tok')
    bench.distill(tmp_path)
    assert_undisturbed(bench, tmp_path)


def test_sigterm_saves_the_state_and_says_how_to_go_on(bench: Bench, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped at step 5 of 10; the state is saved, run the same command"):
        bench.distill(tmp_path, progress=at_step(4, terminate))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (tmp_path / "distill" / f"state-{5 * BATCH * BLOCK:012d}").is_dir()
    bench.distill(tmp_path)
    assert_undisturbed(bench, tmp_path)


def test_vocabularies_that_differ_are_refused(bench: Bench, tmp_path: Path) -> None:
    other = small.teacher(tmp_path / "other", vocab_size=336)
    with pytest.raises(MinitronError, match=r"vocabularies differ: .* has 336 tokens, .* has 320"):
        bench.distill(tmp_path, teacher=other)


def test_divergence_names_the_step_and_the_way_out(bench: Bench, tmp_path: Path) -> None:
    wild = CONFIG.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0})
    with pytest.raises(
        MinitronError,
        match=r"diverged at step 2: .* on training blocks \d+, .*: lower distill.learning_rate \(now 1e\+30\)",
    ):
        bench.distill(tmp_path, wild)
    assert not any((tmp_path / "out").iterdir())


def test_the_student_is_saved_in_the_dtypes_it_came_in(tmp_path: Path, bench: Bench) -> None:
    student = small.teacher(tmp_path / "student", "llama-bfloat16")
    out = bench.distill(tmp_path, CONFIG.model_copy(update={"tokens": BATCH * BLOCK}), student=student)
    saved = tiny.tensors(out)
    (state,) = (tmp_path / "distill").glob("state-*")
    stored = load_file(state / "student.safetensors")
    master = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    assert {name: tensor.dtype for name, tensor in saved.items()} == dict.fromkeys(master, torch.bfloat16)
    assert {tensor.dtype for tensor in master.values()} == {torch.float32}
    assert all(torch.equal(saved[name], tensor.bfloat16()) for name, tensor in master.items())


LOW_PRECISION = {
    weights: CONFIG.model_copy(update={"weights": weights, "precision": "bfloat16"})
    for weights in ("bfloat16_kahan", "bfloat16_stochastic")
}


@pytest.mark.parametrize("config", LOW_PRECISION.values(), ids=LOW_PRECISION)
def test_bfloat16_weights_go_on_with_the_same_bits_and_teach_as_float32_does(
    bench: Bench, tmp_path: Path, config: DistillConfig
) -> None:
    bench.distill(tmp_path / "undisturbed", config)
    for step in (2, 5, 8):
        with pytest.raises(PowerCut):
            bench.distill(tmp_path / "stopped", config, progress=at_step(step, power_cut))
    bench.distill(tmp_path / "stopped", config)
    assert_same_weights(tmp_path / "stopped" / "out", tmp_path / "undisturbed" / "out")
    logs = [(tmp_path / at / "distill" / "metrics.jsonl").read_text() for at in ("stopped", "undisturbed")]
    assert logs[0] == logs[1]
    exact = (bench.undisturbed / "distill" / "metrics.jsonl").read_text()
    losses = [[json.loads(line).get("heldout_loss") for line in log.splitlines()][-1] for log in (exact, logs[1])]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("config", LOW_PRECISION.values(), ids=LOW_PRECISION)
def test_a_student_of_bfloat16_weights_is_saved_in_the_dtypes_it_came_in(
    bench: Bench, tmp_path: Path, config: DistillConfig
) -> None:
    out = bench.distill(tmp_path, config.model_copy(update={"tokens": BATCH * BLOCK}))
    (state,) = (tmp_path / "distill").glob("state-*")
    held = load_file(state / "student.safetensors")
    moments = {n: t for n, t in load_file(state / "optimizer.safetensors").items() if not n.startswith("step.")}
    assert {tensor.dtype for tensor in (held | moments).values()} == {torch.bfloat16}
    for name, tensor in tiny.tensors(out).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, held[f"model.{name}"].float())


def test_bfloat16_weights_have_bfloat16_products(bench: Bench) -> None:
    config = CONFIG.model_copy(update={"weights": "bfloat16_kahan"})
    with pytest.raises(MinitronError, match=r"weights=bfloat16_kahan .*precision=float32 .*leave one of them"):
        bench.resolved(config)
    assert bench.resolved(config.model_copy(update={"precision": "auto"})).precision == "bfloat16"


def test_a_state_of_other_weights_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.until(1, tmp_path, LOW_PRECISION["bfloat16_kahan"])
    with pytest.raises(RunError, match=r"is of KahanAdamW on blocks of 16 .* this training is of StochasticAdamW"):
        bench.until(2, tmp_path, LOW_PRECISION["bfloat16_stochastic"])


def test_a_random_start_is_transformers_own_and_a_function_of_the_seed(bench: Bench, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    # A step too small to change a float32.
    still = CONFIG.model_copy(update={"tokens": BATCH * BLOCK, "learning_rate": 1e-30, "loss": "cross_entropy"})
    for seed in (0, 1):
        out = bench.distill(tmp_path / str(seed), still, teacher=None, kind=Schedule.of_scratch, seed=seed)
        torch.manual_seed(seed)
        expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(bench.student)).state_dict()
        started = tiny.tensors(out)
        assert all(torch.equal(started[name], expected[name]) for name in started)
    matrices = [name for name, tensor in started.items() if tensor.ndim == 2]
    first, pruned = tiny.tensors(tmp_path / "0" / "out"), tiny.tensors(bench.student)
    assert not any(torch.equal(started[name], other[name]) for name in matrices for other in (first, pruned))
