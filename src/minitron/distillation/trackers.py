"""The trackers that get the rows of metrics.jsonl too: TensorBoard, Weights & Biases and trackio.

metrics.jsonl is the truth. Whenever a training starts or is resumed, every tracker first drops, if it can, the rows of
an earlier start, and is given those of the file. So it shows one training, as if nothing had interrupted it, and a
tracker that is chosen later shows the beginning too.

A new tracker takes a context manager that yields a function of a row, a line of TRACKERS, a name in TrackerName, and
its package in REQUIREMENTS.
"""

import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from minitron.core import parallel
from minitron.core.errors import MinitronError, RunError
from minitron.core.files import readable_os_errors, write_text
from minitron.core.reading import read_text

TrackerName = Literal["tensorboard", "wandb", "trackio"]
MetricsRow = Mapping[str, Any]
Track = Callable[[MetricsRow], None]
# What was tried: tensorboard 2.21, wandb 0.31, trackio 0.43.
REQUIREMENTS: dict[TrackerName, str] = {
    "tensorboard": "tensorboard>=2.20",
    "wandb": "wandb>=0.20",
    "trackio": "trackio>=0.43",
}
PROJECT = "minitron"


def require_trackers(names: Iterable[TrackerName]) -> None:
    """Refuse trackers whose packages are missing or too old.

    Raises: MinitronError.
    """
    for name in names:
        requirement = Requirement(REQUIREMENTS[name])
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            raise MinitronError(
                f"distill.log_to names {name}, and {f'version {found} is' if found else 'it is not'} installed: "
                f"run `pip install '{requirement}'`, or take it out of distill.log_to"
            )


@contextmanager
def tracked(
    names: Iterable[TrackerName], work: Path, rows: Iterable[MetricsRow], config: Mapping[str, Any]
) -> Iterator[Track]:
    """Open the trackers, and yield a function that gives a row to each; of several processes only the first tracks.

    Args:
        work: the training's directory, in which each tracker has one of its name.
        rows: the metrics so far, which the trackers are given first.
        config: settings, which trackers that can show beside the metrics.

    Raises: MinitronError if a tracker cannot be started.
    """
    if parallel.joined().rank > 0:
        names = ()
    names = list(dict.fromkeys(names))
    require_trackers(names)
    with ExitStack() as stack:
        trackers = [stack.enter_context(TRACKERS[name](work, config)) for name in names]

        def track(row: MetricsRow) -> None:
            for tracker in trackers:
                tracker(row)

        if trackers:
            for row in rows:
                track(row)
        parallel.require_all_well()  # before the others compute, where no error can be passed on
        yield track


def keep(work: Path, out: Path) -> None:
    """Move the trackers' files of a finished training to another directory."""
    for name in TRACKERS:
        if (work / name).exists():
            (work / name).rename(out / name)


@contextmanager
def _tensorboard(work: Path, config: Mapping[str, Any]) -> Iterator[Track]:
    """Write one event file, anew at every start; a TensorBoard that is open drops the points of the old one."""
    from torch.utils.tensorboard import SummaryWriter

    path = work / "tensorboard"
    earlier = list(path.glob("events.out.tfevents.*"))
    with readable_os_errors(path):
        writer = SummaryWriter(str(path), purge_step=0)
        for file in earlier:
            file.unlink()

    def track(row: MetricsRow) -> None:
        with readable_os_errors(path):
            for name, value in _values(row).items():
                writer.add_scalar(name, value, row["step"])

    try:
        yield track
    finally:
        with readable_os_errors(path):
            writer.close()


@contextmanager
def _wandb(work: Path, config: Mapping[str, Any]) -> Iterator[Track]:
    """Log one run under one id. The server says which step comes next, and earlier steps are not sent again: a training
    that is resumed repeats them with the same values. Offline, each start writes a whole run and removes the last."""
    import wandb

    own = _training_id(work)
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_training_name(work),
            id=own,
            resume="allow",
            dir=str(work),
            config=dict(config),
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise MinitronError(
            f"Weights & Biases cannot be started: {error} Set WANDB_MODE=offline to log into {work}, or take wandb out "
            "of distill.log_to"
        ) from None
    if run.offline:
        here = Path(run.dir).resolve().parent
        for other in (work / "wandb").glob(f"offline-run-*-{own}*"):
            if other.resolve() != here:
                shutil.rmtree(other)
    first = run.step

    def track(row: MetricsRow) -> None:
        if row["step"] >= first:
            run.log(_values(row), step=row["step"])

    with run:
        yield track


@contextmanager
def _trackio(work: Path, config: Mapping[str, Any]) -> Iterator[Track]:
    """Log one run in trackio's own database, anew at every start. In a Space the earlier one stays."""
    with redirect_stdout(sys.stderr):  # what the command prints is its result
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        name = f"{_training_name(work)}-{_training_id(work)}"
        try:
            earlier = [run for run in trackio.Api().runs(project) if run.name == name]
        except ValueError:  # the project is yet to be
            earlier = []
        for old in earlier:
            old.delete()
        run = trackio.init(project=project, name=name, config=dict(config), embed=False)
    try:
        yield lambda row: run.log(_values(row), step=row["step"])
    finally:
        with redirect_stdout(sys.stderr):
            run.finish()


TRACKERS: dict[TrackerName, Callable[[Path, Mapping[str, Any]], AbstractContextManager[Track]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _values(row: MetricsRow) -> MetricsRow:
    return {name: value for name, value in row.items() if name != "step"}


def _training_name(work: Path) -> str:
    """Name a training after its directory: runs/half/distill is half-distill, student.work/distill student-distill."""
    work = work.resolve()
    return f"{work.parent.name.removesuffix('.work')}-{work.name}"


def _training_id(work: Path) -> str:
    """Return an id that the training in this directory has at every start, and no other training has."""
    file = work / "tracking-id"
    if not file.exists():
        write_text(file, uuid.uuid4().hex[:12])
    own = read_text(file, RunError).strip()
    if not re.fullmatch("[0-9a-f]{12}", own):
        raise RunError(f"{file} holds no id of a training: remove it, and trackers begin a new run")
    return own
