"""The work of a run is timed on probes: the functions that the stages call, on a few layers and a little text.

What is timed grows with the layers and with the vocabulary. Two probes, which differ in the vocabulary alone, tell the
two parts apart, and each is multiplied up to the real model.
"""

from dataclasses import asdict

from minitron.core.files import scratch_directory
from minitron.model.describe import forward_flops
from minitron.pipeline.asked import Asked, Timed, TrainingSeconds, WorkSeconds
from minitron.pipeline.probe import ProbeSize, make_probe, probe_sizes
from minitron.pipeline.time_training import time_training
from minitron.pipeline.time_work import repair_is_timed, time_gguf, time_work


def time_run(asked: Asked) -> Timed:
    """Time the work of a run on probes."""
    found, sizes, gguf = [], probe_sizes(asked.teacher, asked.student), None
    block_tokens = asked.timed_block(sizes[0])
    for number, size in enumerate(sizes):
        with scratch_directory(None, prefix="minitron-probe-") as path:
            probe = make_probe(asked.teacher, asked.student, size, block_tokens, path)
            work = None if asked.trainings_only else time_work(asked, probe)
            found.append((work, {kind: time_training(asked, probe, kind) for kind in asked.kinds}))
            if number == 0 and not asked.trainings_only and asked.recipe.gguf.wanted:
                gguf = time_gguf(asked, probe)
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
    return Timed(real_work, made, repair_is_timed(asked), gguf)


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


def _more_attention(asked: Asked, block_tokens: int) -> float:
    """Return how much more a token of the run's blocks takes than one of the probe's, by its operations."""
    model = asked.teacher
    parameters = model.architecture.count(model.shape, model.config)
    longer, shorter = (forward_flops(model.shape, parameters, tokens) for tokens in (asked.block_tokens, block_tokens))
    return longer / shorter
