"""The files that a training resumes from: its last two states, each whole or not at all, and its metrics."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

from minitron.core import parallel
from minitron.core.direct_io import digest_file
from minitron.core.errors import RunError
from minitron.core.files import atomic_directory, readable_os_errors, write_text
from minitron.core.machine import versions
from minitron.core.parallel import at_owner, from_owner, joined, shard_like
from minitron.core.reading import parse_json, read_text
from minitron.core.run_layout import METRICS_FILE
from minitron.core.typed_files import as_typed
from minitron.distillation import layouts
from minitron.model.weights import write_shard

STUDENT, OPTIMIZER, RANDOM, EXTRA = (f"{name}.safetensors" for name in ("student", "optimizer", "random", "extra"))
STATE_FILE = "state.json"


class StateFacts(BaseModel, frozen=True, strict=True, extra="forbid"):
    """state.json describes a state and is written last."""

    step: int
    tokens: int  # seen so far
    batch_blocks: int
    block_tokens: int
    optimizer: str
    versions: dict[str, str]
    files: dict[str, str]  # the sha256 of every other file
    sha256: str = ""  # of the facts above

    def sealed(self) -> "StateFacts":
        above = json.dumps(self.model_dump(exclude={"sha256"}), sort_keys=True)
        return self.model_copy(update={"sha256": hashlib.sha256(above.encode()).hexdigest()})


@dataclass
class States:
    """The states of one training in the directory `work`, and its metrics.jsonl.

    A state holds the student's weights and the `extra` tensors, the optimizer's moments for each of them, torch's
    random state, and the number of tokens seen. `save` reads the objects given here, and `resume` fills them from a
    state.

    Args:
        extra: further tensors by name, trained or not; resuming fills them in place, like the weights.
        holders: parameter -> the process that holds its moments, where they are not sharded.
        warn: hears of each state that cannot be used, and which one is used instead.
    """

    work: Path
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batch_blocks: int
    block_tokens: int
    warn: Callable[[str], None]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    holders: Mapping[Tensor, int] = field(default_factory=dict)
    _good: list[Path] = field(init=False, default_factory=list)  # the states to keep, newest last
    _step: int = field(init=False, default=0)  # of the newest of them

    def __post_init__(self) -> None:
        with self._writing(self.work):
            self.work.mkdir(parents=True, exist_ok=True)

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row to the metrics; its `tokens` are those seen so far."""
        if joined().rank == 0:
            with self._writing(self._metrics), self._metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """The metrics so far."""
        if self._metrics.exists():
            yield from map(json.loads, read_text(self._metrics, RunError).splitlines())

    def random(self) -> dict[str, Tensor]:
        """Return torch's random state, which a state holds too."""
        device = self._device()
        cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
        return {"cpu": torch.get_rng_state(), **cuda}

    def set_random(self, random: Mapping[str, Tensor]) -> None:
        """Go back to a random state of `random`."""
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and self._device().type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self._device())

    def save(self, step: int, tokens: int, random: Mapping[str, Tensor] | None = None) -> None:
        """Add a state, and remove all others but the one before.

        Args:
            random: the random state after the step, where later ones have drawn numbers already.

        Raises: RunError if it cannot be written; the states that were there are then still there.
        """
        if joined().rank > 0:
            for tensors in self._contents(random).values():
                for name in _order(tensors):
                    tensors[name].full()
            return
        with self._writing(self._metrics), self._metrics.open("a") as file:
            os.fsync(file.fileno())  # no state without the metrics up to it, whatever happens to the machine
        path = self.work / f"state-{tokens:012d}"
        with parallel.awaited(), atomic_directory(path, replace=True, way_out=self._way_out()) as partial:
            facts = StateFacts(
                step=step,
                tokens=tokens,
                batch_blocks=self.batch_blocks,
                block_tokens=self.block_tokens,
                optimizer=type(self.optimizer).__name__,
                versions=versions(),
                files={name: _write(partial / name, tensors) for name, tensors in self._contents(random).items()},
            )
            (partial / STATE_FILE).write_text(facts.sealed().model_dump_json(indent=2))
        self._good, self._step = [*self._good[-1:], path], step
        for other in set(self.work.glob("state-*")) - set(self._good):
            shutil.rmtree(other)

    def resume(self) -> tuple[int, int]:
        """Go back to the newest state that can be used, and drop the metrics after it; return steps and tokens.

        Both are 0 if there is none. Where the batch had another size, the step is the one nearest to the tokens seen.

        Raises: RunError if the state is of another student, optimizer or block length.
        """
        found, unusable = _newest(self.work)
        warn = self.warn if joined().rank == 0 else lambda text: None
        for path, reason in unusable.items():
            warn(f"{path} cannot be used: {reason}")
        if found is None:
            if unusable:
                warn(f"no state in {self.work} can be used: training starts again from step 0")
            self._forget_metrics_after(0)
            return 0, 0
        path, facts = found
        self._restore(path, facts)
        self._good, self._step = (
            [path],
            nearest_step(facts.tokens, self.batch_blocks * self.block_tokens),
        )
        if unusable:
            warn(f"training goes on from {path}, step {self._step}")
        self._forget_metrics_after(facts.tokens)
        return self._step, facts.tokens

    @property
    def _metrics(self) -> Path:
        return self.work / METRICS_FILE

    def _writing(self, path: Path) -> AbstractContextManager[None]:
        return readable_os_errors(path, way_out=self._way_out())

    def _way_out(self) -> str:
        return f"free some space and run the same command to go on from step {self._step}"

    def _tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Return file -> the tensors in it that are filled in place."""
        return {STUDENT: dict(self.model.named_parameters())} | ({EXTRA: self.extra} if self.extra else {})

    def _named(self) -> dict[str, Tensor]:
        """Return the tensors for which the optimizer may hold moments."""
        return {name: tensor for tensors in self._tensors().values() for name, tensor in tensors.items()}

    def _contents(self, random: Mapping[str, Tensor] | None) -> dict[str, dict[str, "_Entry"]]:
        """Return file -> all its tensors."""
        names = {tensor: name for name, tensor in self._named().items()}
        device, holders = self._device(), self.holders
        held = {
            f"{entry}.{names[parameter]}": _Entry(value, device, None if entry == "step" else holders.get(parameter))
            for parameter, entries in self.optimizer.state.items()
            for entry, value in entries.items()
        }
        others = {**self._tensors(), RANDOM: random or self.random()}
        made = {file: {name: _Entry(t, device) for name, t in tensors.items()} for file, tensors in others.items()}
        return {**made, OPTIMIZER: held}

    def _restore(self, path: Path, facts: StateFacts) -> None:
        kind = type(self.optimizer).__name__
        if (facts.optimizer, facts.block_tokens) != (kind, self.block_tokens):
            raise RunError(
                f"{path} is of {facts.optimizer} on blocks of {facts.block_tokens} tokens, and this training is of "
                f"{kind} on blocks of {self.block_tokens}; go on with the same, or start in an empty directory"
            )
        for file in (STUDENT, EXTRA):
            stored = load_file(path / file) if file in facts.files else {}
            _fill(self._tensors().get(file, {}), stored, path / file)
        self._restore_optimizer(load_file(path / OPTIMIZER))
        self.set_random(load_file(path / RANDOM))

    def _restore_optimizer(self, held: Mapping[str, Tensor]) -> None:
        # torch's own rule: a step count lies beside its parameter for kernels that read it there, else on the CPU.
        beside = {
            parameter: bool(group.get("fused") or group.get("capturable"))
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        }
        named = self._named()
        for key, value in held.items():
            entry, _, name = key.partition(".")
            parameter = named[name]
            device = parameter.device if entry != "step" or beside[parameter] else "cpu"
            value = value.to(device)
            if entry != "step":
                holder = self.holders.get(parameter)
                value = shard_like(value, parameter) if holder is None else at_owner(value, holder)
            self.optimizer.state[parameter][entry] = value

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _forget_metrics_after(self, tokens: int) -> None:
        if joined().rank > 0 or not self._metrics.exists():
            return
        text = _metrics_text(self._metrics)
        lines = text.splitlines()
        rows = [_tokens_of(line) for line in lines]
        if damaged := [number for number, row in enumerate(rows[:-1], start=1) if row is None]:
            self.warn(f"{self._metrics}, line {damaged[0]}, is no row of metrics: it is left out")
        kept = "".join(line + "\n" for line, row in zip(lines, rows, strict=True) if row is not None and row <= tokens)
        if kept != text:
            write_text(self._metrics, kept, way_out=self._way_out())


@dataclass(frozen=True)
class _Entry:
    """A tensor that goes into a file; this process may hold all of it, a part, or nothing."""

    tensor: Tensor
    device: torch.device  # where what it lacks may come from other processes
    holder: int | None = None  # the process that has it all; None: it may be divided

    def full(self) -> Tensor:
        """Return the whole tensor; every process must call this."""
        return parallel.full(self.tensor) if self.holder is None else from_owner(self.tensor, self.holder, self.device)


def nearest_step(tokens: int, step_tokens: int) -> int:
    """Return the number of steps that come nearest to so many tokens; of two, the higher."""
    return (2 * tokens + step_tokens) // (2 * step_tokens)


def forget_states(work: Path) -> None:
    """Remove the states of a finished training; its metrics stay."""
    for state in work.glob("state-*"):
        shutil.rmtree(state)


def _newest(work: Path) -> tuple[tuple[Path, StateFacts] | None, dict[Path, str]]:
    """Return the newest state that can be used, and why newer ones cannot."""
    unusable: dict[Path, str] = {}
    for path in sorted(work.glob("state-*"), reverse=True):
        if path.suffix == ".partial":  # was being written by a process that was killed
            if joined().rank == 0:
                shutil.rmtree(path)
            continue
        try:
            return (path, _checked_facts(path)), unusable
        except ValueError as error:
            unusable[path] = str(error)
    return None, unusable


def _checked_facts(state: Path) -> StateFacts:
    """Read a state's description, after checking every file against it.

    Raises: ValueError that says which file is not as it was written.
    """
    try:
        facts = StateFacts.model_validate_json((state / STATE_FILE).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{STATE_FILE} is missing") from None
    except (OSError, ValueError):
        raise ValueError(f"{STATE_FILE} cannot be read") from None
    if facts != facts.sealed():
        raise ValueError(f"{STATE_FILE} is damaged: it does not have its own sha256")
    for name, digest in facts.files.items():
        try:
            found = digest_file(state / name)
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror}") from None
        if found != digest:
            raise ValueError(f"{name} is damaged: it does not have the sha256 that {STATE_FILE} says")
    return facts


def _write(file: Path, entries: Mapping[str, _Entry]) -> str:
    """Write tensors from any device, one in memory at a time; return the file's sha256."""
    names = _order(entries)
    types = {name: (entries[name].tensor.dtype, tuple(entries[name].tensor.shape)) for name in names}
    return write_shard(file, types, (entries[name].full().detach().cpu() for name in names))


def _order(entries: Mapping[str, _Entry]) -> list[str]:
    """Order tensors so that each begins at a multiple of its item size."""
    return sorted(entries, key=lambda name: -entries[name].tensor.itemsize)


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor], file: Path) -> None:
    for name in {**tensors, **stored}:
        now, then = (_type(group[name]) if name in group else "absent" for group in (tensors, stored))
        if now != then:
            raise RunError(
                f"{file} is of another training: {name} is {then} there and {now} here; "
                "train the same student, or start in an empty directory"
            )
        tensors[name].copy_(shard_like(stored[name].to(tensors[name].device), tensors[name]))


def _type(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _metrics_text(file: Path) -> str:
    """Read a file of metrics; a byte that is no text makes its line no row."""
    try:
        return file.read_bytes().decode(errors="replace")
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror}; remove it, and the metrics begin anew") from None


def _tokens_of(line: str) -> int | None:
    """Return the tokens seen at a row of metrics; None for a line that is no row, such as one that a kill cut short."""
    try:
        row = parse_json(line, METRICS_FILE, RunError)
        return as_typed(row, layouts.LOGGED, METRICS_FILE, RunError).tokens
    except RunError:
        return None
