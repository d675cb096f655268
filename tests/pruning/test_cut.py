"""How a checkpoint is cut, whatever is cut from it: in runs of rows, reading little, ending cleanly."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from safetensors.torch import save_file

from minitron.core import direct_io
from minitron.core.errors import CheckpointError, RunError
from minitron.core.files import atomic_directory
from minitron.model import weights
from minitron.model.checkpoint import open_checkpoint
from minitron.model.stream import Pass
from minitron.pipeline.directory import RunDirectory
from minitron.pipeline.stages import Run, cut_teacher
from minitron.pruning.config import PruneConfig
from minitron.pruning.cut import cut, cut_tensor, kept_rows
from minitron.pruning.plan import Plan
from minitron.pruning.steps import Pruner, Scoring
from minitron.recipe import Recipe

EMBEDDING = "model.embed_tokens.weight"
SIZES = {"layers": 3, "hidden": 24, "ffn": 23, "kv_heads": 2, "heads": 2}


def cut_bytes(path: Path, plan: Plan, out: Path, **options: Any) -> dict[str, bytes]:
    """The student's files of weights."""
    out.mkdir()
    digests = cut(open_checkpoint(path), plan, out, **options)
    files = {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
    assert digests == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return files


def set_chunk(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, gap_bytes: int = 0) -> None:
    monkeypatch.setattr(direct_io, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(weights, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(weights, "GAP_BYTES", gap_bytes)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(file, first byte, last byte + 1) of everything that is read of tensors from now on."""
    seen: list[tuple[str, int, int]] = []

    def read_range(file: int, start: int, stop: int, buffer: Any = None) -> Any:
        seen.append((os.readlink(f"/proc/self/fd/{file}"), start, stop))
        return direct_io.read_range(file, start, stop, buffer)

    monkeypatch.setattr(weights, "read_range", read_range)
    return seen


def damage(path: Path, name: str, where: Any) -> None:
    tensors = tiny.tensors(path)
    tensors[name][where] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "chunk_bytes", "gap_bytes"),
    [
        ("llama", 1, 0),
        ("llama-biases", 700, 0),
        ("llama-sharded", 700, 10**6),
        ("llama-bfloat16", 4096, 100),
        ("llama-tied", 10**6, 10**6),
    ],
)
def test_the_student_does_not_depend_on_how_much_is_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, chunk_bytes: int, gap_bytes: int
) -> None:
    path = tiny.checkpoint(variant, tmp_path / "teacher")
    checkpoint = open_checkpoint(path)
    plan = tiny.plan(checkpoint.shape, **SIZES)
    set_chunk(monkeypatch, chunk_bytes, gap_bytes)
    files = cut_bytes(path, plan, tmp_path / "student", shard_bytes=9000)
    assert len(files) > 3
    student, teacher = tiny.tensors(tmp_path / "student"), tiny.tensors(path)
    specs = {spec.name: spec for spec in open_checkpoint(tmp_path / "student").specs()}
    assert student.keys() == specs.keys()
    for name, spec in specs.items():
        source = name if spec.layer is None else name.replace(f".{spec.layer}.", f".{plan.layers[spec.layer]}.", 1)
        expected = teacher[source]
        for dim, axis in enumerate(spec.axes):
            expected = expected.index_select(dim, kept_rows(axis, plan, spec.layer))
        assert torch.equal(student[name], expected), name
        assert torch.equal(cut_tensor(teacher[source], spec, plan), expected), name


def test_changes_are_made_to_what_stays_run_by_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny.plan(open_checkpoint(llama).shape, **SIZES)
    set_chunk(monkeypatch, 4096)
    cut_bytes(llama, plan, tmp_path / "plain")
    sizes = []

    def doubled(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(rows.shape)
        return 2 * rows

    norm = "model.layers.1.input_layernorm.weight"
    cut_bytes(llama, plan, tmp_path / "changed", changes={EMBEDDING: doubled, norm: lambda gain: gain + 1})
    before, after = tiny.tensors(tmp_path / "plain"), tiny.tensors(tmp_path / "changed")
    changed = {EMBEDDING: 2 * before[EMBEDDING], norm: before[norm] + 1}
    assert all(torch.equal(after[name], (before | changed)[name]) for name in before)
    assert len(sizes) == 10 and set(sizes) == {(32, 24)}


# --- what is read ----------------------------------------------------------------------------------------------------


def test_no_tensor_is_read_whole_that_is_larger_than_a_chunk(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[str, int, int]]
) -> None:
    set_chunk(monkeypatch, 2000)
    cut_bytes(llama, tiny.identity_plan(open_checkpoint(llama).shape), tmp_path / "student")
    assert max(stop - start for _, start, stop in reads) <= 2000
    assert sum(stop - start for _, start, stop in reads) == open_checkpoint(llama).weight_bytes  # and each byte once


def test_of_layers_and_heads_that_go_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[str, int, int]]
) -> None:
    path = tiny.checkpoint("llama", tmp_path / "teacher")
    shape = open_checkpoint(path).shape
    plan = tiny.plan(shape, layers=2, heads=4)
    dropped_layer = min({0, 1, 2, 3} - {*plan.layers})
    dropped_head = min({*range(8)} - {*plan.heads[0]})
    rows = slice(4 * dropped_head, 4 * dropped_head + 4)
    damage(path, f"model.layers.{dropped_layer}.mlp.up_proj.weight", 0)
    damage(path, f"model.layers.{plan.layers[0]}.self_attn.q_proj.weight", rows)
    set_chunk(monkeypatch, 10**6)
    cut_bytes(path, plan, tmp_path / "student")
    stored = open_checkpoint(path).stored
    taken = sum(stop - start for _, start, stop in reads)
    layer_bytes = sum(tensor.num_bytes for name, tensor in stored.items() if ".0." in name)
    query_bytes = stored["model.layers.0.self_attn.q_proj.weight"].num_bytes
    assert taken == open_checkpoint(path).weight_bytes - 2 * layer_bytes - 2 * query_bytes // 2


# --- how it ends -----------------------------------------------------------------------------------------------------


def _not_a_number(path: Path) -> None:
    damage(path, "model.layers.2.mlp.up_proj.weight", (5, 5))


@pytest.mark.parametrize("chunk_bytes", [500, 10**6])
def test_damage_found_on_the_way_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    path = tiny.checkpoint("llama", tmp_path / "teacher")
    _not_a_number(path)
    checkpoint = open_checkpoint(path)
    set_chunk(monkeypatch, chunk_bytes)
    before = threading.active_count()
    with (
        pytest.raises(CheckpointError, match=r"tensor model.layers.2.mlp.up_proj.weight holds NaN or infinity"),
        atomic_directory(tmp_path / "out") as out,
    ):
        cut(checkpoint, tiny.identity_plan(checkpoint.shape), out)
    assert threading.active_count() == before and [file.name for file in tmp_path.iterdir()] == ["teacher"]


def _shorter(path: Path) -> None:
    os.truncate(path / "model.safetensors", 1000)


def _other(path: Path) -> None:
    save_file(tiny.tensors(path), path / "model.safetensors", {"format": "pt"})


def _gone(path: Path) -> None:
    (path / "model.safetensors").unlink(missing_ok=True)


CHANGED = "cannot read tensor .*: the file was changed after the checkpoint was opened"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_shorter, CHANGED),
        (_other, CHANGED),
        (_gone, "cannot read tensor .*: No such file or directory"),
    ],
    ids=["truncated", "replaced", "removed"],
)
def test_a_teacher_that_changes_while_it_is_cut_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Any], message: str
) -> None:
    path = tiny.checkpoint("llama", tmp_path / "teacher")
    checkpoint = open_checkpoint(path)
    set_chunk(monkeypatch, 500)

    def then(rows: torch.Tensor) -> torch.Tensor:
        change(path)
        return rows

    (tmp_path / "out").mkdir()
    before = threading.active_count()
    plan = tiny.identity_plan(checkpoint.shape)
    with pytest.raises(CheckpointError, match=rf"teacher/model.safetensors: {message}"):
        cut(checkpoint, plan, tmp_path / "out", changes={"model.layers.0.mlp.up_proj.weight": then})
    assert threading.active_count() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_while_cutting_is_one_clear_error(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(llama)
    set_chunk(monkeypatch, 4096)
    before = threading.active_count()
    with (
        pytest.raises(RunError, match=r"cannot write .*/out: No space left on device; free some space"),
        atomic_directory(tmp_path / "out") as out,
    ):
        (out / f"model-00005-of-{len(checkpoint.stored):05d}.safetensors").symlink_to("/dev/full")
        cut(checkpoint, tiny.identity_plan(checkpoint.shape), out, shard_bytes=1)
    assert threading.active_count() == before and not list(tmp_path.iterdir())


CUT_SLOWLY = """
import signal, sys, time
from pathlib import Path
from minitron.core.files import atomic_directory
from minitron.model.checkpoint import open_checkpoint
from minitron.pruning.cut import cut
from minitron.pruning.importance import even_scores
from minitron.pruning.plan import choose

def slow(rows):
    print("cutting", flush=True)
    time.sleep(0.2)
    return rows

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in its background
checkpoint = open_checkpoint(Path(sys.argv[1]))
names = checkpoint.stored
with atomic_directory(Path(sys.argv[2])) as out:
    whole = choose(even_scores(checkpoint.shape), checkpoint.shape, checkpoint.shape)
    cut(checkpoint, whole, out, shard_bytes=9000, changes=dict.fromkeys(names, slow))
"""


def test_an_interrupt_ends_the_cut_and_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CUT_SLOWLY, llama, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "cutting\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and errors.rstrip().endswith("KeyboardInterrupt")
    assert not list(tmp_path.iterdir())


# --- digests ---------------------------------------------------------------------------------------------------------


def test_the_pruned_files_are_not_read_again_for_their_digests(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama)
    plan = tiny.plan(checkpoint.shape, **SIZES)

    plainly = Pruner(checkpoint, Scoring(PruneConfig(), None, Pass(torch.float32), None), [], None)
    recipe, corpus = (
        Recipe(model=str(llama), prune=PruneConfig(target="50%")),
        small.corpus(tmp_path / "text", small.teacher(tmp_path / "teacher")),
    )
    with RunDirectory(tmp_path / "run") as stages:
        run = Run(stages, recipe, checkpoint, plan.student)
        run.corpus, run.pruner, run.plan = corpus, plainly, plan
        (stages.out / "plan").mkdir()
        plan.save(stages.out / "plan" / "plan.json")
        cut_teacher(run)
        pruned = run.models["pruned"]
        known = json.loads((stages.out / ".digests.json").read_text())
        file = pruned / "model.safetensors"
        assert known[str(file)][3] == hashlib.sha256(file.read_bytes()).hexdigest()
        digest = stages.digest([file])
        assert json.loads((stages.out / ".digests.json").read_text()) == known
        cut_teacher(run)  # done: nothing to remember
    with RunDirectory(tmp_path / "run") as stages:
        assert stages.digest([file]) == digest
        stages.remember({file: "made up"})
        assert stages.digest([file]) != digest
        os.utime(file)
        assert stages.digest([file]) == digest


def test_a_plan_that_names_other_layers_reads_those(llama: Path, tmp_path: Path) -> None:
    shape = open_checkpoint(llama).shape
    whole = tiny.identity_plan(shape)
    plan = replace(
        whole,
        student=replace(shape, layers=1),
        layers=(2,),
        ffn=whole.ffn[:1],
        heads=whole.heads[:1],
        kv_heads=whole.kv_heads[:1],
    )
    cut_bytes(llama, plan, tmp_path / "student")
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(tiny.tensors(tmp_path / "student")[name.format(0)], tiny.tensors(llama)[name.format(2)])
