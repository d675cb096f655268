"""A step that takes more memory than there is goes on with half of the blocks at once, or ends with its state saved."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

# A training of the demo teacher by itself, whose process gets only so much memory beyond what it has after its first
# step: a share of the way from what a step takes with half of its blocks at once to what it takes with all.
JOB = """
import ctypes
import gc
import json
import resource
import sys
from pathlib import Path
import torch
from minitron.data.config import DataConfig
from minitron.data.corpus import open_corpus
from minitron.data.writing import prepare
from minitron.distillation.config import DistillConfig
from minitron.distillation.memory import step_memory
from minitron.distillation.schedule import ModelSize, Schedule, resolve
from minitron.distillation.teachers import TeacherSource
from minitron.distillation.train import Training, distill
from minitron.model.checkpoint import open_checkpoint
from minitron.model.tokenizer import load_tokenizer
from minitron.recipe import DEMO_TEACHER

BLOCK, AT_ONCE = 128, 8
libc = ctypes.CDLL("libc.so.6")
libc.mallopt(-3, 1 << 16)  # blocks are mapped one by one, and given back at once
libc.mallopt(-1, 1 << 16)
torch.set_num_threads(1)
model, here = open_checkpoint(DEMO_TEACHER), Path(sys.argv[1])
share = float(sys.argv[2])
(here / "data").mkdir(parents=True)
(here / "text.txt").write_text("\\n\\n".join(f"def number_{i}(x):\\n    return x + {i}" for i in range(4000)))
data = DataConfig(source=str(here / "text.txt"), block_tokens=BLOCK)
prepare(data, load_tokenizer(model.path), vocab=model.shape.vocab, block_tokens=BLOCK, out=here / "data")

def schedule(at_once):
    size, settings = ModelSize(model.shape, model.weights_rms), {"micro_batch_tokens": at_once * BLOCK}
    settings |= {"tokens": 4 * 8 * BLOCK, "batch_blocks": 8, "optimizer": "adamw", "compile": False}
    settings |= {"evaluate_blocks": 1, "precision": "float32"}
    config = resolve(DistillConfig(**settings), size, size, block_tokens=BLOCK, train_tokens=1)
    return Schedule.of_student(config, BLOCK, 0)

def takes(at_once):
    return step_memory(model, model, schedule(at_once), torch.float32, "cpu").working

half, whole = takes(AT_ONCE // 2), takes(AT_ONCE)
room = int(half + share * (whole - half)) if share > 0 else 4 << 20

class Listener:
    warned = []
    def stage(self, name, state):
        pass
    def warn(self, text):
        self.warned.append(text)
    def progress(self, done, total, note=""):
        if done == 1:
            gc.collect()
            libc.malloc_trim(0)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))

(here / "out").mkdir()
source, ended = TeacherSource(model.path), "well"
training = Training(model.path, source, open_corpus(here / "data"), schedule(AT_ONCE), here / "work", Listener())
try:
    distill(training, here / "out")
except Exception as error:
    ended = f"{type(error).__name__}: {error}"
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
states = sorted(path.name for path in (here / "work").glob("state-*"))
print(json.dumps({"ended": ended, "warned": Listener.warned, "states": states}))
"""


@pytest.mark.parametrize(("share", "ends_well"), [(0.3, True), (0.0, False)])
def test_a_step_that_finds_no_memory_takes_fewer_blocks_at_once(share: float, ends_well: bool, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    # Not a fork of a process that has imported all: what that one keeps in reserve would be room too.
    command = [sys.executable, "job.py", str(tmp_path / "at"), str(share)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    if ends_well:
        assert re.match(r"step \d with 8 blocks at once takes more memory than there is \(", found["warned"][0])
        assert found["warned"][0].endswith("): from here on half as many, and the batch stays")
        assert found["ended"] == "well" and len(found["warned"]) <= 2
        rows = [json.loads(line) for line in (tmp_path / "at" / "work" / "metrics.jsonl").read_text().splitlines()]
        assert [row["tokens"] for row in rows if "loss" in row] == [step * 8 * 128 for step in (1, 2, 3, 4)]
    else:
        # With a single block at once, or where the optimizer moves the weights.
        said = r"RunError: (step \d with 1 block at once|the training) takes more memory than there is \(.*allocate"
        assert re.match(said, found["ended"])
        assert "the same command goes on where there is more memory" in found["ended"]
        assert found["states"]
