"""A training that goes on from its saved state is the one that was never stopped, whatever became of the files."""

import errno
import hashlib
import json
import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitron.core.errors import RunError
from minitron.core.machine import versions
from minitron.distillation.optim import soap
from minitron.distillation.optim.low_precision import KahanAdamW, StochasticAdamW
from minitron.distillation.optim.soap import Soap
from minitron.distillation.state import States, forget_states, nearest_step

STEPS, BATCH, BLOCK = 6, 2, 8
STEP_TOKENS = BATCH * BLOCK
FILES = ["student.safetensors", "extra.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "AdamW": lambda tensors: torch.optim.AdamW(tensors, lr=0.01, fused=True),
    "AdamW-plain": lambda tensors: torch.optim.AdamW(tensors, lr=0.01, foreach=False),
    "KahanAdamW": lambda tensors: KahanAdamW([{"params": tensors, "lr": 0.01}], betas=(0.9, 0.95), seed=0),
    "StochasticAdamW": lambda tensors: StochasticAdamW([{"params": tensors, "lr": 0.01}], betas=(0.9, 0.95), seed=0),
    "Soap": lambda tensors: Soap(
        [{"params": [t for t in tensors if t.ndim == n], "lr": 0.01, "turned": n == 2} for n in (1, 2)],
        betas=(0.9, 0.95),
    ),
    "SGD": lambda tensors: torch.optim.SGD(tensors, lr=0.01, momentum=0.9),
    "Adafactor": lambda tensors: torch.optim.Adafactor(tensors, lr=0.01),
    "NAdam": lambda tensors: torch.optim.NAdam(tensors, lr=0.01),
    "Adagrad": lambda tensors: torch.optim.Adagrad(tensors, lr=0.01),
}


@pytest.fixture(autouse=True)
def axes_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soap, "AXES_STEPS", 2)


class Toy:
    """A small training whose steps draw from torch's random numbers, and whose projection has no gradient at first."""

    def __init__(self, work: Path, optimizer: str = "AdamW", width: int = 4, block: int = BLOCK, batch: int = BATCH):
        self.model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.3), nn.Linear(width, 2, bias=False))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        self.projection = nn.Parameter(torch.eye(2))
        self.counter = torch.zeros(3, dtype=torch.int64)
        self.optimizer = OPTIMIZERS[optimizer]([*self.model.parameters(), self.projection])
        self.said: list[str] = []
        extra = {"projection.weight": self.projection, "counter": self.counter}
        self.states = States(work, self.model, self.optimizer, batch, block, self.said.append, extra)

    def train(self, until: int, save: Callable[[int], bool] = lambda step: True) -> "Toy":
        step, tokens = self.states.resume()
        while step < until:
            output = self.model(torch.randn(5, 3))
            loss = (output @ self.projection if step >= 2 else output).square().sum()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.counter += step
            step, tokens = step + 1, tokens + STEP_TOKENS
            self.states.log({"step": step, "tokens": tokens, "loss": loss.item()})
            if save(step):
                self.states.save(step, tokens)
        return self

    def everything(self) -> dict[str, Any]:
        held = {
            f"{entry} of parameter {index}": value
            for index, parameter in enumerate([*self.model.parameters(), self.projection])
            for entry, value in self.optimizer.state.get(parameter, {}).items()
        }
        rest = {"projection": self.projection, "counter": self.counter, "random": torch.get_rng_state()}
        return dict(self.model.named_parameters()) | held | rest


def assert_same(one: Toy, other: dict[str, Any]) -> None:
    here = one.everything()
    assert here.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.equal(here[name], tensor) and here[name].dtype == tensor.dtype, name


def undisturbed(work: Path, optimizer: str = "AdamW") -> dict[str, Any]:
    torch.manual_seed(0)
    return Toy(work, optimizer).train(STEPS, save=lambda step: False).everything()


def interrupted(work: Path, at: int, optimizer: str = "AdamW") -> None:
    """The first steps of the same training, and then another program's random numbers."""
    torch.manual_seed(0)
    Toy(work, optimizer).train(at)
    torch.manual_seed(1)


def names(work: Path) -> list[str]:
    return sorted(path.name for path in work.glob("state-*"))


def state_names(*steps: int) -> list[str]:
    return [f"state-{step * STEP_TOKENS:012d}" for step in steps]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("at", [1, 4])
def test_weights_optimizer_extra_tensors_and_random_numbers_come_back(optimizer: str, at: int, tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "undisturbed", optimizer)
    interrupted(tmp_path / "work", at, optimizer)
    resumed = Toy(tmp_path / "work", optimizer).train(STEPS)
    assert_same(resumed, expected)
    assert resumed.said == []
    metrics = [(tmp_path / work / "metrics.jsonl").read_text() for work in ("work", "undisturbed")]
    assert metrics[0] == metrics[1]


def test_a_state_says_what_it_is_and_the_digest_of_every_file(tmp_path: Path) -> None:
    Toy(tmp_path).train(3)
    state = tmp_path / state_names(3)[0]
    assert {file.name for file in state.iterdir()} == set(FILES)
    facts = json.loads((state / "state.json").read_text())
    digests = {name: hashlib.sha256((state / name).read_bytes()).hexdigest() for name in FILES if name != "state.json"}
    assert facts.pop("sha256")
    assert facts == {
        "step": 3,
        "tokens": 3 * STEP_TOKENS,
        "batch_blocks": BATCH,
        "block_tokens": BLOCK,
        "optimizer": "AdamW",
        "versions": versions(),
        "files": digests,
    }
    assert load_file(state / "extra.safetensors")["counter"].tolist() == [3, 3, 3]
    assert load_file(state / "optimizer.safetensors")["step.projection.weight"].item() == 1


def test_the_last_two_states_are_kept_and_what_a_killed_process_was_writing_is_cleared(tmp_path: Path) -> None:
    Toy(tmp_path).train(4)
    assert names(tmp_path) == state_names(3, 4)
    (tmp_path / "state-000000000999.partial").mkdir()
    Toy(tmp_path).train(4)
    assert names(tmp_path) == state_names(3, 4)
    Toy(tmp_path).train(5)
    assert names(tmp_path) == state_names(4, 5)
    forget_states(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip(file: Path, at: int = -30, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "flipped": flip,
    "empty": lambda file: file.write_bytes(b""),
    "missing": Path.unlink,
}
SAID = {
    "truncated": r"{file} is damaged: it does not have the sha256 that state.json says",
    "flipped": r"{file} is damaged: it does not have the sha256 that state.json says",
    "empty": r"{file} is damaged: it does not have the sha256 that state.json says",
    "missing": r"{file}: No such file or directory",
}
SAID_OF_FACTS = {
    "truncated": "state.json cannot be read",
    "flipped": "state.json is damaged: it does not have its own sha256",
    "empty": "state.json cannot be read",
    "missing": "state.json is missing",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_state_is_named_and_the_one_before_is_used(tmp_path: Path, file: str, damage: str) -> None:
    expected = undisturbed(tmp_path / "undisturbed")
    work = tmp_path / "work"
    interrupted(work, 4)
    before, newest = (work / name for name in names(work))
    DAMAGES[damage](newest / file)
    resumed = Toy(work).train(STEPS)
    assert_same(resumed, expected)
    reason = (SAID_OF_FACTS if file == "state.json" else SAID)[damage].format(file=file)
    assert resumed.said == [f"{newest} cannot be used: {reason}", f"training goes on from {before}, step 3"]
    assert names(work) == state_names(5, 6)


def test_no_flipped_bit_is_taken_for_a_state(tmp_path: Path) -> None:
    Toy(tmp_path).train(1)
    (state,) = tmp_path.glob("state-*")
    draw = random.Random(0)
    for file in FILES:
        whole = (state / file).read_bytes()
        for _ in range(40):
            at, bit = draw.randrange(len(whole)), draw.randrange(8)
            flip(state / file, at, bit)
            toy = Toy(tmp_path)
            assert toy.states.resume() == (0, 0) and f"{state} cannot be used: {file}" in toy.said[0], (file, at, bit)
            (state / file).write_bytes(whole)
    assert Toy(tmp_path).states.resume() == (1, STEP_TOKENS)


def test_where_every_state_is_damaged_training_starts_again_and_says_so(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "undisturbed")
    work = tmp_path / "work"
    interrupted(work, 4)
    first, second = (work / name for name in names(work))
    truncate(first / "optimizer.safetensors")
    flip(second / "student.safetensors")
    torch.manual_seed(0)
    again = Toy(work).train(2)
    sha = "is damaged: it does not have the sha256 that state.json says"
    assert again.said == [
        f"{second} cannot be used: student.safetensors {sha}",
        f"{first} cannot be used: optimizer.safetensors {sha}",
        f"no state in {work} can be used: training starts again from step 0",
    ]
    assert names(work) == state_names(1, 2), "what is saved anew is not taken for older than what was damaged"
    assert_same(Toy(work).train(STEPS), expected)


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> Iterator[list[str]]:
    """No space is left after `room` further writes to files and flushes of them to the disk; yields those calls."""
    done: list[str] = []

    def limited(call: Callable[..., Any]) -> Callable[..., Any]:
        def act(file: int, *arguments: Any) -> Any:
            if stat.S_ISREG(os.fstat(file).st_mode):
                if len(done) >= room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done.append(call.__name__)
            return call(file, *arguments)

        return act

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited(os.write))
        patch.setattr(os, "fsync", limited(os.fsync))
        yield done


def test_a_disk_that_fills_up_at_any_write_leaves_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(tmp_path / "undisturbed")
    interrupted(tmp_path / "work", 3)
    with full_disk(monkeypatch, 1000) as done:
        Toy(tmp_path / "counted").train(1)
    assert done.count("write") >= 4 and done.count("fsync") == 1 + len(FILES)
    message = (
        r"cannot write .*/work/(metrics.jsonl|state-0+64): No space left on device; "
        r"free some space and run the same command to go on from step 3$"
    )
    for room in range(len(done)):
        torch.manual_seed(1)
        with full_disk(monkeypatch, room), pytest.raises(RunError, match=message):
            Toy(tmp_path / "work").train(4)
        assert names(tmp_path / "work") == state_names(2, 3), room
    resumed = Toy(tmp_path / "work").train(STEPS)
    assert_same(resumed, expected)
    assert resumed.said == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_metrics_file_that_cannot_grow_is_one_clear_error(tmp_path: Path) -> None:
    toy = Toy(tmp_path).train(2)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot write .*/metrics.jsonl: No space left .* to go on from step 2$"):
        toy.states.log({"step": 3, "tokens": 3 * STEP_TOKENS})
    assert names(tmp_path) == state_names(1, 2)


def test_metrics_after_the_state_are_forgotten_or_on_a_full_disk_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Toy(tmp_path).train(4, save=lambda step: step == 2)
    rows = (tmp_path / "metrics.jsonl").read_text()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tok')
    with full_disk(monkeypatch, 0), pytest.raises(RunError, match=r"metrics.jsonl: .* to go on from step 2$"):
        Toy(tmp_path).states.resume()
    assert (tmp_path / "metrics.jsonl").read_text() == rows + '{"step": 5, "tok'
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", *state_names(2)}
    assert Toy(tmp_path).states.resume() == (2, 2 * STEP_TOKENS)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(rows.splitlines(keepends=True)[:2])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 5}, r"student.safetensors is of another training: 0.weight is float32 \[4, 3\] there and "),
        ({"optimizer": "SGD"}, "is of AdamW on blocks of 8 tokens, and this training is of SGD on blocks of 8; go on"),
        ({"block": 16}, "is of AdamW on blocks of 8 tokens, and this training is of AdamW on blocks of 16; go on"),
    ],
    ids=str,
)
def test_the_state_of_another_training_is_refused_and_stays(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    Toy(tmp_path).train(2)
    rows = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(RunError, match=message):
        Toy(tmp_path, **other).states.resume()
    assert names(tmp_path) == state_names(1, 2) and (tmp_path / "metrics.jsonl").read_text() == rows


def test_an_extra_tensor_that_only_one_of_two_trainings_has_is_named(tmp_path: Path) -> None:
    Toy(tmp_path).train(1)
    other = Toy(tmp_path)
    other.states.extra = {"counter": other.counter}
    with pytest.raises(RunError, match=r"another training: projection.weight is float32 \[2, 2\] there and absent"):
        other.states.resume()
    other.states.extra = {**Toy(tmp_path).states.extra, "bias": torch.zeros(2)}
    with pytest.raises(RunError, match=r"another training: bias is absent there and float32 \[2\] here"):
        other.states.resume()


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 16])
def test_the_step_of_another_batch_is_the_nearest_and_counts_on_by_one(batch: int) -> None:
    for blocks in range(40):
        step = nearest_step(blocks * BLOCK, batch * BLOCK)
        assert abs(step * batch - blocks) <= batch / 2
        assert [nearest_step((blocks + more * batch) * BLOCK, batch * BLOCK) for more in range(4)] == [
            step + more for more in range(4)
        ]


def test_a_state_of_another_batch_keeps_its_tokens(tmp_path: Path) -> None:
    Toy(tmp_path).train(3)
    assert Toy(tmp_path, batch=4).states.resume() == (2, 3 * STEP_TOKENS)
