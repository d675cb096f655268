"""What `import minitron` offers."""

import ast
import subprocess
import sys
from pathlib import Path

import minitron

VERBS = (
    "inspect",
    "calibrate",
    "search",
    "prune",
    "distill",
    "evaluate",
    "generate",
    "quantize",
    "measure_speed",
    "run",
)
INIT = Path(minitron.__file__)


def test_the_verbs_are_functions_and_every_public_name_is_there() -> None:
    assert all(callable(getattr(minitron, verb)) for verb in VERBS)
    assert set(VERBS) < set(minitron.__all__)
    for name in set(minitron.__all__) - {"FAMILIES", "DEMO_TEACHER"}:
        assert getattr(minitron, name).__module__.startswith("minitron.")


def test_type_checkers_see_the_names_that_are_there() -> None:
    (block,) = (node for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == minitron._MODULES
    assert (INIT.parent / "py.typed").exists()


def test_the_package_alone_does_not_wait_for_torch() -> None:
    ended = subprocess.run([sys.executable, "-c", "import minitron, sys; sys.exit('torch' in sys.modules)"])
    assert ended.returncode == 0
