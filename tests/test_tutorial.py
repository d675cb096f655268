"""The tutorial runs from its first block to its last, and the notebook is the tutorial."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
SETTINGS, SMALL = re.compile(r"^SAMPLES, TOKENS, BLOCKS = .*$", re.MULTILINE), "SAMPLES, TOKENS, BLOCKS = 8, 1_200, 2"
# A part of the files that `builtin` reads, for each step reads its text again.
SOURCES = sorted(Path(os.__file__).with_name("email").glob("*.py"))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs" / "notebook.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_is_the_tutorial(maker: ModuleType) -> None:
    made = json.loads((ROOT / "examples" / "demo.ipynb").read_text())
    assert made == maker.notebook(TUTORIAL), "python docs/notebook.py > examples/demo.ipynb"
    cells = ["".join(cell["source"]) + "\n" for cell in made["cells"] if cell["cell_type"] == "code"]
    assert cells == maker.code_blocks(TUTORIAL)
    for cell in made["cells"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", "".join(cell["source"])):
            assert (ROOT / "examples" / target).exists(), target


@pytest.mark.slow
def test_every_block_of_code_runs(maker: ModuleType, tmp_path: Path) -> None:
    blocks = maker.code_blocks(TUTORIAL)
    code, changed = SETTINGS.subn(SMALL, "\n".join(blocks))
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": file.read_text()}) for file in SOURCES))
    for said, smaller in (("rounds=3", "rounds=1"), ('source="builtin"', f"source={str(text)!r}")):
        assert changed == 1 and said in code
        code = code.replace(said, smaller)
    # As a notebook has it, `__main__` has no file: processes that are started do not run it again.
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "llama layers=6 hidden=256" in said
    assert "8 blocks, 1024 tokens" in said and "ffn 704 -> " in said
    assert [line.split()[0] for line in said.splitlines() if " KL " in line and "top-1" in line] == [
        "teacher", "pruned", "student",
    ]  # fmt: skip
    assert re.search(r"^Q8_0 .* KL to the student 0\.\d+$", said, re.MULTILINE)
    assert re.search(r"^ratio: \d+\.\d+ and \d+\.\d+$", said, re.MULTILINE)
