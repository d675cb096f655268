"""The run directory: a lock, the resolved recipe, and stages that run once.

A stage writes into a temporary directory that is renamed when it is complete; its record.json says what went in. A
stage whose record is there and whose inputs are unchanged is done. Inputs that changed are an error that says which.

Of several processes the first alone writes, and decides what is done already. A stage is shared by all of them, or done
by the first while the others wait for its record.
"""

import fcntl
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from minitron.core import parallel
from minitron.core.config import Section
from minitron.core.errors import CheckpointError, RunError
from minitron.core.files import (
    Digests,
    atomic_directory,
    digest_files,
    read_digests,
    readable_os_errors,
    remember_digest,
    require_directory,
    write_json,
    write_text,
)
from minitron.core.machine import EnergyCounter, forget_peak_memory, hardware, peak_memory, versions
from minitron.core.progress import SILENT, Listener
from minitron.core.run_layout import INPUTS, RECORD, RECORD_FILE, STAGES, WORK, Inputs, Record, RunLayout
from minitron.core.typed_files import read_typed
from minitron.recipe import Recipe, dump_recipe
from minitron.report.exporters import EXPORTERS

# What a run makes in its directory, of which no input may be a part.
RUN_ENTRIES = (*STAGES, *EXPORTERS, *WORK)


@dataclass
class RunDirectory:
    """An open run directory: its lock, its resolved recipe and its stages."""

    out: Path
    recipe: Recipe | None = None  # to store; None for the work of one verb
    listener: Listener = SILENT
    final: Mapping[str, Path] = field(default_factory=dict)  # where stages go in the end, and may be already
    _digests: Digests = field(default_factory=dict)

    @property
    def layout(self) -> RunLayout:
        """The paths of everything in the run directory."""
        return RunLayout(self.out)

    def __enter__(self) -> "RunDirectory":
        if not parallel.is_first():
            return self
        with readable_os_errors(self.out):
            end = require_directory(self.out)
            self._created = not end.exists()
            end.mkdir(parents=True, exist_ok=True)
            self._lock = self.layout.lock.open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RunError(
                f"run directory {self.out} is in use by another process; wait for it, or choose another --out"
            ) from None
        self._digests = read_digests(self.layout.digests)
        if not self.layout.recipe.exists():
            self._write_recipe()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if not parallel.is_first():
            return
        if kind is None:
            self._write_recipe()  # not before every stage has agreed to it
        elif self._created:
            # Bad input leaves nothing behind; text tokenized for a damaged model is no use.
            of_no_use = {"data"} if issubclass(kind, CheckpointError) else set()
            if {path.name for path in self.out.glob("*/")} <= of_no_use:
                shutil.rmtree(self.out.resolve())
        self._lock.close()

    def update_recipe(self, recipe: Recipe, sections: Mapping[str, Section]) -> Recipe:
        """The recipe with sections replaced by their resolved form, which is the one to store."""
        updated = recipe.model_copy(update=sections)
        if self.recipe is not None:
            self.recipe = updated
        return updated

    def digest(self, files: list[Path]) -> str:
        if not parallel.is_first():
            return ""  # the first compares it
        known = dict(self._digests)
        digest = digest_files(files, self._digests)
        if self._digests != known:
            write_json(self.layout.digests, self._digests)
        return digest

    def remember(self, digests: Mapping[Path, str]) -> None:
        """Take over the digests of files that were hashed when they were written, so that they are not read again."""
        if not parallel.is_first():
            return
        for file, digest in digests.items():
            remember_digest(file, digest, self._digests)
        if digests:
            write_json(self.layout.digests, self._digests)

    def do(
        self,
        name: str,
        work: Callable[[Path], Mapping[str, object]],
        *,
        inputs: Mapping[str, str],
        config: Mapping[str, object],
        state: Path | None = None,
        named: Mapping[str, Path] | None = None,
        assist: Callable[[], object] | None = None,
    ) -> Path:
        """Run one stage unless its record says that it is done; returns its directory.

        Args:
            work: fills the directory it is given and returns the result for the record.
            state: the directory from which `work` resumes after an interruption, for the same inputs only.
            named: input -> a file that an error names for it, where the input's own name does not say enough.
            assist: the part of `work` that other processes than the first do; None where it works alone.
        """
        path, plain, made = self.out / name, {key: _plain(value) for key, value in config.items()}, None
        if parallel.is_first():
            made = self._found(name, inputs, plain, named or {})
            if made is None and state is not None:
                _require_same_start(state, Inputs(inputs=dict(inputs), config=plain), named or {})
        made = parallel.agreed(None if made is None else str(made))
        self.listener.stage(name, "running" if made is None else "unchanged")
        if made is not None:
            return Path(made)
        if parallel.is_first():
            with parallel.alone() if assist is None else nullcontext():
                self._make(name, work, inputs, plain)
        elif assist is not None:
            assist()
        parallel.require_all_well()  # the others wait for the record
        self.listener.stage(name, "done")
        return path

    def _found(
        self, name: str, inputs: Mapping[str, str], config: Mapping[str, object], named: Mapping[str, Path]
    ) -> Path | None:
        """Return the directory of a stage that is done, or None.

        Raises: RunError if it was made from other inputs.
        """
        for made in (self.out / name, self.final.get(name, self.out / name)):
            if (made / RECORD_FILE).exists():
                _require_same(made, read_record(made), inputs, config, named)
                return made
        return None

    def _make(
        self,
        name: str,
        work: Callable[[Path], Mapping[str, object]],
        inputs: Mapping[str, str],
        config: Mapping[str, object],
    ) -> None:
        """Make the stage's directory, with its record."""
        started, clock, energy = time.time(), time.monotonic(), EnergyCounter()
        forget_peak_memory()
        with atomic_directory(self.out / name) as partial:
            result = work(partial)
            write_json(
                partial / RECORD_FILE,
                {
                    "stage": name,
                    "inputs": dict(inputs),
                    "config": config,
                    "result": result,
                    "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                    "seconds": round(time.monotonic() - clock, 3),
                    "peak_memory_bytes": peak_memory(),
                    "energy_joules": energy.joules(),
                    "versions": versions(),
                    "hardware": hardware(),
                },
            )

    def _write_recipe(self) -> None:
        if self.recipe is None:
            return
        write_text(self.layout.recipe, dump_recipe(self.recipe))


def read_record(stage: Path) -> Record:
    """Read the record of a finished stage.

    Raises: RunError if it cannot be read or is no record.
    """
    again = f"remove {stage} and run the same command to make it again"
    return read_typed(stage / RECORD_FILE, RECORD, RunError, way_out=again)


def _plain(value: object) -> object:
    return value.model_dump(mode="json") if isinstance(value, Section) else value


def _require_same(
    path: Path,
    known: Inputs,
    inputs: Mapping[str, str],
    config: Mapping[str, object],
    named: Mapping[str, Path],
) -> None:
    changed = [
        f"{name} ({named[name]})" if name in named else name
        for name, digest in inputs.items()
        if known.inputs.get(name) != digest
    ]
    old, new = _flat(known.config), _flat(config)
    changed += [
        f"{key} ({old.get(key)!r}, now {new.get(key)!r})" for key in {*old, *new} if old.get(key) != new.get(key)
    ]
    if changed:
        raise RunError(
            f"{path} was made from other inputs; changed: {', '.join(sorted(changed))}. "
            "Put them back, delete that directory and those made after it, or choose another --out"
        )


def _require_same_start(state: Path, start: Inputs, named: Mapping[str, Path]) -> None:
    file = state / "inputs.json"
    if file.exists():
        known = read_typed(file, INPUTS, RunError, way_out=f"remove {state} to start again")
        _require_same(state, known, start.inputs, start.config, named)
        return
    with readable_os_errors(state):
        state.mkdir(parents=True, exist_ok=True)
    write_json(file, start.model_dump())


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
