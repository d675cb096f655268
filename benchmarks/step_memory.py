"""Is the memory that a step is said to take the memory that it takes?

    python benchmarks/step_memory.py --models DIR ... [--shapes 'ffn=1024 layers=26' ...] [--block-tokens 256]
        [--settings '' 'optimizer=adamw intermediate=off' ...] [--out FILE]

Each setting runs in a process of its own: it loads both models, makes some training steps on random tokens, and
measures the peak of its resident memory in the last one, beyond what the process held before it loaded a model; the
same was done once before, so that libraries are loaded. Beside it stands the peak of `step_memory`, which runs the same
step on tensors without values. The allocator gives freed memory back at once, as its own reserve is no part of a step.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lib.measure import PeakMemory, header, in_fresh_process, publish, table

from minitron.core.device import compute_dtype, pick_device
from minitron.distillation.config import DistillConfig
from minitron.distillation.memory import step_memory
from minitron.distillation.schedule import ModelSize, Schedule, resolve
from minitron.distillation.step import add_gradients, blocks_at_once, clipped, set_up
from minitron.model.architecture import with_sizes
from minitron.model.checkpoint import Checkpoint, open_checkpoint, planned_checkpoint
from minitron.model.samples import Batch

TOKENS = 1_000_000  # of the training whose step it is
# glibc: blocks from 64 KB on are mapped one by one.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
STEPS = 3  # the optimizer makes its state in the first


def child(model: str, shape: str, block_tokens: int, settings: str) -> dict[str, Any]:
    """Return the estimated and the measured bytes of a step."""
    teacher, dtype = open_checkpoint(Path(model)), compute_dtype("auto", pick_device())
    # Its weights have any values: they change no size.
    student = planned_checkpoint(teacher, with_sizes(teacher.shape, **{dim: int(size) for dim, size in _pairs(shape)}))
    config = resolve(
        DistillConfig(tokens=TOKENS, compile=False, **{key: _value(text) for key, text in _pairs(settings)}),
        ModelSize(student.shape, teacher.weights_rms),
        ModelSize(teacher.shape, teacher.weights_rms),
        block_tokens=block_tokens,
        train_tokens=TOKENS,
        repaired=True,
    )
    schedule = Schedule.of_student(config, block_tokens, 0)
    said = step_memory(student, teacher, schedule, dtype, "cpu")
    _steps(student, teacher, schedule, None)  # so that libraries hold what they keep
    with PeakMemory() as whole:
        _steps(student, teacher, schedule, whole)
    return {"said": said.peak, "held": said.peak - said.working, "took": whole.peak.total}


def _steps(student: Checkpoint, teacher: Checkpoint, schedule: Schedule, memory: PeakMemory | None) -> None:
    """Load the models and make some steps, the last of which counts."""
    config, device = schedule.config, pick_device()
    learners = set_up(student, teacher, schedule, compute_dtype("auto", device), device)
    tokens = torch.randint(teacher.shape.vocab, (schedule.batch_blocks, schedule.block_tokens))
    parts = tokens.split(blocks_at_once(config.micro_batch_tokens, schedule.block_tokens))
    micros, num_predicted = [(Batch(part), 1.0) for part in parts], Batch(tokens).num_predicted
    for _ in range(STEPS):
        if memory is not None:
            memory.restart()
        add_gradients(learners, micros, num_predicted, between_weight=1.0)
        clipped(learners.trained, config.gradient_clip)
        learners.optimizer.step()
        learners.optimizer.zero_grad()


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdigit() else text


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(key, value) for key, _, value in (pair.partition("=") for pair in text.split())]


def main() -> None:
    if "--child" in sys.argv:
        print(json.dumps(child(**json.loads(sys.argv[-1]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--shapes", nargs="+", required=True, help="one for each model")
    parser.add_argument("--block-tokens", type=int, default=256)
    parser.add_argument("--settings", nargs="+", default=[""])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.update(GIVES_BACK)
    rows = []
    for model, shape in zip(args.models, args.shapes, strict=True):
        for settings in args.settings:
            found = in_fresh_process(
                __file__, model=model, shape=shape, block_tokens=args.block_tokens, settings=settings
            )
            ratio = found["said"] / found["took"]
            cells = [f"{found[key] / 1e6:,.0f}" for key in ("held", "said", "took")]
            rows.append([f"{Path(model).name}, {shape}", settings or "the defaults", *cells, f"{ratio:.2f}"])
    columns = ["teacher, student", "settings", "weights and optimizer, MB", "peak said, MB", "peak taken, MB", "ratio"]
    publish("\n".join([header("Memory of a training step"), table(columns, rows), ""]), args.out)


if __name__ == "__main__":
    main()
