"""Does a training that was stopped, killed, or robbed of its disk or its files end with the bits of an undisturbed one?

    python benchmarks/resume.py [--points 20] [--out benchmarks/results/resume_....md]

`minitron distill` of a cut of the demo teacher, in a process of its own each time: once undisturbed; then stopped by
SIGTERM or killed by SIGKILL at moments drawn at random from its training, loading included, and run again; then with
states that are damaged between the two, and on a disk that is full at the second state.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from measure import header, publish, table

from minitron.data import builtin_documents
from minitron.demo import HERE

TEACHER = HERE / "demo-teacher"
DOCUMENTS, BLOCK_TOKENS, TOKENS = 40, 64, 20_000
SMALL_DISK, LARGE_DISK = "60m", "400m"  # one state of 42 MB fits on the first, two do not
COLUMNS = ["interruption", "exit code", "steps logged", "newest state", "said when run again", "weights", "metrics"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write the result to this Markdown file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minitron-bench-") as directory:
        bench = Bench(Path(directory))
        rows = [bench.interrupted(number) for number in range(args.points)]
        rows += [bench.damaged(name) for name in DAMAGES]
        rows += bench.on_a_full_disk()
        publish(report(bench, rows), args.out)


def truncate(state: Path) -> None:
    file = state / "optimizer.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip(state: Path) -> None:
    data = bytearray((state / "student.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (state / "student.safetensors").write_bytes(data)


# What is done to the older and to the newer of two states.
DAMAGES: dict[str, list[Callable[[Path], None] | None]] = {
    "newer state truncated": [None, truncate],
    "one bit of the newer state flipped": [None, flip],
    "both states damaged": [flip, truncate],
}


@dataclass
class Bench:
    work: Path
    full_disk_said: str = ""

    def __post_init__(self) -> None:
        rows = [json.dumps({"text": document.text}) for document in islice(builtin_documents(), DOCUMENTS)]
        (self.work / "text.jsonl").write_text("\n".join(rows))
        cut = ("--shape", "ffn=352", "--layers", "keep=0,1,5", "--criterion", "magnitude", "--repair", "none")
        self.finish("prune", str(TEACHER), *cut, "--out", str(self.work / "student"))
        self.finish(*self.distill("undisturbed"))
        self.expected = self.made("undisturbed")
        record = json.loads((self.work / "undisturbed" / "record.json").read_text())
        self.seconds, self.steps = record["seconds"], record["result"]["training"]["steps"]

    def distill(self, name: str) -> list[str]:
        models = ["--teacher", str(TEACHER), "--student", str(self.work / "student")]
        data = ["--data", str(self.work / "text.jsonl"), "--block-tokens", str(BLOCK_TOKENS), "--tokens", str(TOKENS)]
        return ["distill", *models, *data, "--out", str(self.work / name)]

    def start(self, *command: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-m", "minitron", *command, "--quiet"], text=True, **pipes)

    def finish(self, *command: str) -> list[str]:
        """What a command warns of."""
        process = self.start(*command)
        _, said = process.communicate()
        assert process.returncode == 0, said
        return [line for line in said.splitlines() if line.startswith("warning: ")]

    def made(self, name: str) -> dict[str, str]:
        files = {"weights": "model.safetensors", "metrics": "metrics.jsonl"}
        return {
            what: hashlib.sha256((self.work / name / file).read_bytes()).hexdigest() for what, file in files.items()
        }

    def interrupted(self, number: int) -> list[str]:
        kind, draw = (signal.SIGTERM, signal.SIGKILL)[number % 2], random.Random(number)
        name = f"point-{number}"
        process = self.start(*self.distill(name))
        step = draw.randrange(self.steps)
        wait_for(process, lambda: (self.state(name) / "inputs.json").exists() and self.logged(name) >= step)
        time.sleep(draw.random() * self.seconds / self.steps)
        process.send_signal(kind)
        process.communicate()
        return self.resumed(name, f"{kind.name} after {step} steps or more", process.returncode)

    def damaged(self, damage: str) -> list[str]:
        process = self.start(*self.distill(damage))
        wait_for(process, lambda: len(self.states(damage)) == 2)
        process.kill()
        process.communicate()
        for act, state in zip(DAMAGES[damage], self.states(damage), strict=True):
            if act is not None:
                act(state)
        return self.resumed(damage, damage, process.returncode)

    def on_a_full_disk(self) -> list[list[str]]:
        """No row where a disk of a given size cannot be made."""
        with small_disk(self.work / "disk") as disk:
            if disk is None:
                return []
            process = self.start(*self.distill("disk/out"))
            _, said = process.communicate()
            subprocess.run(["mount", "-o", f"remount,size={LARGE_DISK}", disk], check=True)
            self.full_disk_said = self.plain(said.strip())
            return [self.resumed("disk/out", "the disk is full at the second state", process.returncode)]

    def resumed(self, name: str, interruption: str, code: int) -> list[str]:
        """Run again what was interrupted, and compare."""
        print(interruption, file=sys.stderr, flush=True)
        if (self.work / name).exists():
            return [f"{interruption}, but was done before", str(code), "", "", "", *self.compared(name)]
        logged = self.logged(name)
        newest = max((json.loads((path / "state.json").read_text())["step"] for path in self.states(name)), default=0)
        said = [self.plain(line.removeprefix("warning: ")) for line in self.finish(*self.distill(name))]
        return [interruption, str(code), str(logged), str(newest), "; ".join(said), *self.compared(name)]

    def compared(self, name: str) -> list[str]:
        made = self.made(name)
        return ["the same" if made[what] == self.expected[what] else "DIFFERENT" for what in ("weights", "metrics")]

    def state(self, name: str) -> Path:
        return self.work / f"{name}.work" / "distill"

    def logged(self, name: str) -> int:
        metrics = self.state(name) / "metrics.jsonl"
        return metrics.read_text().count('"loss"') if metrics.exists() else 0

    def states(self, name: str) -> list[Path]:
        return sorted(path for path in self.state(name).glob("state-*") if path.suffix != ".partial")

    def plain(self, text: str) -> str:
        """Without what differs from run to run."""
        return text.replace(str(self.work), "...")


def wait_for(process: subprocess.Popen[str], seen: Callable[[], bool]) -> None:
    while process.poll() is None and not seen():
        time.sleep(0.002)


@contextmanager
def small_disk(path: Path) -> Iterator[Path | None]:
    path.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", path]
    if os.geteuid() != 0 or subprocess.run(made, capture_output=True).returncode != 0:
        yield None
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def report(bench: Bench, rows: list[list[str]]) -> str:
    same = sum(row[-2:] == ["the same", "the same"] for row in rows)
    full_disk = ["", f"The full disk was reported as: `{bench.full_disk_said}`"] if bench.full_disk_said else []
    return "\n".join(
        [
            header("Interrupted trainings against an undisturbed one"),
            f"`minitron distill` of the demo teacher, cut to 3 of 6 layers and half of their neurons, on {TOKENS:,} "
            f"tokens in {bench.steps} steps with a state every {max(1, bench.steps // 10)}; undisturbed it took "
            f"{bench.seconds:.0f} s. Each row is a training that ended as the row says, and was then run again with "
            "the same command. Weights and metrics are compared with the undisturbed ones by sha256.",
            "",
            table(COLUMNS, rows),
            *full_disk,
            "",
            f"{same} of {len(rows)} trainings ended with the weights and the metrics of the undisturbed one.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
