"""A teacher that is corrected is one that plain cross-entropy made, and its student learnt from that one."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from trainings import Heard, resolved, training

from minitron.cli.main import main
from minitron.core.errors import MinitronError
from minitron.data.corpus import Corpus, batch_rows, open_corpus
from minitron.distillation.config import DistillConfig
from minitron.distillation.schedule import Schedule, num_steps, of_correction, of_scratch
from minitron.distillation.train import CORRECTED, distill
from minitron.evaluation.quality import measure_quality
from minitron.model.checkpoint import open_checkpoint
from minitron.pipeline.run import run
from minitron.pruning.cut import cut
from minitron.recipe import build_recipe, load_recipe

STEPS, OWN_STEPS, BATCH, BLOCK, CLIP = 6, 4, 4, 16, 0.05
CONFIG = DistillConfig(
    tokens=STEPS * BATCH * BLOCK,
    batch_blocks=BATCH,
    learning_rate=3e-3,
    warmup_steps=1,
    gradient_clip=CLIP,
    precision="float32",
    checkpoint_steps=2,
    evaluate_steps=3,
    evaluate_blocks=8,
    intermediate="off",
    correction="parallel",
    correction_tokens=OWN_STEPS * BATCH * BLOCK,
    correction_learning_rate=1e-3,
    correction_warmup_steps=2,
)


@dataclass(frozen=True)
class Bench:
    """A teacher, a student cut from it at random, their text, and what one undisturbed training in parallel makes."""

    teacher: Path
    student: Path
    corpus: Corpus
    undisturbed: Path

    def distill(self, at: Path, config: DistillConfig = CONFIG, **options: Any) -> Path:
        listener = Heard(**options)
        (at / "out").mkdir(parents=True, exist_ok=True)
        arguments = (self.student, self.teacher, self.corpus, self.resolved(config), at / "distill")
        distill(training(*arguments, listener=listener), at / "out")
        return at / "out"

    def correct(self, at: Path, config: DistillConfig = CONFIG) -> Path:
        """By itself, before."""
        (at / "out").mkdir(parents=True)
        arguments = (self.teacher, None, self.corpus, self.resolved(config), at / "distill")
        distill(training(*arguments, kind=Schedule.of_correction), at / "out")
        return at / "out"

    def resolved(self, config: DistillConfig, **changes: Any) -> DistillConfig:
        shapes = (open_checkpoint(path).shape for path in (self.student, self.teacher))
        return resolved(config, *shapes, **{"block_tokens": BLOCK, "train_tokens": 1} | changes)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("bench")
    checkpoint = open_checkpoint(small.teacher(path / "teacher"))
    (path / "student").mkdir()
    cut(checkpoint, tiny.plan(checkpoint.shape, hidden=24, ffn=24, layers=3), path / "student")
    corpus = small.corpus(path / "data", checkpoint.path, BLOCK)
    bench = Bench(checkpoint.path, path / "student", corpus, path / "undisturbed")
    bench.distill(bench.undisturbed)
    return bench


def changed(**changes: Any) -> DistillConfig:
    return CONFIG.model_copy(update=changes)


def plain_optimizer(model: Any) -> torch.optim.Optimizer:
    matrices = [p for name, p in model.named_parameters() if "norm" not in name]
    gains = [p for name, p in model.named_parameters() if "norm" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False, foreach=False)


def plain_step(model: Any, optimizer: torch.optim.Optimizer, rate: float) -> None:
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    assert norm > CLIP
    for parameter in model.parameters():
        parameter.grad.mul_(CLIP / norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


def plain_loop(bench: Bench) -> tuple[Any, Any]:
    """The student and the teacher that transformers and torch make of them, in parallel."""
    config = bench.resolved(CONFIG)
    schedule, train = Schedule.of_student(config, BLOCK, 0), bench.corpus.train
    assert schedule.teacher_rates is not None
    models = [tiny.model(path).train() for path in (bench.student, bench.teacher)]
    student, teacher = models
    optimizers = [plain_optimizer(model) for model in models]
    for step in range(STEPS):
        tokens = torch.from_numpy(train.select(batch_rows(len(train), seed=0, step=step, batch=BATCH)))
        logits = teacher(input_ids=tokens).logits[:, :-1]
        p, q = logits.detach().softmax(-1), student(input_ids=tokens).logits[:, :-1].softmax(-1)
        (p * (p.log() - q.log())).sum(-1).mean().backward()
        plain_step(student, optimizers[0], schedule.rates.at(step))
        if step < OWN_STEPS:
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            plain_step(teacher, optimizers[1], schedule.teacher_rates.at(step))
    return student, teacher


def assert_close(made: Path, expected: dict[str, torch.Tensor], atol: float = 5e-6) -> None:
    found = tiny.tensors(made)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def assert_same(one: Path, other: Path) -> None:
    first, second = tiny.tensors(one), tiny.tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def metrics(at: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (at / "distill" / "metrics.jsonl").read_text().splitlines()]


def test_in_parallel_a_plain_loop_makes_the_same_teacher_and_student(bench: Bench) -> None:
    student, teacher = plain_loop(bench)
    assert_close(bench.undisturbed / "out", student.state_dict())
    assert_close(bench.undisturbed / "distill" / CORRECTED, teacher.state_dict())
    assert not torch.equal(
        *(tiny.tensors(path)["lm_head.weight"] for path in (bench.teacher, bench.undisturbed / "distill" / CORRECTED))
    )
    rows = [row for row in metrics(bench.undisturbed) if "loss" in row]
    assert ["teacher_loss" in row for row in rows] == [True] * OWN_STEPS + [False] * (STEPS - OWN_STEPS)


def test_the_teacher_corrected_in_parallel_is_the_one_corrected_before(bench: Bench, tmp_path: Path) -> None:
    before = bench.correct(tmp_path)
    assert_close(bench.undisturbed / "distill" / CORRECTED, tiny.tensors(before), atol=1e-6)
    ours = [row["teacher_loss"] for row in metrics(bench.undisturbed) if "teacher_loss" in row]
    assert ours == pytest.approx([row["loss"] for row in metrics(tmp_path) if "loss" in row], rel=1e-5)
    assert ours[-1] < ours[0]


def test_a_correction_at_a_rate_of_nothing_is_plain_distillation(bench: Bench, tmp_path: Path) -> None:
    still = bench.distill(tmp_path / "still", changed(correction_learning_rate=1e-30))
    fields = ("correction", "correction_tokens", "correction_learning_rate", "correction_warmup_steps")
    plain = bench.distill(tmp_path / "plain", changed(**dict.fromkeys(fields)))
    assert_same(still, plain)
    assert_same(tmp_path / "still" / "distill" / CORRECTED, bench.teacher)
    assert not (tmp_path / "plain" / "distill" / CORRECTED).exists()


@pytest.mark.parametrize("option", [{"micro_batch_tokens": 2 * BLOCK}, {"activation_checkpointing": True}], ids=str)
def test_what_saves_memory_changes_neither_model(bench: Bench, tmp_path: Path, option: dict[str, Any]) -> None:
    out = bench.distill(tmp_path, changed(**option))
    assert_close(out, tiny.tensors(bench.undisturbed / "out"))
    assert_close(tmp_path / "distill" / CORRECTED, tiny.tensors(bench.undisturbed / "distill" / CORRECTED))


def test_its_output_has_the_hidden_states(bench: Bench, tmp_path: Path) -> None:
    still = {"intermediate": "all", "correction_learning_rate": 1e-30}
    torch.manual_seed(0)
    first = bench.distill(tmp_path / "first", changed(**still))
    fields = ("correction", "correction_tokens", "correction_learning_rate", "correction_warmup_steps")
    torch.manual_seed(0)
    assert_same(first, bench.distill(tmp_path / "plain", changed(intermediate="all", **dict.fromkeys(fields))))


class PowerCut(Exception):
    pass


def power_cut_at(wanted: int) -> Callable[[int, int, str], None]:
    def progress(step: int, steps: int, note: str) -> None:
        if step == wanted:
            raise PowerCut

    return progress


@pytest.mark.parametrize("steps", [(1, 3), (5,)], ids=str)  # while the teacher learns, and after
def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(
    bench: Bench, tmp_path: Path, steps: tuple[int, ...]
) -> None:
    for step in steps:
        with pytest.raises(PowerCut):
            bench.distill(tmp_path, progress=power_cut_at(step))
    bench.distill(tmp_path)
    assert_same(tmp_path / "out", bench.undisturbed / "out")
    assert_same(tmp_path / "distill" / CORRECTED, bench.undisturbed / "distill" / CORRECTED)
    assert metrics(tmp_path) == metrics(bench.undisturbed)


def test_the_state_of_a_training_without_correction_is_refused(bench: Bench, tmp_path: Path) -> None:
    fields = ("correction", "correction_tokens", "correction_learning_rate", "correction_warmup_steps")
    with pytest.raises(PowerCut):
        bench.distill(tmp_path, changed(**dict.fromkeys(fields)), progress=power_cut_at(3))
    with pytest.raises(MinitronError, match=r"is of another training: teacher.model.* is absent there and float32"):
        bench.distill(tmp_path)


def test_a_teacher_that_diverges_names_its_own_rate(bench: Bench, tmp_path: Path) -> None:
    wild = {"correction_learning_rate": 1e30, "correction_warmup_steps": 0}
    message = r"training of the teacher diverged at step 2: .* lower distill.correction_learning_rate \(now 1e\+30\)"
    with pytest.raises(MinitronError, match=message):
        bench.distill(tmp_path, changed(**wild))


def test_defaults_follow_from_the_teacher_and_the_text(bench: Bench) -> None:
    fresh = DistillConfig(correction="before", tokens=100_000, batch_blocks=2048 // BLOCK)
    sizes = {"weights_rms": 0.5, "teacher_weights_rms": 0.01, "train_tokens": 80_000}
    found = bench.resolved(fresh, **sizes)
    assert (found.correction_tokens, found.correction_learning_rate) == (80_000, pytest.approx(0.2 * 0.06 * 0.01))
    assert found.correction_warmup_steps == num_steps(80_000, 128, BLOCK) // 5 and found.learning_rate == pytest.approx(
        0.4 / 24, rel=0.05
    )
    assert bench.resolved(found, **sizes | {"teacher_weights_rms": 1.0}) == found
    few = bench.resolved(fresh, **sizes | {"train_tokens": 5000, "teacher_weights_rms": 9.0})
    assert few.correction_tokens == 5000 and few.correction_warmup_steps == 0
    assert few.correction_learning_rate == pytest.approx(0.2 * 0.4 / 32, rel=0.05)
    many = bench.resolved(fresh.model_copy(update={"batch_blocks": 4}), **sizes)
    assert many.correction_warmup_steps == 120
    own = of_correction(found)
    assert own.min_learning_rate == own.learning_rate / 10 and own.loss == "cross_entropy" and own.correction is None
    assert of_scratch(found) == of_scratch(bench.resolved(fresh.model_copy(update={"correction": None}), **sizes))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["correction_tokens=5000"],
            "distill.correction_tokens has an effect only while the teacher is corrected; leave it out, or set "
            "distill.correction to before or parallel",
        ),
        (
            ["correction=before", "loss=cross_entropy"],
            "distill.correction=before trains a teacher that distill.loss=cross_entropy never asks: leave one of them "
            "out",
        ),
        (
            ["correction=parallel", "teacher=recorded"],
            "distill.correction=parallel changes the teacher at every step, and distill.teacher=recorded has it say "
            "everything before: set distill.correction=before, or leave distill.teacher out",
        ),
        (
            ["correction=parallel", "correction_tokens=5000"],
            "distill.correction_tokens=5,000 is more than distill.tokens=4,000, all that a teacher corrected in "
            "parallel reads: lower it, or set distill.correction=before",
        ),
        (["correction=after"], "distill.correction: Input should be 'before' or 'parallel' (got 'after')"),
        (["correction=parallel", "correction_learning_rate=0"], "distill.correction_learning_rate: Input should be gr"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_error(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], sets: list[str], message: str
) -> None:
    text = small.text(tmp_path / "text.jsonl")
    common = ["--tokens", "4K", "--out", str(tmp_path / "out"), *(f"--set=distill.{one}" for one in sets)]
    pair = ["--teacher", str(bench.teacher), "--student", str(bench.student), "--block-tokens", "16"]
    for words in (["distill", *pair, "--data", str(text)], ["compress", str(bench.teacher), "--target-params", "50%"]):
        if words[0] == "compress":
            words += ["--data", str(text), "--set", "data.block_tokens=16", "--set", "calibrate.samples=4"]
        assert main([*words, *common]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error
        assert not (tmp_path / "out").exists()


def test_a_correction_of_less_than_a_batch_is_refused(bench: Bench) -> None:
    message = (
        "distill.correction_tokens=5 is less than one batch of 4 blocks of 16 tokens: raise it, or lower "
        "distill.batch_blocks or data.block_tokens"
    )
    with pytest.raises(MinitronError, match=message):
        bench.resolved(changed(correction_tokens=5))


def test_text_of_the_teachers_own_corrects_nothing(bench: Bench, tmp_path: Path) -> None:
    raw = {"model": str(bench.teacher), "prune": {"target": "50%"}, "data": {"source": "teacher"}}
    recipe = build_recipe(raw, ["distill.correction=before", "distill.tokens=1000"])
    with pytest.raises(MinitronError, match=r"distill.correction=before .* data.source='teacher' is its own: leave"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def raw_recipe(path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(small.teacher(path / "teacher")),
        "data": {"source": str(small.text(path / "text.jsonl")), "heldout_fraction": 0.2, "block_tokens": BLOCK},
        "calibrate": {"samples": 8, "precision": "float32"},
        "prune": {"shape": {"hidden": 24, "ffn": 24, "layers": 3}},
        "distill": {
            "tokens": 10 * BATCH * BLOCK,
            "batch_blocks": BATCH,
            "evaluate_blocks": 4,
            "precision": "float32",
            "correction": "before",
            "correction_learning_rate": 1e-3,
        },
        "evaluate": {"blocks": 8, "prompts": ["the rain"], "new_tokens": 4, "speed": False},
    } | changes


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that corrects its teacher before, to read only."""
    path = tmp_path_factory.mktemp("before")
    run(build_recipe(raw_recipe(path)), path / "out")
    return path / "out"


def test_corrected_before_is_by_hand_cross_entropy_and_a_run_of_what_it_made(before: Path, tmp_path: Path) -> None:
    recipe = load_recipe(before / "recipe.yaml")
    corpus = open_corpus(before / "data")
    rates = Schedule.of_correction(recipe.distill, BLOCK, 0).rates
    model = tiny.model(before.parent / "teacher").train()
    optimizer, steps = plain_optimizer(model), rates.steps
    assert steps == min(10, corpus.train_tokens // (BATCH * BLOCK))
    for step in range(steps):
        rows = batch_rows(len(corpus.train), seed=0, step=step, batch=BATCH)
        tokens = torch.from_numpy(corpus.train.select(rows))
        logits = model(input_ids=tokens).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rates.at(step)
        optimizer.step()
        optimizer.zero_grad()
    assert_close(before / CORRECTED, model.state_dict(), atol=2e-5)

    plain = {"correction": None, "correction_tokens": None, "correction_learning_rate": None}
    plain |= {"correction_warmup_steps": None}
    by_hand = recipe.model_copy(
        update={"model": str(before / CORRECTED), "distill": recipe.distill.model_copy(update=plain)}
    )
    run(by_hand, tmp_path / "by hand")
    for name in ("pruned", "student"):
        assert_same(before / name, tmp_path / "by hand" / name)


def test_a_corrected_run_is_measured_against_the_teacher_as_it_was_given(before: Path) -> None:
    original, heldout = tiny.model(before.parent / "teacher"), open_corpus(before / "data").heldout.head(8)
    losses = {}
    for name, guide in (("teacher", None), (CORRECTED, original), ("student", original)):
        path = before.parent / "teacher" if name == "teacher" else before / name
        expected = measure_quality(tiny.model(path), heldout, teacher=guide).to_dict()
        measured = json.loads((before / "evaluations" / f"{name}.json").read_text())
        assert {key: measured[key] for key in expected} == pytest.approx(expected)
        losses[name] = measured["lm_loss"]
    corrected = tiny.model(before / CORRECTED)
    again = measure_quality(tiny.model(before / "student"), heldout, teacher=corrected).kl_to_teacher
    assert measured["kl_to_corrected"] == pytest.approx(again)
    assert "the KL divergence to the corrected one on held-out text is" in (before / "report.html").read_text()
    assert losses[CORRECTED] < losses["teacher"]
    how = "trained by cross-entropy on 640 tokens of the same text before it was measured, cut and distilled from"
    assert how in (before / "report.html").read_text() and how in (before / "student" / "README.md").read_text()
    assert json.loads((before / CORRECTED / "record.json").read_text())["result"]["training"]["steps"] == 10


def test_a_corrected_run_is_not_made_again(before: Path) -> None:
    class Heard:
        def __init__(self) -> None:
            self.states: set[str] = set()

        def stage(self, name: str, state: str) -> None:
            self.states.add(state)

        def progress(self, done: int, total: int, note: str = "") -> None: ...

        def warn(self, text: str) -> None:
            raise AssertionError(text)

    stored = load_recipe(before / "recipe.yaml")
    for recipe in (stored, build_recipe(raw_recipe(before.parent))):
        heard = Heard()
        run(recipe, before, heard)
        assert heard.states == {"unchanged"}
    other = stored.model_copy(update={"distill": stored.distill.model_copy(update={"correction_learning_rate": 2e-3})})
    message = r"corrected was made from other inputs; changed: .*correction.learning_rate \(0.001, now 0.002\)"
    with pytest.raises(MinitronError, match=message):
        run(other, before)


def test_the_stored_recipe_stopped_while_it_corrects_goes_on_to_the_same_student(before: Path, tmp_path: Path) -> None:
    class Impatient:
        at = 5

        def stage(self, name: str, state: str) -> None:
            self.name = name

        def progress(self, done: int, total: int, note: str = "") -> None:
            if self.name == CORRECTED and done == self.at:
                raise KeyboardInterrupt

        def warn(self, text: str) -> None:
            raise AssertionError(text)

    recipe = load_recipe(before / "recipe.yaml")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out", Impatient())
    assert list((tmp_path / "out" / f"distill-{CORRECTED}").glob("state-*"))
    run(recipe, tmp_path / "out")
    for name in (CORRECTED, "student"):
        assert_same(before / name, tmp_path / "out" / name)


def test_a_recorded_teacher_is_the_corrected_one(before: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        before / "recipe.yaml", ["distill.teacher=recorded", "distill.intermediate=off", "distill.top_k=20"]
    )
    run(recipe, tmp_path / "out")
    assert_same(before / CORRECTED, tmp_path / "out" / CORRECTED)
    facts = json.loads((tmp_path / "out" / "lessons" / "lessons.json").read_text())
    assert facts["model"] == open_checkpoint(before / CORRECTED).fingerprint()


def test_a_search_judges_students_of_the_teacher_that_learns_in_parallel(tmp_path: Path) -> None:
    """Its winner's short run is the beginning of the final one, teacher included."""
    raw = raw_recipe(tmp_path, prune={"target": "50%"})
    raw["distill"]["correction"] = "parallel"
    raw["search"] = {
        "level": "distilled",
        "window": 0.2,
        "dims": {"layers": "3", "ffn": "16-40/8", "hidden": "24-32/8"},
        "cut_candidates": 2,
        "distill_candidates": 2,
        "first_rung": 0.4,
        "judge_blocks": 4,
    }
    records = run(build_recipe(raw), tmp_path / "searched")
    config = load_recipe(tmp_path / "searched" / "recipe.yaml").distill
    assert config.correction_tokens == config.tokens
    (tmp_path / "out").mkdir()
    made = {"student": tmp_path / "out", CORRECTED: tmp_path / "work" / CORRECTED}
    corpus, start = open_corpus(tmp_path / "searched" / "data"), tmp_path / "searched" / "pruned"
    distill(training(start, tmp_path / "teacher", corpus, config, tmp_path / "work"), made["student"])
    for name, path in made.items():
        assert_same(tmp_path / "searched" / name, path)
    assert math.isfinite(records.evaluations[CORRECTED].kl_to_teacher or math.nan)
    page = (tmp_path / "searched" / "report.html").read_text()
    assert "while the student, cut from it as it was, learnt from it" in page and "as it was at each step" in page
