"""Shapes and types in signatures are checked while tests run; tiny models are made once and only read."""

import os

# ruff: noqa: E402  (the hook comes before the first import of minitron)
# One thread: tiny products gain nothing from more, and two pytest workers do not fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

from jaxtyping import install_import_hook

SOURCE = Path(__file__).parents[1] / "src"
# Not the table: the search for a shape counts thousands of candidates, and checks would take most of the tests' time.
UNCHECKED = {"minitron.model.architecture"}
MODULES = {".".join(file.relative_to(SOURCE).with_suffix("").parts) for file in SOURCE.rglob("*.py")}
install_import_hook(sorted(m for m in MODULES - UNCHECKED if not m.endswith("__init__")), "checks.checked")

import pytest
import tiny

# The files that took longest in a whole run, from 70 to 14 seconds: they begin first, so that two workers end at about
# the same time.
LONGEST = (
    *(
        "test_run",
        "test_parallel",
        "test_options",
        "test_commands",
        "test_train",
        "test_quantize",
        "test_interruptions",
    ),
    *("test_tutorial", "test_damaged_files", "test_repair", "test_pruned_is_masked", "test_correction", "test_speed"),
    *("test_tasks", "test_page"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", params=tiny.VARIANTS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of each variant, to read and never to change."""
    return tiny.checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model directory for laws that do not depend on the family."""
    return tiny.checkpoint("llama", tmp_path_factory.mktemp("llama"))
