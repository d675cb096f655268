"""Does everything work on a GPU, how fast, and does a step take the memory that it is said to take?

    python benchmarks/gpu_proof.py --out FILE.json [--size gpu] [--stages rates,parity,...] [--seconds 540]
        [--scratch DIR]

For a machine with one GPU, lent for minutes: every stage runs in a process of its own with a time-out, and the file is
written after each, so that what was measured is kept whatever happens. A stage that fails leaves its last lines there.
The size `toy` does the same on small models, on a CPU too, which holds the script itself in working order.

- rates: large matrix products in each format, QR and eigenvectors.
- parity: tiny models of each family calibrated, cut, repaired, distilled, evaluated and sampled on the GPU and, with no
  GPU to be seen, on the CPU.
- teacher: a random teacher of 8 layers with the widths of Llama-3.1-8B is written, calibrated, cut and repaired.
- steps: steps on one block of 8,192 tokens under each of SETTINGS: seconds, share of the measured speed of products,
  and peak memory beside the one that `step_memory` says.
- resume: a training stopped by SIGTERM and resumed ends with the bits of an undisturbed one.
- shared: a training of one process that shards its models (FSDP2, over NCCL on a GPU) beside the same without.
- models: held-out quality of the student beside the teacher, and the speed of both in transformers.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lib.random_model import LLAMA, random_model

from minitron.calibration.collect import measure_statistics
from minitron.core.device import compute_dtype, pick_device
from minitron.core.machine import hardware, matmul_flops_per_second, versions
from minitron.core.progress import Silent
from minitron.data.config import DataConfig
from minitron.data.corpus import Blocks, Corpus, open_corpus
from minitron.data.writing import prepare
from minitron.distillation.config import DistillConfig
from minitron.distillation.memory import step_memory
from minitron.distillation.schedule import ModelSize, Schedule, resolve
from minitron.distillation.step import add_gradients, clipped, set_up
from minitron.distillation.teachers import TeacherSource
from minitron.distillation.train import Training, distill
from minitron.evaluation.quality import measure_quality
from minitron.evaluation.speed import Load, measure_in_turn, transformers_timer
from minitron.model.architecture import with_sizes
from minitron.model.checkpoint import Checkpoint, load_model, open_checkpoint
from minitron.model.describe import forward_flops
from minitron.model.samples import Batch, Samples
from minitron.model.stream import Pass
from minitron.model.tokenizer import load_tokenizer
from minitron.pruning.config import PruneConfig
from minitron.pruning.repair import RepairConfig, resolve_repair
from minitron.pruning.steps import Pruner, Scoring

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"pad_token_id": 0},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "phi3": {"pad_token_id": 0},
    "nemotron": {},
    "olmo2": {"pad_token_id": 0},
    "granite": {},
    "smollm3": {"pad_token_id": 0},
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "eos_token_id": 256,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "logits, AdamW": {"intermediate": "off", "optimizer": "adamw"},
    "logits, AdamW, activation checkpointing": {
        "intermediate": "off",
        "optimizer": "adamw",
        "activation_checkpointing": True,
    },
    "logits, AdamW, compiled": {"intermediate": "off", "optimizer": "adamw", "compile": True},
    "logits, bfloat16 with stochastic rounding": {"intermediate": "off", "weights": "bfloat16_stochastic"},
}


@dataclass(frozen=True)
class Size:
    """What one size of the proof runs on.

    teacher, student: the config of the large teacher, and the dims of its student that differ.
    samples: of calibration, blocks each.
    """

    teacher: dict[str, Any]
    student: dict[str, int]
    block_tokens: int
    samples: int
    sample_tokens: int
    steps: int
    families: tuple[str, ...]
    matrix: int
    seconds: dict[str, int]  # at most, by stage


SIZES = {
    "gpu": Size(
        LLAMA | {"num_hidden_layers": 8},
        {"hidden": 3072, "ffn": 9216},
        8192,
        32,
        2048,
        8,
        tuple(FAMILIES),
        8192,
        {"rates": 60, "parity": 150, "teacher": 150, "steps": 60, "resume": 60, "shared": 60, "models": 90},
    ),
    "toy": Size(
        LLAMA | TINY | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 16, "max_position_embeddings": 512},
        {"hidden": 96, "ffn": 192},
        64,
        8,
        32,
        4,
        ("llama", "gemma2"),
        256,
        dict.fromkeys(("rates", "parity", "teacher", "steps", "resume", "shared", "models"), 300),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--seconds", type=float, default=540.0, help="no stage is begun after these")
    parser.add_argument("--scratch", type=Path, help="where models go, some 10 GB; default the system's")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(_child(SIZES[args.size], **args.child)))
        return
    started, size = time.monotonic(), SIZES[args.size]
    found: dict[str, Any] = {"command": sys.argv, "size": args.size, "hardware": hardware(), "versions": versions()}
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="minitron-proof-") as work:
        for stage in args.stages.split(","):
            for name, words, hidden in _runs_of(stage, size):
                left = args.seconds - (time.monotonic() - started)
                key = stage if name is None else f"{stage}: {name}"
                limit = min(left, size.seconds[stage])
                found[key] = _run(args.size, {"stage": stage, "work": work, **words}, limit, hidden=hidden)
                args.out.write_text(json.dumps(found, indent=2))
                print(key, json.dumps(found[key])[:300], flush=True)
    if "parity: gpu" in found and "parity: cpu" in found:
        found["parity"] = _compared(found["parity: gpu"], found["parity: cpu"])
        args.out.write_text(json.dumps(found, indent=2))


def _runs_of(stage: str, size: Size) -> Iterator[tuple[str | None, dict[str, Any], bool]]:
    """The processes of a stage: a name, further arguments, and whether they are to see no GPU."""
    if stage == "parity":
        yield "gpu", {}, False
        yield "cpu", {}, True
    elif stage == "steps":
        for name in SETTINGS:
            yield name, {"setting": name}, False
    else:
        yield None, {}, False


def _run(size: str, words: dict[str, Any], limit: float, *, hidden: bool) -> dict[str, Any]:
    """Run a stage in a process of its own: what it prints last, its seconds, and its last lines where it fails."""
    if limit < 5:
        return {"skipped": "no time was left"}
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hidden else {})
    command = [sys.executable, __file__, "--out", "-", "--size", size, "--child", json.dumps(words)]
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        said = error.stderr or b""
        return {"timed out": limit, "stderr": (said if isinstance(said, str) else said.decode())[-1000:]}
    seconds = round(time.monotonic() - started, 1)
    if done.returncode:
        return {"failed": done.returncode, "seconds": seconds, "stderr": done.stderr[-3000:]}
    return {"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


def _child(size: Size, *, stage: str, work: str, **words: Any) -> dict[str, Any]:
    return STAGES[stage](size, Path(work), **words)


def rates(size: Size, work: Path) -> dict[str, Any]:
    device, found = pick_device(), {}
    for dtype in (torch.bfloat16, torch.float32):
        found[f"{dtype} TFLOP/s".removeprefix("torch.")] = matmul_flops_per_second(dtype, size.matrix) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = True
    found["tf32 TFLOP/s"] = matmul_flops_per_second(torch.float32, size.matrix) / 1e12
    matrix = torch.randn(size.matrix // 2, size.matrix // 2, device=device)
    moment = matrix @ matrix.T
    for name, work_of in {
        "qr": lambda: torch.linalg.qr(matrix),
        "eigh float32": lambda: torch.linalg.eigh(moment),
        "eigh float64": lambda: torch.linalg.eigh(moment.double()),
    }.items():
        work_of()
        found[f"{name} of {len(matrix)}, seconds"] = _timed(work_of)
    return found


def parity(size: Size, work: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    found: dict[str, Any] = {"device": str(pick_device())}
    for family in size.families:
        path = work / "tiny" / family
        if not path.exists():
            path.mkdir(parents=True)
            config = AutoConfig.for_model(family, **(TINY | FAMILIES[family])).to_dict()
            random_model(config | {"dtype": "bfloat16"}, path)
        teacher = open_checkpoint(path)
        with tempfile.TemporaryDirectory(dir=work) as directory:
            out = Path(directory) / "student"
            out.mkdir()
            pruner = _pruner(teacher, Samples(_tokens(teacher, 16, 32)), Pass(torch.float32))
            sizes = {"ffn": 96, "layers": 3} if teacher.architecture.heads_fill_hidden else {"hidden": 48, "ffn": 96}
            pruner.make(with_sizes(teacher.shape, **sizes), out)
            statistics = pruner.statistics
            assert statistics is not None
            losses = _losses(teacher, out, Path(directory) / "work")
            models = [load_model(at, torch.float32).to(pick_device()) for at in (out, path)]
            quality = measure_quality(models[0], _blocks(teacher, 8, 32), teacher=models[1])
            prompt = torch.arange(8, device=pick_device())[None]
            made = models[1].generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8)
            found[family] = {
                "statistics": [values.double().sum().item() for values in statistics.sums.values()],
                "kl": quality.kl_to_teacher,
                "losses": losses,
                "generated": made[0].tolist(),
            }
    return found


def teacher(size: Size, work: Path) -> dict[str, Any]:
    path, found = work / "teacher", {}
    path.mkdir()
    found["write seconds"] = _timed(lambda: random_model(size.teacher, path))
    checkpoint, device = open_checkpoint(path), pick_device()
    samples, pass_ = Samples(_tokens(checkpoint, size.samples, size.sample_tokens)), Pass(compute_dtype("auto", device))
    with _peak() as peak:
        kept: list[Pruner] = []
        found["calibrate seconds"] = _timed(lambda: kept.append(_pruner(checkpoint, samples, pass_)))
    found |= {"calibrate tokens": samples.tokens.numel(), "calibrate peak bytes": peak()}
    out = work / "student"
    out.mkdir()
    student = with_sizes(checkpoint.shape, **size.student)
    with _peak() as peak:
        found["cut and repair seconds"] = _timed(lambda: kept[0].make(student, out))
    return found | {"cut peak bytes": peak(), "parameters": checkpoint.parameters.total}


def steps(size: Size, work: Path, *, setting: str) -> dict[str, Any]:
    teacher, student = open_checkpoint(work / "teacher"), open_checkpoint(work / "student")
    device = pick_device()
    dtype = compute_dtype("auto", device)
    schedule = _schedule(student, teacher, size.block_tokens, size.steps, batch_blocks=1, **SETTINGS[setting])
    said = step_memory(student, teacher, schedule, dtype, "cuda" if device.type == "cuda" else "cpu")
    learners = set_up(student, teacher, schedule, dtype, device)
    tokens, seconds = _tokens(teacher, size.steps, size.block_tokens).to(device), []
    with _peak() as peak:
        for step in range(size.steps):
            started = _now(device)
            batch = Batch(tokens[step : step + 1])
            add_gradients(learners, [(batch, 1.0)], batch.num_predicted, between_weight=1.0)
            clipped(learners.trained, schedule.config.gradient_clip)
            learners.optimizer.step()
            learners.optimizer.zero_grad()
            seconds.append(_now(device) - started)
    usual = float(np.median(seconds[2:]))
    passes = forward_flops(teacher.shape, teacher.parameters, size.block_tokens)
    passes += 3 * forward_flops(student.shape, student.parameters, size.block_tokens)
    rate = passes * size.block_tokens / usual
    return {
        "optimizer": schedule.config.optimizer,
        "seconds of steps": seconds,
        "tokens/s": size.block_tokens / usual,
        "TFLOP/s": rate / 1e12,
        "share of a large product's speed": rate / matmul_flops_per_second(dtype, size.matrix),
        "peak bytes": peak(),
        "peak bytes said": said.peak,
        "said": vars(said),
    }


def resume(size: Size, work: Path) -> dict[str, Any]:
    teacher = open_checkpoint(_tiny(work))
    student, digests = _tiny_student(teacher, work), {}
    for name in ("undisturbed", "stopped"):
        if name == "stopped":
            try:
                _losses(teacher, student, work / name, stop_at=3)
            except BaseException as error:  # a signal that is answered, or not
                digests["ended by"] = type(error).__name__
        _losses(teacher, student, work / name)
        digests[name] = hashlib.sha256((work / name / "out" / "model.safetensors").read_bytes()).hexdigest()
    return digests | {"equal": digests["undisturbed"] == digests["stopped"]}


def shared(size: Size, work: Path) -> dict[str, Any]:
    import torch.distributed as dist
    import torch.distributed.fsdp

    teacher = open_checkpoint(_tiny(work))
    student = _tiny_student(teacher, work)
    alone = _losses(teacher, student, work / "alone")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{work}/meeting", rank=0, world_size=1)
    sharded = _losses(teacher, student, work / "sharded")
    dist.destroy_process_group()
    return {"backend": backend, "alone": alone, "sharded": sharded}


def models(size: Size, work: Path) -> dict[str, Any]:
    teacher, device = open_checkpoint(work / "teacher"), pick_device()
    dtype = compute_dtype("auto", device)
    loaded = {name: load_model(work / name, dtype).to(device) for name in ("teacher", "student")}
    blocks, found = _blocks(teacher, 8, min(1024, size.block_tokens)), {}
    started = _now(device)
    quality = measure_quality(loaded["student"], blocks, teacher=loaded["teacher"], batch=4)
    found["evaluation"] = {"seconds": _now(device) - started, "tokens": blocks.tokens.size, "loss": quality.lm_loss}
    loads = [Load(1, 16, 16), Load(8, 16, 16)]
    rows = measure_in_turn({name: transformers_timer(model) for name, model in loaded.items()}, loads, rounds=3)
    return found | {"speed": [row.to_dict() for row in rows]}


STAGES: dict[str, Callable[..., dict[str, Any]]] = {
    one.__name__: one for one in (rates, parity, teacher, steps, resume, shared, models)
}


def _compared(gpu: dict[str, Any], cpu: dict[str, Any]) -> dict[str, Any]:
    """The largest relative differences between the two devices, by family."""
    found: dict[str, Any] = {}
    for family in gpu.keys() & cpu.keys() & FAMILIES.keys():
        one, other = gpu[family], cpu[family]
        pairs = {"statistics": (one["statistics"], other["statistics"]), "losses": (one["losses"], other["losses"])}
        found[family] = {name: _apart(*pair) for name, pair in pairs.items()}
        found[family] |= {"kl": _apart([one["kl"]], [other["kl"]]), "same text": one["generated"] == other["generated"]}
    return found


def _apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in zip(one, other, strict=True))


def _pruner(teacher: Checkpoint, samples: Samples, pass_: Pass) -> Pruner:
    """The default cut and repair, with statistics of the samples."""
    repairs = resolve_repair(RepairConfig(), teacher).steps or []
    statistics = measure_statistics(teacher, samples, pass_, second_moment=True)
    return Pruner(teacher, Scoring(PruneConfig(target="50%"), samples, pass_, None), repairs, statistics)


def _tiny(work: Path) -> Path:
    path = work / "llama"
    if not path.exists():
        path.mkdir()
        random_model(LLAMA | TINY, path)
    return path


def _tiny_student(teacher: Checkpoint, work: Path) -> Path:
    out = work / "tiny student"
    if not out.exists():
        out.mkdir()
        pruner = _pruner(teacher, Samples(_tokens(teacher, 16, 32)), Pass(torch.float32))
        pruner.make(with_sizes(teacher.shape, ffn=96, layers=3), out)
    return out


def _schedule(student: Checkpoint, teacher: Checkpoint, block_tokens: int, steps: int, **settings: Any) -> Schedule:
    tokens = steps * settings["batch_blocks"] * block_tokens
    config = resolve(
        DistillConfig(**({"tokens": tokens} | settings)),
        ModelSize(student.shape, student.weights_rms),
        ModelSize(teacher.shape, teacher.weights_rms),
        block_tokens=block_tokens,
        train_tokens=tokens,
        repaired=True,
    )
    return Schedule.of_student(config, block_tokens, 0)


class _Stopping(Silent):
    """Asks the training to stop after a step."""

    def __init__(self, at: int):
        self.at = at

    def progress(self, done: int, total: int, note: str = "") -> None:
        if done == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def _corpus(model: Checkpoint, work: Path) -> Corpus:
    """A text of random words in blocks of 32 tokens, which are bytes."""
    if not (work / "data").exists():
        (work / "data").mkdir()
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(64)]
        (work / "text.txt").write_text("\n\n".join(" ".join(draw.choices(words, k=40)) for _ in range(100)))
        config, tokenizer = DataConfig(source=str(work / "text.txt"), block_tokens=32), load_tokenizer(model.path)
        prepare(config, tokenizer, vocab=model.shape.vocab, block_tokens=32, out=work / "data")
    return open_corpus(work / "data")


def _losses(teacher: Checkpoint, student: Path, work: Path, stop_at: int = -1) -> list[float]:
    """Distil in float32: the loss of each step."""
    out = work / "out"
    out.mkdir(parents=True, exist_ok=True)
    opened = open_checkpoint(student)
    schedule = _schedule(opened, teacher, 32, 8, batch_blocks=4, precision="float32", compile=False, optimizer="soap")
    text, source = _corpus(teacher, work.parent), TeacherSource(teacher.path)
    distill(Training(student, source, text, schedule, work / "state", _Stopping(stop_at)), out)
    rows = [json.loads(line) for line in (work / "state" / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(work / "state")
    return [row["loss"] for row in rows if "loss" in row]


def _tokens(model: Checkpoint, count: int, length: int) -> torch.Tensor:
    return torch.randint(0, model.shape.vocab, (count, length), generator=torch.Generator().manual_seed(count))


def _blocks(model: Checkpoint, count: int, length: int) -> Blocks:
    return Blocks(_tokens(model, count, length).numpy(), np.ones((count, length), dtype=np.int64))


@contextmanager
def _peak() -> Iterator[Callable[[], int | None]]:
    """The most memory of the GPU since the block began; None on a CPU."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() if gpu else None


def _timed(work: Callable[[], object]) -> float:
    device = pick_device()
    started = _now(device)
    work()
    return _now(device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
