"""Whatever interrupts a training, a tracker shows the rows of metrics.jsonl, each of them once."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minitron import api
from minitron.core.errors import MinitronError
from minitron.core.progress import Silent
from minitron.data.config import DataConfig
from minitron.distillation import trackers
from minitron.distillation.config import DistillConfig
from minitron.distillation.trackers import REQUIREMENTS, TrackerName, tracked
from minitron.pipeline.run import run
from minitron.recipe import build_recipe

Shown = dict[tuple[str, int], list[float]]  # name of a number and step -> every value shown

# What of Weights & Biases is relied on: steps only grow, and a run that goes on knows the next one, but not offline.
WANDB = """
import json, os, time
from pathlib import Path

class Error(Exception):
    pass

class Settings:
    def __init__(self, console):
        assert console == "off"

class Run:
    def __init__(self, name, id, dir):
        self.offline = os.environ.get("WANDB_MODE") == "offline"
        kind = "offline-run" if self.offline else "run"
        self.dir = Path(dir) / "wandb" / f"{kind}-{time.monotonic_ns()}-{id}" / "files"
        self.dir.mkdir(parents=True)
        self.file = self.dir.parent / "rows" if self.offline else Path(dir) / f"server-{id}"
        rows = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        self.step = rows[-1]["step"] + 1 if rows else 0

    def log(self, values, step):
        assert step >= self.step, "wandb would ignore it"
        self.step = step
        with self.file.open("a") as file:
            file.write(json.dumps(values | {"step": step}) + "\\n")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

def init(project, name, id, resume, dir, config, settings):
    assert resume == "allow" and json.dumps(config)
    if os.environ.get("WANDB_MODE") == "no key":
        raise Error("No API key configured. Use `wandb login` to log in.")
    return Run(name, id, dir)
"""
# What of trackio is relied on: runs of a project can be listed and deleted.
TRACKIO = """
import json, os
from pathlib import Path

HERE = Path(os.environ["TRACKIO_DIR"])

class Run:
    def __init__(self, name):
        self.name, self.file = name, HERE / name

    def log(self, values, step):
        with self.file.open("a") as file:
            file.write(json.dumps(values | {"step": step}) + "\\n")

    def finish(self):
        print("uploading")

    def delete(self):
        self.file.unlink()

class Api:
    def runs(self, project):
        if not HERE.exists():
            raise ValueError(f"Project '{project}' does not exist")
        return [Run(file.name) for file in HERE.iterdir()]

def init(project, name, config, embed):
    HERE.mkdir(exist_ok=True)
    assert not (HERE / name).exists(), "a second run of the name"
    print("* Created new run")
    return Run(name)
"""


@pytest.fixture(autouse=True)
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the places of wandb and trackio, which are large and speak to servers."""
    path = tmp_path / "packages"
    for name, text, number in (("wandb", WANDB, "0.31"), ("trackio", TRACKIO, "0.43")):
        (path / f"{name}-{number}.dist-info").mkdir(parents=True)
        (path / f"{name}-{number}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {number}\n")
        (path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    yield
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def in_events(path: Path) -> Shown:
    events = EventAccumulator(str(path), {"scalars": 0}).Reload()
    shown: Shown = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            shown.setdefault((tag, event.step), []).append(event.value)
    return shown


def in_rows(file: Path) -> Shown:
    shown: Shown = {}
    for row in map(json.loads, file.read_text().splitlines()):
        for name, value in row.items():
            if name != "step":
                shown.setdefault((name, row["step"]), []).append(value)
    return shown


def only(path: Path, pattern: str) -> Path:
    (found,) = path.glob(pattern)
    return found


READ: dict[str, Callable[[Path], Shown]] = {
    "tensorboard": lambda at: in_events(at / "distill" / "tensorboard"),
    "wandb": lambda at: in_rows(only(at / "distill", "server-*")),
    "wandb offline": lambda at: in_rows(only(at / "distill", "wandb/offline-run-*/rows")),
    "trackio": lambda at: in_rows(only(at / "trackio", "*")),
}
ROWS = [{"step": step, "tokens": 64 * step, "loss": 1 / step, "grad_norm": 3.0 + step} for step in range(1, 11)]
HELDOUT = [{"step": step, "heldout_loss": 2 / step} for step in (4, 8, 10)]


def rows(start: int, stop: int) -> list[dict[str, Any]]:
    """Of the steps after `start` up to `stop`, as a training writes them."""
    return sorted((row for row in ROWS + HELDOUT if start < row["step"] <= stop), key=lambda row: row["step"])


def wanted(of: list[dict[str, Any]]) -> Shown:
    return {
        (name, row["step"]): [pytest.approx(value, rel=1e-6)]
        for row in of
        for name, value in row.items()
        if name != "step" and not (name == "tokens" and "heldout_loss" in row)
    }


@pytest.mark.parametrize(
    "starts",
    [((0, 10),), ((0, 5), (3, 7), (7, 10)), ((0, 9), (0, 2), (1, 10)), ((0, 10), (10, 10))],
    ids=str,
)
@pytest.mark.parametrize("name", READ)
def test_what_is_shown_is_one_training_however_often_it_started(
    name: str, starts: tuple[tuple[int, int], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    kind, *mode = name.split()
    monkeypatch.setenv("WANDB_MODE", "".join(mode))
    work = tmp_path / "distill"
    work.mkdir()
    for state, end in starts:
        with tracked([kind], work, rows(0, state), {"tokens": 640}) as track:
            for row in rows(state, end):
                track(row)
    assert READ[name](tmp_path) == wanted(rows(0, 10))
    assert capsys.readouterr().out == ""


def test_a_file_that_a_kill_cut_short_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "distill" / "tensorboard"
    with tracked(["tensorboard"], path.parent, [], {}) as track:
        for row in rows(0, 10):
            track(row)
    cut = only(path, "events*")
    cut.write_bytes(cut.read_bytes()[:-20])
    with tracked(["tensorboard"], path.parent, rows(0, 3), {}):
        pass
    assert in_events(path) == wanted(rows(0, 3))


def test_two_trainings_of_one_name_are_two_runs(tmp_path: Path) -> None:
    for place in ("a", "b"):
        work = tmp_path / place / "half" / "distill"
        work.mkdir(parents=True)
        with tracked(["trackio", "trackio"], work, rows(0, 2), {}):
            pass
    names = sorted(file.name for file in (tmp_path / "trackio").iterdir())
    assert len(names) == 2 and all(name.startswith("half-distill-") for name in names)


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("no-such-package>=1", "it is not installed: run `pip install 'no-such-package>=1'`"),
        ("numpy>=99", r"version \d.* is installed: run `pip install 'numpy>=99'`"),
    ],
)
def test_a_package_that_is_missing_or_too_old_is_named_before_any_work(
    requirement: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REQUIREMENTS, "wandb", requirement)
    raw = {"model": "no/where", "prune": {"target": "50%"}, "distill": {"log_to": ["tensorboard", "wandb"]}}
    message = rf"distill.log_to names wandb, and {said}.*, or take it out of distill.log_to$"
    with pytest.raises(MinitronError, match=message):
        run(build_recipe(raw), tmp_path / "out")
    config = DistillConfig(log_to=["wandb"])
    with pytest.raises(MinitronError, match=message):
        api.distill("no/where", "no/where", DataConfig(), config, seed=0, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_cannot_be_started_says_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "no key")
    message = r"cannot be started: No API key configured.* Set WANDB_MODE=offline to log into .*, or take wandb out"
    with pytest.raises(MinitronError, match=message), tracked(["wandb"], tmp_path, [], {}):
        pass


def test_an_unknown_tracker_is_named() -> None:
    raw = {"model": "m", "prune": {"target": "50%"}, "distill": {"log_to": ["tensorbord"]}}
    with pytest.raises(MinitronError, match=r"distill.log_to.0: Input should be 'tensorboard', .*got 'tensorbord'"):
        build_recipe(raw)


def test_every_tracker_has_a_name_and_a_requirement() -> None:
    assert list(trackers.TRACKERS) == list(REQUIREMENTS) == list(TrackerName.__args__)


class PowerCut(Silent):
    def progress(self, done: int, total: int, note: str = "") -> None:
        if total == 10 and done == 6:
            raise InterruptedError


def test_a_training_that_goes_on_may_be_tracked_from_then_on_and_shows_its_beginning(tmp_path: Path) -> None:
    teacher, text = str(small.teacher(tmp_path / "teacher")), small.text(tmp_path / "text.jsonl")
    data = DataConfig(source=str(text), block_tokens=16, heldout_fraction=0.2)
    plain = DistillConfig(tokens=10 * 4 * 16, batch_blocks=4, checkpoint_steps=4, evaluate_steps=5, evaluate_blocks=4)
    watched = plain.model_copy(update={"log_to": ["tensorboard", "wandb"]})
    out = tmp_path / "student"
    with pytest.raises(InterruptedError):
        api.distill(teacher, teacher, data, plain, seed=0, out=out, listener=PowerCut())
    with pytest.raises(InterruptedError):
        api.distill(teacher, teacher, data, watched, seed=0, out=out, listener=PowerCut())
    api.distill(teacher, teacher, data, watched, seed=0, out=out)
    metrics = in_rows(out / "metrics.jsonl")
    assert {name: step for name, step in metrics if name == "heldout_loss"} == {"heldout_loss": 10}
    shown = in_events(out / "tensorboard")
    assert shown.keys() == metrics.keys()
    for place, values in metrics.items():
        # The tokens seen stand in a step's own row and in that of its evaluation.
        assert set(shown[place]) == {np.float32(value).item() for value in values}, place
        assert len(shown[place]) == len(values)
    assert (out / "wandb").is_dir()
