"""The work of a run is timed on probes: the functions that the stages call, on a few layers and a little text.

What is timed grows with the layers and with the vocabulary. Two probes, which differ in the vocabulary alone, tell the
two parts apart, and each is multiplied up to the real model.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import CalibrateConfig, Statistics
from minitron.core.device import compute_dtype, pick_device
from minitron.core.files import scratch_directory
from minitron.core.progress import Silent
from minitron.data.corpus import draw_samples
from minitron.data.sampling import draw, probabilities
from minitron.data.sources import TEACHER
from minitron.distillation.config import DistillConfig
from minitron.distillation.recording import DEFAULT_TOP_K, record_logits
from minitron.distillation.schedule import ModelSize, Schedule, resolve
from minitron.distillation.teachers import TeacherSource
from minitron.distillation.train import Training, distill
from minitron.evaluation.quality import measure_quality
from minitron.evaluation.speed import Load, transformers_timer
from minitron.gguf.config import QUANTIZE_TOKENS, QuantizeConfig
from minitron.model.caches import GrowingLayer, without_copies
from minitron.model.checkpoint import load_model
from minitron.model.describe import forward_flops
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.pipeline.probe import WEIGHTS_RMS, Modelled, Probe, ProbeSize, make_probe, probe_sizes
from minitron.pruning.config import PruneConfig
from minitron.pruning.repair import Step, columns_of, needed_steps
from minitron.pruning.steps import Pruner, Scoring
from minitron.recipe import Recipe

_Made = TypeVar("_Made")
TrainingKind = Literal["student", "corrected", "scratch"]
# The operations of a timed training step, on a CPU and on a GPU: enough to be longer than what happens around it.
STEP_FLOPS, STEP_FLOPS_ON_GPU = 1e11, 1e13
LEAST_BLOCK = 64
# The operations of the longer one of two passes over samples.
PASS_FLOPS, PASS_FLOPS_ON_GPU = 2e11, 2e13
# Steps that are timed, one of which changes SOAP's axes and one of which saves; fewer of a batch of twice the size.
STEPS, SAVED_STEP, STEPS_OF_LARGER = 10, 5, 4
EVALUATED_BLOCKS = 4
# A repair that solves for more columns takes minutes a layer, and is not timed.
MOST_COLUMNS = 4096
DECODED = 16  # tokens


@dataclass(frozen=True)
class TrainingSeconds:
    """The seconds of a training's parts.

    start: loading, and what the first step takes longer than others.
    token: of a training token, forward and backward.
    update: of a step besides its tokens, which is the optimizer's.
    evaluation_block: of a held-out block in an evaluation.
    save: of a state.
    """

    start: float
    token: float
    update: float
    evaluation_block: float
    save: float

    def of(self, config: DistillConfig, block_tokens: int, heldout_blocks: int) -> float:
        """Add up a training whose settings are resolved."""
        assert config.tokens and config.batch_blocks
        assert config.evaluate_steps and config.evaluate_blocks and config.checkpoint_steps
        batch_tokens = config.batch_blocks * block_tokens
        steps = max(1, round(config.tokens / batch_tokens))
        evaluations, saves = (-(-steps // every) for every in (config.evaluate_steps, config.checkpoint_steps))
        return (
            self.start
            + steps * (self.update + batch_tokens * self.token)
            + evaluations * min(config.evaluate_blocks, heldout_blocks) * self.evaluation_block
            + saves * self.save
        )


@dataclass(frozen=True)
class WorkSeconds:
    """The seconds of work other than trainings; None for work that was not timed.

    calibration_start, calibration_token: of a pass that collects statistics, by token.
    lessons_token: of a token whose logits are recorded.
    repair_start, repair_token: of a cut with its repairs, by calibration token.
    load: of a teacher that is read into memory.
    teacher_token, student_token: of a held-out token, of the teacher alone and of a model against the teacher.
    prompt_token: of a token that is generated.
    sampled_step: of a token of each document of those that are sampled together.
    """

    calibration_start: float
    calibration_token: float
    lessons_token: float
    repair_start: float
    repair_token: float
    load: float
    teacher_token: float
    student_token: float
    prompt_token: float
    sampled_step: float


@dataclass(frozen=True)
class Timed:
    """The seconds of the parts of a run, of the real models."""

    work: WorkSeconds | None
    trainings: Mapping[str, TrainingSeconds]
    repair_known: bool = True
    gguf: "GgufSeconds | None" = None


@dataclass(frozen=True)
class GgufSeconds:
    """The seconds of the files of the student: all but their proof, and by held-out block of the proof."""

    start: float
    block: float


@dataclass(frozen=True)
class Asked:
    """What is to be timed: a recipe whose defaults are resolved, of two models.

    batch_tokens: of a training step, as far as it is known; None where the batch is yet to follow from a speed.
    kinds: the trainings.
    trainings_only: whether nothing else is timed.
    """

    recipe: Recipe
    teacher: Modelled
    student: Modelled
    block_tokens: int
    batch_tokens: int | None
    kinds: tuple[TrainingKind, ...]
    trainings_only: bool = False


def time_run(asked: Asked) -> Timed:
    """Time the work of a run on probes."""
    found, sizes, gguf = [], probe_sizes(asked.teacher, asked.student), None
    block_tokens = _timed_block(asked, sizes[0])
    for number, size in enumerate(sizes):
        with scratch_directory(None, prefix="minitron-probe-") as path:
            probe = make_probe(asked.teacher, asked.student, size, block_tokens, path)
            work = None if asked.trainings_only else time_work(asked, probe)
            found.append((work, {kind: time_training(asked, probe, kind) for kind in asked.kinds}))
            if number == 0 and not asked.trainings_only and asked.recipe.gguf.wanted:
                gguf = _time_gguf(asked, probe)
    works, trainings = [work for work, _ in found], [of for _, of in found]
    longer = _more_attention(asked, block_tokens)
    real_work = None
    if works[0] is not None:
        real = _real(asked, sizes, [asdict(one) for one in works if one is not None], passes=(1, 0))
        real_work = WorkSeconds(**real)
    made: dict[str, TrainingSeconds] = {}
    for kind in asked.kinds:
        passes = (0, 3) if kind == "scratch" else (3, 0) if kind == "corrected" else (1, 3)
        real = _real(asked, sizes, [asdict(of[kind]) for of in trainings], passes=passes)
        made[kind] = TrainingSeconds(**(real | {"token": longer * real["token"]}))
    return Timed(real_work, made, _repair_is_timed(asked), gguf)


def _real(
    asked: Asked, sizes: list[ProbeSize], timed: list[dict[str, float]], passes: tuple[int, int]
) -> dict[str, float]:
    """Multiply what was timed on probes up to the real models.

    Args:
        passes: how often teacher and student are gone through, by which their layers count.
    """
    teacher, student = asked.teacher, asked.student
    costs = passes[0] * teacher.layer_parameters, passes[1] * student.layer_parameters
    of_probe = costs[0] * sizes[0].layers + costs[1] * sizes[0].student_layers
    ratio = (costs[0] * teacher.shape.layers + costs[1] * student.shape.layers) / of_probe
    if len(sizes) == 1:
        return timed[0]
    real = {}
    for name, larger in timed[0].items():
        smaller = min(timed[1][name], larger)
        of_row = (larger - smaller) / (sizes[0].vocab - sizes[1].vocab)
        of_layers = max(0.0, larger - of_row * sizes[0].vocab)
        real[name] = ratio * of_layers + of_row * teacher.shape.vocab
    return real


def _parameters(asked: Asked, size: ProbeSize) -> int:
    head = size.vocab * asked.teacher.shape.hidden
    return size.layers * asked.teacher.layer_parameters + head


def _timed_block(asked: Asked, size: ProbeSize) -> int:
    """Return the tokens of a probe's blocks: of the run's, if a step of one of these is short enough to be timed."""
    flops = STEP_FLOPS if pick_device().type == "cpu" else STEP_FLOPS_ON_GPU
    return min(asked.block_tokens, max(LEAST_BLOCK, round(flops / (8 * _parameters(asked, size)))))


def _blocks_of_pass(asked: Asked, probe: Probe) -> int:
    flops = PASS_FLOPS if pick_device().type == "cpu" else PASS_FLOPS_ON_GPU
    blocks = round(flops / (2 * _parameters(asked, probe.size) * probe.corpus.block_tokens))
    return max(4, min(blocks, len(probe.corpus.train)))


def _more_attention(asked: Asked, block_tokens: int) -> float:
    """Return how much more a token of the run's blocks takes than one of the probe's, by its operations."""
    model = asked.teacher
    parameters = model.architecture.count(model.shape, model.config)
    longer, shorter = (forward_flops(model.shape, parameters, tokens) for tokens in (asked.block_tokens, block_tokens))
    return longer / shorter


class _Clock(Silent):
    """Notes when each step is done."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.times.append(time.perf_counter())

    def warn(self, text: str) -> None:
        pass

    @property
    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def time_training(asked: Asked, probe: Probe, kind: TrainingKind) -> TrainingSeconds:
    """Time the steps, an evaluation and a state of a training of the probe."""
    block_tokens = probe.corpus.block_tokens
    most = max(1, asked.recipe.distill.micro_batch_tokens // block_tokens)
    fits = max(1, _timed_block(asked, probe.size) // block_tokens)
    wanted = most if asked.batch_tokens is None else max(1, asked.batch_tokens // block_tokens)
    blocks = min(wanted, most, fits)
    started = time.perf_counter()
    steps = _steps(asked, probe, kind, blocks, STEPS)
    took = time.perf_counter() - started
    usual = [seconds for step, seconds in enumerate(steps, start=1) if step not in (1, SAVED_STEP, STEPS)]
    save = max(0.0, steps[SAVED_STEP - 1] - median(usual))
    evaluation = max(0.0, steps[-1] - save - median(usual)) / EVALUATED_BLOCKS
    token, update = mean(usual) / (blocks * block_tokens), 0.0
    if asked.batch_tokens != blocks * block_tokens:
        larger = median(_steps(asked, probe, kind, 2 * blocks, STEPS_OF_LARGER)[1:-1])
        token = min(token, max(0.0, larger - median(usual)) / (blocks * block_tokens))
        update = mean(usual) - token * blocks * block_tokens
    start = max(0.0, took - sum(steps[1:]) - median(usual))
    evaluation *= asked.block_tokens / block_tokens
    return TrainingSeconds(start, token, update, evaluation, save)


def _steps(asked: Asked, probe: Probe, kind: TrainingKind, blocks: int, steps: int) -> list[float]:
    """Return the seconds of each step of a short training, the first of which starts with nothing loaded."""
    block_tokens = probe.corpus.block_tokens
    config = asked.recipe.distill.model_copy(
        update={
            "tokens": steps * blocks * block_tokens,
            "minutes": None,
            "batch_blocks": blocks,
            "evaluate_steps": steps,
            "checkpoint_steps": min(SAVED_STEP, steps),
            "evaluate_blocks": EVALUATED_BLOCKS,
            "learning_rate": 1e-6,
            "min_learning_rate": 0.0,
            "warmup_steps": 0,
            "stop_at_loss": None,
            "compile": False,  # it would take longer than all the rest, to find a step that is a tenth shorter
            "correction_tokens": None,
            "log_to": [],
        }
    )
    sizes = (ModelSize(model.shape, WEIGHTS_RMS) for model in (probe.student, probe.teacher))
    train_tokens = probe.corpus.train_tokens
    resolved = resolve(config, *sizes, block_tokens=block_tokens, train_tokens=max(train_tokens, config.tokens or 0))
    schedules = {"student": Schedule.of_student, "corrected": Schedule.of_correction, "scratch": Schedule.of_scratch}
    clock, origin, source = _Clock(), probe.student.path, TeacherSource(checkpoint=probe.teacher.path)
    with scratch_directory(probe.path, prefix="timed-") as path:
        if kind != "student":
            source, origin = TeacherSource(), (probe.teacher if kind == "corrected" else probe.student).path
        elif resolved.teacher == "recorded":
            _record(asked, probe, path)
            source = TeacherSource(recording=path)
        (path / "out").mkdir()
        clock.times = [time.perf_counter()]
        schedule = schedules[kind](resolved, block_tokens, asked.recipe.seed)
        distill(Training(origin, source, probe.corpus, schedule, path / "work", clock), path / "out")
    return clock.steps


def _record(asked: Asked, probe: Probe, out: Path) -> float:
    """Record the logits of all blocks of the probe; return the seconds of a token."""
    corpus, config = probe.corpus, asked.recipe.distill
    blocks = np.concatenate([each.select(slice(None)) for each in (corpus.train, corpus.heldout)])
    pass_ = Pass(compute_dtype(config.precision, pick_device()))
    top_k = min(config.top_k or DEFAULT_TOP_K, probe.size.vocab)
    started = time.perf_counter()
    record_logits(
        probe.teacher, Samples(torch.from_numpy(blocks)), pass_, out, top_k=top_k, temperature=config.temperature
    )
    return (time.perf_counter() - started) / blocks.size


def time_work(asked: Asked, probe: Probe) -> WorkSeconds:
    """Time the work of the other stages on the probe."""
    recipe, block_tokens = asked.recipe, probe.corpus.block_tokens
    calibrate = recipe.calibrate
    few, many = 1, _blocks_of_pass(asked, probe)
    _calibration(probe, calibrate, few)  # the first is slower
    start, each = _line(lambda blocks: _calibration(probe, calibrate, blocks)[0], few, many)
    repair = (0.0, 0.0)
    if _repair_is_timed(asked):
        columns = _columns(asked)
        least = max(2, -(-columns // block_tokens))
        repair = _line(lambda blocks: _repair(asked, probe, blocks), least, max(2 * least, many))
    lessons = 0.0
    if recipe.distill.teacher == "recorded":
        with scratch_directory(probe.path, prefix="timed-") as path:
            lessons = _record(asked, probe, path)
    load, teacher = _timed(lambda: load_model(probe.teacher.path).to(pick_device()))
    student = load_model(probe.student.path).to(pick_device())
    blocks = probe.corpus.heldout.head(max(1, min(8, 2048 // block_tokens)))
    tokens = len(blocks) * block_tokens
    alone, _ = _best(lambda: measure_quality(teacher, blocks))
    pair, _ = _best(lambda: measure_quality(student, blocks, teacher=teacher))
    timer = transformers_timer(teacher)
    timer(Load(1, 16, 2))
    one = timer(Load(1, 16, DECODED)).decode_seconds / DECODED
    sampled = _sampled_step(teacher, asked) if recipe.data.source == TEACHER else 0.0
    return WorkSeconds(
        calibration_start=start,
        calibration_token=each / block_tokens,
        lessons_token=lessons,
        repair_start=repair[0],
        repair_token=repair[1] / block_tokens,
        load=load,
        teacher_token=alone / tokens,
        student_token=pair / tokens,
        prompt_token=one,
        sampled_step=sampled,
    )


@torch.no_grad()
def _sampled_step(model: Any, asked: Asked) -> float:
    """Return the seconds of a token of each document that is sampled, behind half as many as it may have."""
    rows, before = asked.recipe.data.sample_batch, asked.block_tokens // 2
    tokens = torch.zeros(rows, 1, dtype=torch.long, device=pick_device())
    known = tokens.new_ones(rows, before + DECODED)
    cache = model(input_ids=tokens, use_cache=True).past_key_values
    without_copies(cache)
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer) and layer.keys is not None:
            earlier = layer.keys[:, :, :1].expand(-1, -1, before - 1, -1)
            layer.update(earlier, earlier)

    def step(position: int) -> None:
        seen = known[:, : position + 1]
        output = model(input_ids=tokens, attention_mask=seen, past_key_values=cache, use_cache=True)
        draw(probabilities(output.logits[:, -1].float()), torch.full((rows,), 0.5))

    return median(_timed(partial(step, position))[0] for position in range(before, before + DECODED))


def _calibration(probe: Probe, config: CalibrateConfig, blocks: int) -> tuple[float, Statistics]:
    samples = draw_samples(probe.corpus, blocks, 0)
    return _timed(
        lambda: measure_statistics(
            probe.teacher, samples, config.as_pass(probe.path), second_moment=config.second_moment
        )
    )


def _columns(asked: Asked) -> int:
    """Return the most columns that a repair of the run solves for."""
    return max((columns_of(step, asked.teacher.shape) for step in _needed(asked)), default=0)


def _needed(asked: Asked) -> list[Step]:
    return needed_steps(asked.recipe.repair.steps or [], asked.teacher.shape, asked.student.shape)


def _repair_is_timed(asked: Asked) -> bool:
    return _columns(asked) <= MOST_COLUMNS


def _repair(asked: Asked, probe: Probe, blocks: int) -> float:
    """Cut the probe's teacher to its student with the repairs of the run; return the seconds."""
    config = asked.recipe.calibrate
    _, statistics = _calibration(probe, config.model_copy(update={"second_moment": True}), blocks)
    samples = draw_samples(probe.corpus, blocks, 0)
    scoring = Scoring(PruneConfig(), samples, config.as_pass(probe.path), None)
    pruner = Pruner(probe.teacher, scoring, asked.recipe.repair.steps or [], statistics)
    with scratch_directory(probe.path, prefix="timed-") as out:
        return _timed(lambda: pruner.make(probe.student.shape, out))[0]


def _time_gguf(asked: Asked, probe: Probe) -> GgufSeconds | None:
    """Time the files of the probe's student, and multiply by the parameters of the real one.

    Returns None where the probe lacks rows of the vocabulary: a file has the whole tokenizer.
    """
    from minitron.gguf.quantize import QuantizeText, write_ladder

    if probe.size.vocab != asked.teacher.shape.vocab:
        return None
    config, corpus = asked.recipe.gguf, probe.corpus
    tokens = draw_samples(corpus, 1, 0).tokens[:, :QUANTIZE_TOKENS]
    heldout = draw_samples(corpus, 4, 1).tokens[:, :QUANTIZE_TOKENS]

    def write(blocks: int) -> float:
        asked_for: QuantizeConfig = config.model_copy(update={"samples": 1, "blocks": blocks})
        with scratch_directory(probe.path, prefix="timed-") as out:
            text = QuantizeText(tokens, heldout[:blocks], "random")
            return _timed(lambda: write_ladder(probe.student, asked_for, out, text=text, name="probe"))[0]

    start, block = _line(write, 1, 4)
    student = asked.student
    real = student.architecture.count(student.shape, student.config).total
    ratio = real / probe.student.parameters.total
    return GgufSeconds(ratio * start, ratio * block)


def _line(seconds: Callable[[int], float], few: int, many: int) -> tuple[float, float]:
    """Return the seconds of work that do not depend on its amount, and those of each more."""
    less, more = seconds(few), seconds(many)
    each = max(0.0, more - less) / (many - few)
    return max(0.0, less - few * each), each


def _timed(work: Callable[[], _Made]) -> tuple[float, _Made]:
    started = time.perf_counter()
    made = work()
    return time.perf_counter() - started, made


def _best(work: Callable[[], _Made]) -> tuple[float, _Made]:
    """Return the shorter time of two: the first is slower."""
    return min((_timed(work) for _ in range(2)), key=lambda one: one[0])
