"""Bad input and what a command may do with it: files of every kind that minitron reads, damaged one at a time.

The law: the exit code is 0, 1 or 2; a refusal is one line that names the file, the key or the tensor that was damaged;
nothing ends in a traceback, a signal or not at all; what the command makes is there whole or not at all; and nothing
else changes. A command that succeeds prints finite numbers. Where the damage cannot matter, or digests guard against
it, success means the result of the undamaged file.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import good_input
import mutations
import tiny
from bad_targets import SET_DISTILL_KEYS, SET_KEYS, TARGETS, Target
from forks import CRASHED, Ended, Forks
from hypothesis import strategies as st
from mutations import Mutation
from safetensors import SafetensorError
from safetensors.torch import load_file

LIMIT_SECONDS = 120
# Directories of a desk that any command may fill: they are the user's cache.
CACHE = "cache"


@dataclass(frozen=True)
class Outcome:
    """What a command did with an input: how it ended, and how it broke the law, if it did."""

    mutation: Mutation
    ended: Ended
    same: bool  # it succeeded with the result of the undamaged file
    violations: tuple[str, ...]


class Room:
    """Good inputs of every kind in one directory, from which each command gets a desk of its own."""

    def __init__(self, base: Path, targets: Collection[Target] = tuple(TARGETS.values())):
        """
        Args:
            base: an empty directory.
            targets: the targets whose files are made.
        """
        self.base, self.desk, self.good = base, base / "desk", base / "good"
        self.forks = Forks(base)
        self.results: dict[tuple[tuple[str, ...], ...], dict[str, str]] = {}
        self.desk.mkdir()
        for name in PLACES.values():
            (self.desk / name).mkdir(exist_ok=True)
        files = [name for target in targets for name in (*target.needs, target.file or "")]
        good_input.make(self.desk, self.made, {name.split("/")[0] for name in files})
        for name in set(PLACES.values()):
            shutil.rmtree(self.desk / name)
        self.desk.rename(self.good)

    def close(self) -> None:
        self.forks.close()

    def run(self, *command: str, killed_after_saves: int = 0) -> Ended:
        places = {name: str(self.desk / directory) for name, directory in PLACES.items()}
        return self.forks.run(
            *command, "--json", "--quiet",
            cwd=self.desk, places=places, limit_seconds=LIMIT_SECONDS, killed_after_saves=killed_after_saves,
        )  # fmt: skip

    def made(self, *command: str, killed_after_saves: int = 0) -> None:
        ended = self.run(*command, killed_after_saves=killed_after_saves)
        assert ended.code == (-9 if killed_after_saves else 0), (command, ended)

    def inputs(self, target: Target) -> st.SearchStrategy[Mutation]:
        """Every way to damage a target's file or argument."""
        if target.file is None:
            return _settings(SET_KEYS if target.form == "set" else SET_DISTILL_KEYS, target.form)
        return mutations.mutations(target.form, (self.good / self.actual(target.file)).read_bytes())

    def outcome(self, target: Target, mutation: Mutation) -> Outcome:
        """Run a target's command on a damaged input, and hold the law against what it does."""
        self._lay_out(target)
        extra = self._damage(target, mutation)
        before = _snapshot(self.desk)
        ended = self.run(*target.command, *extra)
        after = _snapshot(self.desk)
        found = self._result(target, ended)
        broken = [*_of_the_end(target, mutation, ended, self), *_of_the_files(target, ended, before, after)]
        if ended.code == 0 and not broken:
            broken = [*_of_success(target, ended, self.desk)]
        same = ended.code == 0 and found == self._undamaged(target)
        if ended.code == 0 and not broken and target.same and not same:
            broken = ["succeeds with another result than that of the undamaged file"]
        return Outcome(mutation, ended, same, tuple(broken))

    def actual(self, file: str) -> str:
        """A file's name, of a training's state that of the newest."""
        if "STATE" not in file:
            return file
        newest = sorted((self.good / file.partition("STATE")[0]).glob("state-*"))[-1]
        return file.replace("STATE", newest.name)

    def _undamaged(self, target: Target) -> dict[str, str]:
        """What the command makes of good input; the same for all targets of one command on the same files."""
        key = target.command, target.needs
        if key not in self.results:
            self._lay_out(target)
            ended = self.run(*target.command)
            assert ended.code == 0 and not _said(ended), (target.name, ended)
            assert not [*_of_success(target, ended, self.desk)], (target.name, ended)
            self.results[key] = self._result(target, ended)
        return self.results[key]

    def _lay_out(self, target: Target) -> None:
        shutil.rmtree(self.desk, ignore_errors=True)
        self.desk.mkdir()
        for name in PLACES.values():
            (self.desk / name).mkdir(exist_ok=True)
        for name in dict.fromkeys((*target.needs, *([target.file] if target.file else ()))):
            source, place = self.good / self.actual(name), self.desk / self.actual(name).removeprefix("recorded/")
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)
            elif not place.exists():
                shutil.copy2(source, place)

    def _damage(self, target: Target, mutation: Mutation) -> tuple[str, ...]:
        """Put the damaged file in place; returns the arguments to add."""
        if target.file is None:
            return ("--set", mutation.data.decode(errors="surrogatepass"))
        file = self.desk / self.actual(target.file).removeprefix("recorded/")
        file.unlink()
        match mutation.kind:
            case "file":
                file.write_bytes(mutation.data)
            case "directory":
                file.mkdir()
            case "dangling link":
                file.symlink_to("nowhere")
            case "link to itself":
                file.symlink_to(file.name)
        return ()

    def _result(self, target: Target, ended: Ended) -> dict[str, str]:
        """What a command made, as digests, or where it makes nothing what it printed."""
        places = [target.out] if target.out else list(target.kept)
        files = [file for place in places for file in [self.desk / place, *(self.desk / place).rglob("*")]]
        wanted = [
            file
            for file in files
            if file.suffix in (".safetensors", ".gguf", ".html") or file.name in ("plan.json", "README.md")
        ]
        found = {
            str(file.relative_to(self.desk)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in wanted
            if file.is_file()
        }
        return found or {"stdout": ended.stdout}


PLACES = {"HOME": "home", "TMPDIR": "tmp"}
PLACES |= dict.fromkeys(("MINITRON_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"), CACHE)


@cache
def _settings(keys: tuple[str, ...], form: str) -> st.SearchStrategy[Mutation]:
    """Values of --set."""
    values = [json.dumps(value) for value in mutations.VALUES] + [
        "a: b: c",
        "[",
        "*x",
        "!!python/name:os",
        "{1: 2}",
        "~",
        "&a [*a]",
    ]
    section = "distill." if form.endswith("distill") else ""

    def made(key: str, value: str, equals: str) -> Mutation:
        text = f"{section}{key}{equals}{value}".replace("\x00", "?").replace("\\ud800", "?")
        return Mutation(f"--set {text[:80]!r}", text.encode(), tuple(key.split(".")))

    return st.builds(
        made, st.sampled_from(keys), st.sampled_from(values), st.sampled_from(["=", "=", "=", "", "==", " = "])
    )


def _of_the_end(target: Target, mutation: Mutation, ended: Ended, room: Room) -> Iterator[str]:
    if ended.timed_out:
        yield f"does not end in {LIMIT_SECONDS} s"
    elif ended.code < 0:
        yield f"is ended by signal {-ended.code}"
    elif ended.code == CRASHED or "Traceback (most" in ended.stderr:
        yield f"a traceback: {_last_line(ended.stderr)}"
    elif ended.code not in (0, 1, 2):
        yield f"exit code {ended.code}"
    else:
        said = _said(ended)
        if ended.code == 0 and said:
            yield f"succeeds and says more than warnings: {said[0][:200]}"
        elif ended.code == 1 and (len(said) != 1 or not said[0].startswith("error: ")):
            yield f"is refused in {len(said)} lines: {' / '.join(said)[:300]}"
        elif ended.code == 1 and not _is_named(target, mutation, said[0], room):
            yield f"the message does not name what is wrong: {said[0][:300]}"
        if ended.code == 1 and ended.stdout and target.command[0] != "inspect":
            yield f"is refused and prints a result: {ended.stdout[:100]}"


def _is_named(target: Target, mutation: Mutation, said: str, room: Room) -> bool:
    file = (Path(room.actual(target.file)).name,) if target.file else ()
    keys = [key.strip() for key in mutation.keys]
    return any(name.lower() in said.lower() for name in (*file, *target.words, *keys) if len(name) > 1)


def _of_the_files(target: Target, ended: Ended, before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    made = [target.out] if target.out else []
    free = (CACHE, *target.kept, *made)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if stray := [name for name in changed if not any(name == place or name.startswith(f"{place}/") for place in free)]:
        yield f"changes {', '.join(stray[:3])}"
    if target.out and ended.code != 0 and target.out in after:
        yield f"fails and leaves {target.out}"
    if target.out and ended.code == 0 and target.out not in after:
        yield f"succeeds without {target.out}"
    # What a signal left is another law's: the next start clears it.
    if ended.code >= 0 and (left := [name for name in after if ".partial" in name and name not in before]):
        yield f"leaves {left[0]}"


def _of_success(target: Target, ended: Ended, desk: Path) -> Iterator[str]:
    try:
        printed = json.loads(ended.stdout)
    except ValueError:
        yield f"prints no JSON: {ended.stdout[:100]}"
        return
    if odd := [place for place, number in _numbers(printed) if not math.isfinite(number)]:
        yield f"prints a number that is not finite: {odd[0]}"
    if target.out and (desk / target.out).is_dir():
        for file in (desk / target.out).rglob("*.safetensors"):
            try:
                load_file(file)
            except SafetensorError as error:
                yield f"makes {file.name}, which cannot be read: {error}"
                return
        if (desk / target.out / "config.json").is_file():
            try:
                tiny.logits(tiny.model(desk / target.out), tiny.tokens(1, 4))
            except Exception as error:
                yield f"makes a checkpoint that transformers does not run: {type(error).__name__}: {str(error)[:200]}"


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(inner, f"{place}.{key}")
    elif isinstance(value, float):
        yield place, value


def _said(ended: Ended) -> list[str]:
    """The lines on stderr but for warnings; of a wrong usage, argparse's own last line."""
    lines = [line for line in ended.stderr.splitlines() if line.strip() and not line.startswith("warning: ")]
    return lines[-1:] if ended.code == 2 else lines


def _last_line(text: str) -> str:
    """A traceback's error, and the last place in the project."""
    lines = text.strip().splitlines() or [""]
    places = re.findall(r'src/minitron/(\S+)", line (\d+), in (\S+)', text)
    where = f" at {places[-1][0]} in {places[-1][2]}" if places else ""
    return lines[-1][:200] + where


def _snapshot(directory: Path) -> dict[str, tuple[int, int, int]]:
    """File or directory -> kind, size and time of its last change; of directories the kind, for files come and go."""
    found: dict[str, tuple[int, int, int]] = {}
    for here, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = Path(here, name)
            stat = path.lstat()
            is_directory = path.is_dir() and not path.is_symlink()
            found[str(path.relative_to(directory))] = (
                stat.st_mode,
                *((0, 0) if is_directory else (stat.st_size, stat.st_mtime_ns)),
            )
    return found


def kind_of(violation: str) -> str:
    """Violations of one kind, without what differs from input to input."""
    return re.sub(r"\d+|'[^']*'|\"[^\"]*\"|/\S+", "…", violation)[:120]
