"""Processes that torchrun starts share a calibration, and end together."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import pytest
import small
import tiny
import torch
from processes import begun, forked

from minitron.calibration.statistics import Statistics
from minitron.cli.main import main
from minitron.core.parallel import Ranks, all_reduce_sum, broadcast, joined, process_group, ranks, require_all_well
from minitron.model.checkpoint import open_checkpoint
from minitron.pruning.cut import cut
from minitron.recipe import DEMO_TEACHER

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
# A job in which the process whose rank is the argument fails while the other goes on to sum.
ONE_FAILS = """
import sys
from pathlib import Path
import torch
from minitron.core.errors import RunError
from minitron.core.parallel import all_reduce_sum, process_group

try:
    with process_group() as here:
        import transformers.models.llama.modeling_llama
        if here.rank == int(sys.argv[1]):
            raise RunError(f"rank {here.rank} found naïve text")
        all_reduce_sum(torch.ones(3))
except RunError as error:
    threads = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    left = sum("gloo" in name for name in threads)
    Path(f"heard{here.rank}").write_text(f"{error}; {left} threads left", encoding="utf-8")
    sys.exit(1)
"""


# A job in which the process whose rank is the argument is stopped, or sleeps, while the other goes on to sum.
ONE_HANGS = """
import os
import socket
import signal
import sys
import time
import torch
from minitron.core.parallel import all_reduce_sum, computing_together, process_group

with process_group() as here, computing_together():
    for step in range(1000):
        if step == 3 and here.rank == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGSTOP) if sys.argv[2] == "stopped" else time.sleep(100)
        all_reduce_sum(torch.ones(1))
"""


# Some steps of a distillation that goes on where the one before ended, or with no number of steps all the rest.
SOME_STEPS = """
import json
import sys
from pathlib import Path
from minitron.distillation.optim import soap
from minitron.data.corpus import open_corpus
from minitron.distillation.config import DistillConfig
from minitron.distillation.schedule import ModelSize, Schedule, resolve
from minitron.distillation.teachers import TeacherSource
from minitron.distillation.train import Training, distill, distill_until
from minitron.model.checkpoint import open_checkpoint
from minitron.core.parallel import process_group

work, steps = Path(sys.argv[1]), int(sys.argv[2])
soap.AXES_STEPS = 3  # of the 10 steps
with process_group():
    teacher, student, corpus = Path("teacher"), Path("student"), open_corpus(Path("data"))
    shapes = open_checkpoint(student).shape, open_checkpoint(teacher).shape
    config = DistillConfig(
        tokens=10 * 4 * 16,
        batch_blocks=4,
        checkpoint_steps=2,
        evaluate_steps=4,
        evaluate_blocks=11,
        **CORRECTION,
        **json.loads(sys.argv[3]),
    )
    config = resolve(config, *(ModelSize(shape, 0.1) for shape in shapes), block_tokens=16, train_tokens=1)
    training = Training(student, TeacherSource(teacher), corpus, Schedule.of_student(config, 16, 0), work)
    if steps:
        distill_until(training, steps, corpus.heldout.head(3))
    else:
        (work / "out").mkdir(parents=True, exist_ok=True)
        distill(training, work / "out")
"""


# How many bytes of a teacher's file a process reads to hold its part.
READS = """
import sys
from pathlib import Path
import torch
from minitron.recipe import DEMO_TEACHER
from minitron.distillation.teachers import OnlineTeacher
from minitron.model.checkpoint import open_checkpoint
from minitron.core.parallel import process_group

def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])

with process_group() as here:
    teacher = open_checkpoint(DEMO_TEACHER)
    before = bytes_read()
    OnlineTeacher(teacher, torch.float32, torch.device("cpu"))
    print(bytes_read() - before, flush=True)
"""


FLOAT32, EXACT, STOCHASTIC = (
    json.dumps(options)
    for options in (
        {"precision": "float32"},
        {"precision": "float32", "optimizer": "adamw"},
        {"weights": "bfloat16_stochastic"},
    )
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher and a text."""
    path = tmp_path_factory.mktemp("desk")
    small.teacher(path / "teacher")
    small.text(path / "text.jsonl")
    return path


def start(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def calibration(data: str, samples: int, out: str) -> list[object]:
    options = ["--samples", samples, "--block-tokens", 16, "--second-moment", "--out", out]
    options += ["--separate-documents"] * (samples == 20)
    return ["minitron", "calibrate", "teacher", "--data", data, *options]


@pytest.mark.parametrize("samples", [20, 4])  # three batches, and fewer batches than processes
def test_statistics_of_two_processes_are_those_of_one(
    desk: Path, samples: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    assert main([str(word) for word in calibration("text.jsonl", samples, f"one{samples}")[1:]]) == 0
    together = forked(2, *calibration("text.jsonl", samples, f"two{samples}"), cwd=desk)
    assert together.returncode == 0, together.stderr
    assert together.stdout == capsys.readouterr().out.replace("one", "two")  # one of them speaks
    one, two = (Statistics.load(desk / f"{name}{samples}") for name in ("one", "two"))
    assert two.model == one.model
    sums, expected = ({key: value for key, value in vars(found).items() if key != "model"} for found in (two, one))
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-15)


def test_an_error_of_the_first_process_ends_both_with_one_message(desk: Path) -> None:
    ended = start(*TORCHRUN, 2, "-m", *calibration("missing.jsonl", 4, "none"), cwd=desk)
    assert ended.returncode == 1
    assert [line for line in ended.stderr.splitlines() if line.startswith(("error", "interrupted"))] == [
        "error: data source 'missing.jsonl' does not exist; give a file, a directory, a dataset id or 'builtin'"
    ]
    assert not [*desk.glob("none*")]


@pytest.mark.parametrize("failing", [1])
def test_both_processes_hear_of_the_one_that_fails(tmp_path: Path, failing: int) -> None:
    (tmp_path / "job.py").write_text(ONE_FAILS, encoding="utf-8")
    ended = forked(2, "job.py", failing, cwd=tmp_path)
    assert ended.returncode == 1
    heard = [(tmp_path / f"heard{rank}").read_text(encoding="utf-8") for rank in range(2)]
    assert heard == [f"rank {failing} found naïve text; 0 threads left"] * 2


def set_timeout(seconds: int, rank: int) -> None:
    os.environ["MINITRON_TIMEOUT"] = str(seconds)


@pytest.mark.parametrize(("hanging", "how"), [(0, "stopped"), (1, "stopped"), (1, "asleep")])
def test_a_process_that_does_not_answer_is_named_and_all_end(hanging: int, how: str, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(ONE_HANGS, encoding="utf-8")
    processes = begun(2, "job.py", hanging, how, cwd=tmp_path, prepare=partial(set_timeout, 4))
    told = 1 - hanging if how == "stopped" else 0  # the first watches all, all others the first
    processes[told].join(timeout=100)
    for process in processes:  # as torchrun does when one has failed
        process.kill()
        process.join()
    assert processes[told].exitcode == 1
    # Of two that are alive either may be the first to judge, and the other then hears that it is gone.
    lines = [
        line for rank in range(2) for line in (tmp_path / f".stderr{rank}").read_text(encoding="utf-8").splitlines()
    ]
    # Without torchrun, which keeps it in a process of its own, the processes' store is the first one's.
    said = {
        (0, "stopped"): "that of process 0 as a rule, has not answered for ",
        (1, "stopped"): f"process 1 on {socket.gethostname()} has given no sign of life for ",
        (1, "asleep"): f"process 1 on {socket.gethostname()} took part in the fewest exchanges",
    }
    assert any(said[hanging, how] in line and line.endswith("goes on from the last state") for line in lines), lines


# Variant -> what the teacher learns on the way; for some of the steps, and others go on without.
LESSON_DESKS = {"llama": {}, "llama-tied": {"correction": "parallel", "correction_tokens": 7 * 4 * 16}}


@pytest.fixture(scope="module", params=LESSON_DESKS)
def training_desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher, a student cut from it, their text, and what one process makes of the student."""
    path = tmp_path_factory.mktemp(request.param)
    teacher = open_checkpoint(small.teacher(path / "teacher", request.param))
    (path / "student").mkdir()
    cut(teacher, tiny.plan(teacher.shape, hidden=24, ffn=24, layers=3), path / "student")
    small.corpus(path / "data", teacher.path, 16)
    (path / "some_steps.py").write_text(f"CORRECTION = {LESSON_DESKS[request.param]}\n{SOME_STEPS}")
    alone = forked(1, "some_steps.py", "one", 0, FLOAT32, cwd=path)
    assert alone.returncode == 0, alone.stderr
    return path


def assert_same_training(desk: Path, one: str, other: str) -> None:
    assert (desk / one / "corrected").exists() == ("tied" in desk.name)
    for made in ("out", "corrected"):
        first, second = tiny.tensors(desk / one / made), tiny.tensors(desk / other / made)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=2e-5)
    rows = [
        [json.loads(line) for line in (desk / name / "metrics.jsonl").read_text().splitlines()] for name in (one, other)
    ]
    assert len(rows[0]) == len(rows[1])
    for ours, theirs in zip(*rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_two_processes_make_the_student_of_one(training_desk: Path) -> None:
    together = forked(2, "some_steps.py", "two", 0, FLOAT32, cwd=training_desk)
    assert together.returncode == 0, together.stderr
    assert_same_training(training_desk, "one", "two")


@pytest.mark.parametrize("training_desk", ["llama-tied"], indirect=True)
def test_a_distillation_goes_on_with_another_number_of_processes(training_desk: Path) -> None:
    for processes, steps in ((2, 3), (1, 6), (2, 0)):
        made = forked(processes, "some_steps.py", "mixed", steps, FLOAT32, cwd=training_desk)
        assert made.returncode == 0, made.stderr
    assert_same_training(training_desk, "one", "mixed")


def test_a_process_reads_its_part_of_the_weights_alone(tmp_path: Path) -> None:
    (tmp_path / "reads.py").write_text(READS)
    done = forked(2, "reads.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = (DEMO_TEACHER / "model.safetensors").stat().st_size
    for read in map(int, done.stdout.split()):
        assert 0.5 * whole < read < 0.65 * whole


# Bytes that a process holds of SOAP's state, and what becomes of the weights.
HOLDS = """
import torch
from safetensors.torch import save_file
from minitron.distillation.optim.soap import Soap
from minitron.core.parallel import process_group

with process_group() as here:
    shapes = [(24, 40), (40, 24), (24, 24), (24, 24), (12, 24), (12, 24)]
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    soap = Soap([{"params": weights, "turned": True, "lr": 0.01}], betas=(0.9, 0.95))
    for step in range(25):
        for number, weight in enumerate(weights):
            noise = torch.Generator().manual_seed(100 * step + number)
            weight.grad = torch.randn(weight.shape, generator=noise)
        soap.step()
    held = [tensor for state in soap.state.values() for tensor in state.values() if not tensor.is_meta]
    print(sum(tensor.nbytes for tensor in held), flush=True)
    save_file({str(number): weight.detach() for number, weight in enumerate(weights)}, f"{here.size}-{here.rank}")
"""


def test_each_process_holds_its_part_of_what_soap_holds(tmp_path: Path) -> None:
    (tmp_path / "holds.py").write_text(HOLDS)
    held = {}
    for size in (1, 2):
        done = forked(size, "holds.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        held[size] = [int(line) for line in done.stdout.split()]
    assert all(0.45 * held[1][0] < one < 0.55 * held[1][0] for one in held[2])
    assert len({(tmp_path / name).read_bytes() for name in ("1-0", "2-0", "2-1")}) == 1


# Whether the divided model of each directory has the weights and buffers that transformers gives it.
LOADS = """
import sys
from pathlib import Path
import torch
from minitron.distillation.teachers import OnlineTeacher
from minitron.model.checkpoint import load_model, open_checkpoint
from minitron.core.parallel import process_group, full

with process_group():
    for path in sorted(Path().glob("teacher-*")):
        teacher = open_checkpoint(path)
        model = OnlineTeacher(teacher, torch.bfloat16, torch.device("cpu")).model
        expected = load_model(path, torch.bfloat16)
        found, known = (one.state_dict() | dict(one.named_buffers()) for one in (model, expected))
        assert found.keys() == known.keys(), path
        for name, tensor in known.items():
            assert torch.equal(full(found[name]), tensor) and found[name].dtype == tensor.dtype, (path, name)
        print(path.name, flush=True)
"""


def test_a_divided_model_of_every_family_has_the_weights_that_transformers_gives_it(tmp_path: Path) -> None:
    for variant in tiny.VARIANTS:
        tiny.checkpoint(variant, tmp_path / f"teacher-{variant}")
    (tmp_path / "loads.py").write_text(LOADS)
    done = forked(2, "loads.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == 2 * sorted(f"teacher-{variant}" for variant in tiny.VARIANTS)


@pytest.mark.parametrize("training_desk", ["llama-tied"], indirect=True)
def test_bfloat16_weights_can_be_divided(training_desk: Path) -> None:
    for processes, name, how in ((1, "exact", EXACT), (2, "low", STOCHASTIC)):
        made = forked(processes, "some_steps.py", name, 0, how, cwd=training_desk)
        assert made.returncode == 0, made.stderr
    exact, low = (
        [json.loads(line) for line in (training_desk / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("exact", "low")
    )
    key = "heldout_loss"
    assert [row[key] for row in low if key in row] == pytest.approx([row[key] for row in exact if key in row], rel=0.03)


def test_a_batch_need_not_be_a_multiple_of_the_processes(desk: Path) -> None:
    """With three blocks in pieces of one, the second of two processes runs a block that counts nothing."""
    teacher = open_checkpoint(desk / "teacher")
    (desk / "student").mkdir()
    cut(teacher, tiny.plan(teacher.shape, hidden=24, ffn=24), desk / "student")
    words = ["distill", "--teacher", "teacher", "--student", "student", "--data", "text.jsonl", "--block-tokens", 16]
    words += ["--tokens", 3 * 3 * 16, "--set", "distill.batch_blocks=3", "--set", "distill.precision=float32"]
    words += ["--set", "distill.micro_batch_tokens=16", "--set", "distill.correction=parallel"]
    words += ["--set", "distill.correction_learning_rate=1e-3"]
    for processes, out in ((1, "odd-alone"), (2, "odd-shared")):
        made = forked(processes, "minitron", *words, "--out", out, cwd=desk)
        assert made.returncode == 0, made.stderr
    for ending in ("", ".corrected"):
        one, two = (tiny.tensors(desk / f"{out}{ending}") for out in ("odd-alone", "odd-shared"))
        assert one and all(torch.allclose(one[name], two[name], rtol=0, atol=2e-5) for name in one)


SHARED_RUN = {
    "model": "teacher",
    "data": {"source": "text.jsonl", "block_tokens": 16, "heldout_fraction": 0.2},
    "calibrate": {"samples": 16, "precision": "float32"},
    "prune": {"target": "70%", "iterations": 2, "layer_criterion": "loss"},
    "search": {"level": "distilled", "cut_candidates": 2, "distill_candidates": 2, "window": 0.4, "judge_blocks": 8}
    | {"dims": {"ffn": "16,24", "hidden": "24,32"}},
    "distill": {"tokens": 384, "batch_blocks": 3, "precision": "float32", "evaluate_blocks": 4}
    | {"correction": "before", "correction_learning_rate": 1e-3},
    "evaluate": {"blocks": 8, "new_tokens": 2, "prompts": ["the"], "speed": False},
}


@pytest.mark.slow
def test_a_run_of_several_processes_is_that_of_one(desk: Path) -> None:
    """Calibration, correction, search and training are shared; what is cut, measured and written the first one does."""
    (desk / "recipe.yaml").write_text(json.dumps(SHARED_RUN))
    words = ("minitron", "run", "recipe.yaml", "--out")
    for out, made in (
        ("run-alone", forked(1, *words, "run-alone", cwd=desk)),
        ("run-shared", start(*TORCHRUN, 2, "-m", *words, "run-shared", cwd=desk)),
    ):
        assert made.returncode == 0, made.stderr
        assert made.stdout.count(f"report:  {out}/report.html") == 1
    files = [{file.relative_to(desk / out) for file in (desk / out).rglob("*")} for out in ("run-alone", "run-shared")]
    assert files[0] == files[1]
    for model, tolerance in (("corrected", 2e-5), ("pruned", 2e-5), ("student", 2e-5)):
        one, two = (tiny.tensors(desk / out / model) for out in ("run-alone", "run-shared"))
        assert one and all(torch.allclose(one[name], two[name], rtol=0, atol=tolerance) for name in one)


@pytest.mark.parametrize("rank", [0, 1])
def test_other_commands_refuse_several_processes(
    desk: Path, rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("WORLD_SIZE", 2), ("RANK", rank), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    assert main(["inspect", str(desk / "teacher")]) == 1
    message = (
        "error: torchrun started 2 processes, and this command runs in one: start it without torchrun; "
        "the commands that several processes share are demo, compress, run, calibrate, distill\n"
    )
    assert capsys.readouterr() == ("", "" if rank else message)


def test_shares_are_whole_batches_that_follow_each_other() -> None:
    for size, num_samples in product((1, 2, 3, 7), (0, 1, 8, 9, 100)):
        shares = [Ranks(rank, size).share(num_samples, 4) for rank in range(size)]
        assert [shares[0].start, shares[-1].stop] == [0, num_samples]
        assert all(one.stop == other.start for one, other in pairwise(shares)), (size, num_samples)
        assert all(share.start % 4 == 0 for share in shares if share.start < num_samples)
        lengths = [-(-(share.stop - share.start) // 4) for share in shares]
        assert max(lengths) - min(lengths) <= 1, (size, num_samples)


def test_one_process_alone_exchanges_nothing() -> None:
    tokens = torch.arange(6).view(2, 3)
    with process_group() as here:
        assert here == ranks() == joined() == Ranks(rank=0, size=1, local_rank=0)
        require_all_well()
        all_reduce_sum(tokens)
        assert broadcast(tokens) is tokens
    assert torch.equal(tokens, torch.arange(6).view(2, 3))
