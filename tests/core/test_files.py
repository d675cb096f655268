"""An output's place is proven before the work, finished work is never thrown away, and streams cost no result."""

import fcntl
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minitron.cli import console
from minitron.cli.main import COMMANDS, build_parser, main
from minitron.cli.parse import words
from minitron.core import files
from minitron.core.config import expanded
from minitron.core.errors import MinitronError, RunError
from minitron.core.files import (
    PROBE,
    atomic_directory,
    atomic_file,
    beside,
    prove_directory,
    prove_file,
    put_directory,
    read_digests,
    require_free_space,
    scratch_directory,
    scratch_errors,
    write_text,
)
from minitron.data.config import DataConfig

needs_dev_full = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full"
)


def names(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*")}


def fill(path: Path) -> None:
    with atomic_directory(path) as partial:
        (partial / "model.safetensors").write_text("weights")
        (partial / "config.json").write_text("config")


MADE = {"model.safetensors", "config.json"}


# --- where an output can appear --------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False], ids=["empty", "dangling"])
def test_a_link_stays_and_what_it_leads_to_is_filled(tmp_path: Path, there: bool) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    if there:
        real.mkdir(parents=True)
    link.symlink_to(real)
    prove_directory(link)
    assert real.exists() == there
    fill(link)
    assert link.is_symlink() and names(real) == MADE and {file.name for file in real.parent.iterdir()} == {"real"}


def test_a_link_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(RunError, match=r"a: it is a link that leads back to itself; choose another --out"):
        prove_directory(tmp_path / "a")


def test_the_current_directory_is_filled_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "half").write_text("of a process that was killed")
    inode = tmp_path.stat().st_ino
    prove_directory(Path("."))
    fill(Path("."))
    assert names(tmp_path) == MADE and tmp_path.stat().st_ino == inode
    with pytest.raises(RunError, match=r"\. exists and is not empty; remove it, or choose another --out"):
        prove_directory(Path("."))


def test_what_a_reader_looks_for_first_is_moved_last_and_a_killed_move_is_ended_by_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    moved: list[str] = []
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == "config.json":
            raise KeyboardInterrupt
        moved.append(self.name)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            fill(Path("."))
    assert moved == ["model.safetensors"] and "config.json" not in names(tmp_path)
    with pytest.raises(RunError, match="exists and is not empty"):
        prove_directory(Path("."))
    assert names(tmp_path) == MADE


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("model", "model is the same as .*/model, which is read: choose another --out"),
        ("model/a/b", "b lies in .*/model, which is read: choose another --out, outside of it"),
        ("s", r"s.partial, which is read, lies where .*/s is filled: choose another --out"),
        ("run", "student, which is read, lies where .*/run is filled"),
    ],
)
def test_no_output_is_made_in_or_over_what_is_read(tmp_path: Path, out: str, message: str) -> None:
    for model in ("model", "s.partial", "run/student"):
        (tmp_path / model).mkdir(parents=True)
    given = {"s": "s.partial", "run": "run/student"}.get(out, "model")
    before = names(tmp_path)
    with pytest.raises(RunError, match=message):
        prove_directory(tmp_path / out, inputs=["me/a-hub-id", None, tmp_path / given], holds=True, writes=["student"])
    assert names(tmp_path) == before


def test_a_file_where_the_output_is_to_be_filled_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("mine")
    for check in (prove_directory, fill):
        with pytest.raises(RunError, match=r"out.partial, under which .*/out is filled, is no directory: remove it"):
            check(tmp_path / "out")
    assert (tmp_path / "out.partial").read_text() == "mine"


def test_two_that_write_the_same_output_do_not_disturb_each_other(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "first").write_text("first")
        with pytest.raises(RunError, match="out is in use by another process; wait for it, or choose another --out"):
            fill(tmp_path / "out")
        assert (partial / "first").exists()
    assert names(tmp_path) == {"out", "out/first"}


def test_work_that_cannot_be_put_in_its_place_is_kept_and_the_error_says_where(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"out: Directory not empty; what was made is whole, and lies in .*/out.partial"),
        atomic_directory(tmp_path / "out") as partial,
    ):
        (partial / "made").write_text("hours of work")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
    assert names(tmp_path) == {"out", "out/mine", "out.partial", "out.partial/made"}


def test_a_proof_leaves_nothing_and_needs_no_parents(tmp_path: Path) -> None:
    prove_directory(tmp_path / "a" / "b" / "c")
    with pytest.raises(ValueError), atomic_directory(tmp_path / "a" / "b" / "c"):
        raise ValueError
    assert names(tmp_path) == set()


def test_a_proof_clears_what_a_killed_one_left_and_not_what_another_process_is_at(tmp_path: Path) -> None:
    left, busy = tmp_path / f"{PROBE}left", tmp_path / f"{PROBE}busy"
    for probe in (left, busy):
        probe.mkdir()
        (probe / "probe").touch()
    handle = os.open(busy, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    prove_directory(tmp_path / "made")
    os.close(handle)
    assert names(tmp_path) == {busy.name, f"{busy.name}/probe"}


def test_a_name_that_is_too_long_is_one_clear_error(tmp_path: Path) -> None:
    for length in (250, 300):
        with pytest.raises(RunError, match=r"cannot write .*/x+: File name too long; choose another --out"):
            prove_directory(tmp_path / ("x" * length))


def test_an_output_that_is_larger_than_the_disk_is_refused_with_both_numbers(tmp_path: Path) -> None:
    require_free_space(tmp_path / "out", 1, tmp_path)
    message = r"out: No space left on device: it takes 1,000,000,000,000,000,000 bytes, and [\d,]+ are free; free"
    with pytest.raises(RunError, match=message):
        require_free_space(tmp_path / "out", 10**18, tmp_path)


def test_an_error_about_another_file_does_not_blame_the_output(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_directory(tmp_path / "out"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "input.jsonl"))


def test_a_copy_that_fails_is_an_error_about_where_it_goes(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"cannot write .*out: No space left"),
        atomic_directory(tmp_path / "out") as made,
    ):
        raise OSError(28, "No space left on device", str(tmp_path / "teacher" / "a"), None, str(made / "a"))


MOUNTED = """
import os, sys
from pathlib import Path
from minitron.core.errors import RunError
from minitron.core.files import atomic_directory, beside, prove_directory, put_directory

def fill(out):
    prove_directory(out)
    with atomic_directory(out) as partial:
        (partial / "config.json").write_text("config")

os.mkdir("tmpfs/lost+found")
fill(Path("tmpfs"))
fill(Path("bound"))  # of the same file system: os.path.ismount does not see it
assert sorted(os.listdir("tmpfs")) == ["config.json", "lost+found"] and os.listdir("bound") == ["config.json"]
work = beside(Path("readonly/writable"), "work")
assert work == Path("readonly/writable/.work")
(work / "student").mkdir(parents=True)
(work / "student" / "config.json").write_text("config")
prove_directory(Path("readonly/writable"))
put_directory(work / "student", Path("readonly/writable"))
assert sorted(os.listdir("readonly/writable")) == [".work", "config.json"]
for out in ("readonly/new", "readonly/deep/new"):
    try:
        prove_directory(Path(out))
    except RunError as error:
        print(error)
"""


def test_mount_points_are_filled_from_inside_and_a_read_only_disk_is_refused(tmp_path: Path) -> None:
    mounts = """
        mkdir tmpfs bound source readonly readonly/writable &&
        mount -t tmpfs tmpfs tmpfs && mount --bind source bound &&
        mount --bind readonly readonly && mount -o remount,ro,bind readonly &&
        mount -t tmpfs tmpfs readonly/writable || exit 77
        exec "$0" -c "$1"
    """
    command = ["unshare", "-rm", "bash", "-c", mounts, sys.executable, MOUNTED]
    try:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("nothing can be mounted here")
    assert done.returncode == 0, done.stderr
    expected = "cannot write readonly/{}: Read-only file system; choose another --out\n"
    assert done.stdout == expected.format("new") + expected.format("deep/new")


def test_what_belongs_to_an_output_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    monkeypatch.chdir(tmp_path)
    assert beside(Path("a/out"), "work") == Path("a/out.work")
    assert beside(Path("link"), "work") == tmp_path / "disk" / "real.work"
    assert beside(Path("."), "work") == Path(".work")
    (tmp_path / "made").mkdir()
    put_directory(tmp_path / "made", tmp_path / "out")
    assert (tmp_path / "out").is_dir()


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_behind_its_link_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "link.html").symlink_to("page.html")
    write_text(tmp_path / "link.html", "né")
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "page.html").read_bytes() == "né".encode()
    write_text(Path("/dev/null"), "gone")
    assert not Path("/dev/null").is_file() and not Path("/dev/null.partial").exists()


def test_a_page_does_not_take_the_place_of_a_file_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: m")
    (tmp_path / "report.html").write_text("old")
    prove_file(tmp_path / "report.html", keeps=[tmp_path])
    prove_file(tmp_path / "new" / "page.html", keeps=[tmp_path])
    with pytest.raises(RunError, match=r"recipe.yaml is a file of .*, which is read: choose another --out"):
        prove_file(tmp_path / "recipe.yaml", keeps=[tmp_path])
    with pytest.raises(RunError, match="is a directory; the output must be a file"):
        prove_file(tmp_path)
    with pytest.raises(RunError, match="is a directory; the output must be a file"), atomic_file(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1', '{"a": "b", "c": [1]}', "[" * 100_000])
def test_a_damaged_cache_of_digests_is_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "digests.json").write_text(text)
    assert read_digests(tmp_path / "digests.json") == {}


# --- the temporary directory -----------------------------------------------------------------------------------------


def test_a_temporary_directory_that_cannot_be_used_is_named_with_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with pytest.raises(RunError, match=r"TMPDIR=.*/gone is no directory"), scratch_directory():
        pass
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with scratch_directory() as path:
        assert path.parent == tmp_path
        message = f"cannot write {tmp_path}: No space .*; this is the temporary directory: .* set TMPDIR to another"
        with pytest.raises(RunError, match=message), scratch_errors():
            raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


# --- paths -----------------------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/half") == f"{tmp_path}/half" and expanded("me/model~2") == "me/model~2"
    assert DataConfig(source="~/text.jsonl", heldout="~/b").heldout == f"{tmp_path}/b"
    parse = build_parser().parse_args
    args = parse(["prune", "~/m", "--data", "~/d", "--plan", "~/p", "--statistics", "~/s", "--out", "~/o"])
    assert [args.model, args.data] == [f"{tmp_path}/m", f"{tmp_path}/d"]
    assert [args.plan, args.statistics, args.out] == [tmp_path / "p", tmp_path / "s", tmp_path / "o"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a path is empty"),
        ("a\0b", "has a NUL character"),
        ("~no_such_user/x", "the home directory that ~no_such_user stands for is not known: write it out"),
    ],
)
def test_what_is_no_path_is_one_line(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MinitronError, match=message):
        expanded(text)
    assert main(["calibrate", "m", "--out", text]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_text_of_the_command_line_is_utf8_whatever_the_locale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words("naïve 日本") == "naïve 日本"
    assert main(["generate", "m", "--prompt", b"\xff".decode(errors="surrogateescape")]) == 1
    assert capsys.readouterr().err == "error: '\\udcff' is not UTF-8 text: give it in UTF-8\n"


# --- streams and the machine -----------------------------------------------------------------------------------------


def test_a_character_that_the_output_does_not_have_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="ascii"))
    console.open_streams()
    console.write_result("± 3")
    assert said.getvalue() == b"? 3\n"


@needs_dev_full
def test_a_result_that_cannot_be_printed_is_an_error_and_a_note_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as out, Path("/dev/full").open("w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        console.complain("a note")
        with pytest.raises(MinitronError, match="cannot write the result to standard output: No space left on device"):
            console.write_result("the result")


def test_a_result_that_nobody_reads_any_more_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        console.write_result("the result")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(5, "Input/output error", "/disk/x"), "error: /disk/x: Input/output error\n"),
        (MemoryError(), "error: not enough memory: free some, or ask for less: a smaller batch or block\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "error: not enough memory (Default"),
        (RuntimeError("can't start new thread"), "error: can't start new thread: raise the limit of processes"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_cannot_do_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "card", replace(COMMANDS["card"], run=fail))
    assert main(["card", "run"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


def test_an_error_of_the_program_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setitem(COMMANDS, "card", replace(COMMANDS["card"], run=fail))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["card", "run"])


def test_the_digests_of_a_run_are_those_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    known: dict[str, object] = {}
    digest = files.digest_files([tmp_path / "a"], known)
    (tmp_path / "digests.json").write_text(json.dumps(known))
    assert read_digests(tmp_path / "digests.json") == known
    assert files.digest_files([tmp_path / "a"], dict(known)) == digest
