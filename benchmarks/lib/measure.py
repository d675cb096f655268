"""What the benchmarks share: peak memory of a block of code, a fresh process per variant, and a result's header."""

import ctypes
import gc
import json
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.002
SOURCE = Path(__file__).parents[2] / "src"


@dataclass
class Peak:
    """Bytes beyond what the process held when the measurement began, but for `process`."""

    process: int = 0  # sampled: all anonymous memory of the process, its imports included
    anonymous: int = 0  # sampled: memory that only swap could take away
    mapped: int = 0  # sampled: resident pages of mapped files, which the system takes back when it likes
    total: int = 0  # resident memory of any kind, from the kernel's own high-water mark


class PeakMemory:
    """Context manager: `peak` is what the block held at most, beyond what was held at its start."""

    def __enter__(self) -> "PeakMemory":
        self.restart()
        self._start = _status()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def restart(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.peak = Peak()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._note()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._note()

    def _note(self) -> None:
        now, start = _status(), self._start
        self.peak.process = max(self.peak.process, now["RssAnon"])
        self.peak.anonymous = max(self.peak.anonymous, now["RssAnon"] - start["RssAnon"])
        self.peak.mapped = max(self.peak.mapped, now["RssFile"] - start["RssFile"])
        self.peak.total = max(self.peak.total, now["VmHWM"] - start["VmRSS"])


def _status() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if len(words) == 3 and words[2] == "kB"}


def in_fresh_process(script: str, **arguments: Any) -> dict[str, Any]:
    """Run `script --child ARGUMENTS` and return the JSON of its last output line."""
    command = [sys.executable, script, "--child", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def save_byte_tokenizer(path: Path) -> None:
    """A tokenizer for random models, whose tokens are bytes and, since llama.cpp wants a merge, two spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "Ġ"
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>", space + space]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[(space, space)]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(path)


def header(title: str) -> str:
    """Markdown: what was run, where and with what."""
    from minitron.core.machine import hardware, versions

    machine = hardware()
    facts = {
        "Command": f"`python {shlex.join(sys.argv)}`",
        "Commit": _commit(),
        "Date": date.today().isoformat(),
        "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "Hardware": f"{machine['device']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB memory, "
        f"{machine['threads']} threads",
    }
    return "\n".join([f"# {title}", "", *(f"- {name}: {fact}" for name, fact in facts.items()), ""])


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: the first column to the left, the others, which are numbers, to the right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *rows])


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Agreeing pairs minus disagreeing ones, as a share of all (tau-a)."""
    pairs = list(combinations(range(len(one)), 2))
    signs = [(one[i] - one[j]) * (other[i] - other[j]) for i, j in pairs]
    return sum((sign > 0) - (sign < 0) for sign in signs) / max(1, len(pairs))


def publish(text: str, out: Path | None) -> None:
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


def _commit() -> str:
    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=SOURCE, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    # Not the benchmarks: a result file that is being written would make every commit look changed.
    changed = git("status", "--porcelain", "--", ".")
    return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes in src" if changed else "")
