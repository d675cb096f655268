"""A real model's size on a small machine: memory of calibrating and cutting, and the cut's speed against `cp`.

    python benchmarks/full_size.py --model llama-3.1-8b [--scratch DIR] [--out FILE]
    python benchmarks/full_size.py --model nemotron-4-15b --memory-limit

A random bfloat16 model of the real shape is written in 5 GB shards, calibrated on a few random blocks and cut to the
published student's shape, each step in a process of its own. Cutting and `cp` of the same files take turns; both end
with all bytes on the disk. Needs 31 GB of disk for the 8B model and 53 GB for the 15B one. With --memory-limit both
steps run once more in a quarter of the model's size, and must give the same bits.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lib.measure import PeakMemory, header, publish, table
from lib.random_model import LLAMA, random_model

from minitron.calibration.collect import measure_statistics
from minitron.calibration.statistics import Statistics
from minitron.core.direct_io import digest_file
from minitron.core.files import atomic_directory
from minitron.model.checkpoint import open_checkpoint
from minitron.model.samples import Samples
from minitron.model.stream import Pass
from minitron.pruning.cut import cut
from minitron.pruning.importance import activation_scores
from minitron.pruning.plan import choose, with_sizes

SAMPLES, BLOCK_TOKENS, BATCH = 4, 512, 2
REPETITIONS = 3
GIB = 1 << 30
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
# Where memory cgroups live, version 1 and 2, and the file that takes the limit.
CGROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)


@dataclass(frozen=True)
class Case:
    """A published model, and the student that was cut from it."""

    title: str
    config: dict[str, Any]
    student: dict[str, int]
    student_parameters: int | None  # as published


NEMOTRON = {
    "architectures": ["NemotronForCausalLM"],
    "model_type": "nemotron",
    "dtype": "bfloat16",
    "eos_token_id": 256,
    "head_dim": 128,
    "hidden_act": "relu2",
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "max_position_embeddings": 4096,
    "norm_eps": 1e-05,
    "num_attention_heads": 48,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "vocab_size": 256000,
}
TINY = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 4096, "head_dim": 16}
CASES = {
    "llama-3.1-8b": Case(
        "Llama-3.1-8B to Llama-3.1-Minitron-4B-Width", LLAMA, {"hidden": 3072, "ffn": 9216}, 4_512_746_496
    ),
    "nemotron-4-15b": Case("Nemotron-4 15B to Minitron-8B", NEMOTRON, {"hidden": 4096, "ffn": 16384}, 8_271_699_968),
    "tiny": Case("a tiny model", LLAMA | TINY, {"hidden": 384, "ffn": 1024}, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CASES, default="llama-3.1-8b")
    parser.add_argument("--memory-limit", action="store_true", help="calibrate and cut again under a hard limit")
    parser.add_argument("--out", type=Path, help="also write the result to this Markdown file")
    parser.add_argument("--scratch", type=Path, help="where the models go; default the system's")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(**args.child)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # so that the directory is removed
    case = CASES[args.model]
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="minitron-bench-") as directory:
        text = report(case, measure_all(args.model, Path(directory), args.memory_limit), args.memory_limit)
    publish(text, args.out)


def measure_all(model: str, work: Path, memory_limit: bool) -> dict[str, Any]:
    """Every step's figures, by step."""
    step = partial(in_process, model=model, work=str(work))
    found: dict[str, Any] = {"write": step("write"), "calibrate": step("calibrate"), "cut": [], "cp": []}
    note(found)
    for _ in range(REPETITIONS):
        found["cp"].append(copy_seconds(work / "model", work / "copy"))
        shutil.rmtree(work / "student", ignore_errors=True)
        found["dropped"] = drop_caches()
        found["cut"].append(step("cut"))
        note({name: found[name][-1] for name in ("cp", "cut")})
    found["load"] = step("load")
    note(found["load"])
    if memory_limit:
        limit = max(GIB, sum(file.stat().st_size for file in shards(work / "model")) // 4)
        with limited(limit) as (prefix, found["limited by"]):
            found["limit"] = limit
            found["limited calibrate"] = step("calibrate", prefix=prefix)
            shutil.rmtree(work / "student")
            found["limited cut"] = step("cut", prefix=prefix)
        note({name: found[name] for name in ("limited calibrate", "limited cut")})
    return found


def in_process(step: str, prefix: tuple[str, ...] = (), **arguments: Any) -> Any:
    """Run one step in a fresh process, and return what it prints last."""
    command = [*prefix, sys.executable, __file__, "--child", json.dumps({"step": step, **arguments})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(step: str, model: str, work: str) -> dict[str, Any]:
    """Run one step: its seconds, its process's peak of anonymous memory in bytes, and what it says of its result."""
    with PeakMemory() as memory:
        started = time.monotonic()
        result = STEPS[step](CASES[model], Path(work))
        seconds = time.monotonic() - started
    return {"seconds": seconds, "anonymous": memory.peak.process, **result}


def write_model(case: Case, work: Path) -> dict[str, Any]:
    """A random model of the case's shape in bfloat16."""
    path = work / "model"
    path.mkdir()
    random_model(case.config, path)
    for file in path.iterdir():
        sync(file)
    checkpoint = open_checkpoint(path)
    return {"parameters": checkpoint.parameters.total, "bytes": checkpoint.weight_bytes}


def run_calibrate(case: Case, work: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(work / "model")
    tokens = torch.randint(
        0, checkpoint.shape.vocab, (SAMPLES, BLOCK_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    found = measure_statistics(checkpoint, Samples(tokens), Pass(torch.bfloat16, batch=BATCH))
    with atomic_directory(work / "statistics", replace=True) as out:
        found.save(out)
    assert all(bool(values.isfinite().all()) for values in found.sums.values())
    return {"digest": digest_file(work / "statistics" / "statistics.safetensors")}


def run_cut(case: Case, work: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(work / "model")
    scores = activation_scores(Statistics.load(work / "statistics"), checkpoint.shape, "mean", "l2")
    plan = choose(scores, checkpoint.shape, with_sizes(checkpoint.shape, **case.student))
    started = time.monotonic()
    with atomic_directory(work / "student") as out:  # which ends with a sync
        digests = cut(checkpoint, plan, out)
    seconds = time.monotonic() - started
    student = open_checkpoint(work / "student")
    return {
        "cut_seconds": seconds,
        "digests": digests,
        "parameters": student.parameters.total,
        "bytes": student.weight_bytes,
    }


def run_load(case: Case, work: Path) -> dict[str, Any]:
    """The student in transformers: its parameters, and whether its logits are numbers."""
    from transformers import AutoModelForCausalLM

    model, notes = AutoModelForCausalLM.from_pretrained(
        work / "student", dtype="auto", local_files_only=True, output_loading_info=True
    )
    assert not any(notes.values()), notes
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None]).logits
    return {"parameters": sum(p.numel() for p in model.parameters()), "finite": bool(logits.isfinite().all())}


STEPS = {"write": write_model, "calibrate": run_calibrate, "cut": run_cut, "load": run_load}


def copy_seconds(source: Path, target: Path) -> float:
    """Seconds in which `cp` copies the weights to the disk. File by file, to need the room of one only."""
    seconds = 0.0
    for file in shards(source):
        drop_caches()
        started = time.monotonic()
        subprocess.run(["cp", file, target], check=True)
        sync(target)
        seconds += time.monotonic() - started
        target.unlink()
    return seconds


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def drop_caches() -> bool:
    """Make the system forget the files it holds in memory; False where it does not let us."""
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


@contextmanager
def limited(limit: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """A command prefix under which a process gets no more than `limit` bytes, and what holds it to that."""
    name = f"minitron-bench-{os.getpid()}"
    for root, file in CGROUPS:
        group = root / name
        try:
            group.mkdir()
            (group / file).write_text(str(limit))
        except OSError:  # no such cgroups, or not ours to make
            continue
        try:
            yield ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"), f"a memory cgroup, {file}"
        finally:
            group.rmdir()
        return
    yield ("sh", "-c", f'ulimit -d {limit >> 10} && exec "$@"', "sh"), "RLIMIT_DATA, so without page cache"


def note(found: Any) -> None:
    print(found, file=sys.stderr)


def report(case: Case, found: dict[str, Any], memory_limit: bool) -> str:
    teacher, cuts, copies = found["write"], found["cut"], found["cp"]
    student = cuts[-1]
    assert student["parameters"] == found["load"]["parameters"] and found["load"]["finite"]
    assert case.student_parameters in (None, student["parameters"])
    assert all(one["digests"] == student["digests"] for one in cuts)
    rates = [
        (teacher["bytes"] / copy, max(teacher["bytes"], student["bytes"]) / one["cut_seconds"])
        for copy, one in zip(copies, cuts, strict=True)
    ]
    ratios = [cut_rate / copy_rate for copy_rate, cut_rate in rates]
    published = ", as published" if case.student_parameters else ""
    return "\n".join(
        [
            header(f"{case.title}: a full-size model"),
            f"Random weights in bfloat16. Teacher: {_size(teacher)}. Student: {_size(student)}{published}; "
            "transformers loads it with as many, and its logits are finite.",
            "",
            f"Calibration: {SAMPLES} samples of {BLOCK_TOKENS} tokens in bfloat16, {BATCH} at a time. Memory is that "
            "of the whole process, its imports included, sampled every 2 ms. The cut's seconds include the reading of "
            "the statistics and the choice of what stays.",
            "",
            table(
                ["step", "seconds", "peak of anonymous memory, GiB"],
                [
                    _step_row("calibrate", [found["calibrate"]]),
                    _step_row("cut", cuts),
                ],
            ),
            "",
            "Speed: the cut's GB are the larger of what it reads and writes, `cp`'s those of the same source files. "
            "Both end with all bytes on the disk. "
            f"Page cache dropped before each: {'yes' if found['dropped'] else 'no'}.",
            "",
            table(
                ["repetition", "`cp`, s", "cut, s", "`cp`, GB/s", "cut, GB/s", "cut / `cp`"],
                [
                    [
                        str(index + 1),
                        f"{copies[index]:.1f}",
                        f"{cuts[index]['cut_seconds']:.1f}",
                        *(f"{rate / 1e9:.2f}" for rate in rates[index]),
                        f"{ratios[index]:.2f}",
                    ]
                    for index in range(len(cuts))
                ],
            ),
            "",
            f"Cut / `cp`: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}.",
            "",
            *(_limit_lines(found) if memory_limit else []),
        ]
    )


def _size(model: dict[str, Any]) -> str:
    return f"{model['parameters']:,} parameters, {model['bytes'] / 1e9:.2f} GB"


def _step_row(name: str, runs: list[dict[str, Any]]) -> list[str]:
    seconds = [one["seconds"] for one in runs]
    spread = f"{min(seconds):.1f}" if len(runs) == 1 else f"{min(seconds):.1f} to {max(seconds):.1f}"
    return [name, spread, f"{max(one['anonymous'] for one in runs) / GIB:.2f}"]


def _limit_lines(found: dict[str, Any]) -> list[str]:
    calibrated, cut_again = found["limited calibrate"], found["limited cut"]
    assert calibrated["digest"] == found["calibrate"]["digest"], "the statistics differ under the memory limit"
    assert cut_again["digests"] == found["cut"][-1]["digests"], "the student differs under the memory limit"
    return [
        f"Under a hard limit of {found['limit'] / GIB:.2f} GiB, a quarter of the model ({found['limited by']}): "
        f"calibrate took {calibrated['seconds']:.1f} s, the cut {cut_again['cut_seconds']:.1f} s. Statistics and "
        "student have the same sha256 as without.",
        "",
    ]


if __name__ == "__main__":
    main()
