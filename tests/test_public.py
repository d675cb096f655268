"""What `import minitron` offers."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

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


CONSUMER = Path(__file__).parent / "helpers" / "consumer.py"
# Types of other packages are taken as they come: to read all of torch would take a minute.
STRICT = """[mypy]
strict = True
[mypy-torch.*,transformers.*,numpy.*,safetensors.*,pydantic.*,huggingface_hub.*,tokenizers.*,rich.*,yaml.*]
follow_imports = skip
ignore_missing_imports = True
"""


def test_the_consumer_uses_every_function_and_constant() -> None:
    used = set(re.findall(r"\bminitron\.(\w+)", CONSUMER.read_text()))
    types = {name for name in minitron.__all__ if isinstance(getattr(minitron, name), type)}
    assert set(minitron.__all__) - used <= types


@pytest.mark.slow
def test_a_strict_type_checker_accepts_the_consumer_of_an_installed_package(tmp_path: Path) -> None:
    """The package lies in site-packages as a wheel puts it there, and py.typed gives its types."""
    venv.create(tmp_path / "venv")
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    shutil.copytree(INIT.parent, packages / "minitron", ignore=shutil.ignore_patterns("__pycache__"))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "mypy.ini").write_text(STRICT)
    shutil.copy(CONSUMER, tmp_path / "consumer.py")

    def checked() -> subprocess.CompletedProcess[str]:
        python = tmp_path / "venv" / "bin" / "python"
        words = [
            sys.executable,
            "-m",
            "mypy",
            "--python-executable",
            python,
            "--config-file",
            "mypy.ini",
            "consumer.py",
        ]
        environment = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)

    ended = checked()
    assert ended.returncode == 0, ended.stdout
    wrong = CONSUMER.read_text().replace("new_tokens=10", 'new_tokens="ten"')
    (tmp_path / "consumer.py").write_text(wrong)
    assert 'Argument "new_tokens" to "generate" has incompatible type "str"' in checked().stdout
