"""Shapes and types in signatures are checked while tests run; tiny models are made once and only read."""

import os

# One thread: tiny products gain nothing from more, and two pytest workers do not fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook

install_import_hook("minitron", "beartype.beartype")

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session", params=tiny.VARIANTS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of each variant, to read and never to change."""
    return tiny.checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model directory for laws that do not depend on the family."""
    return tiny.checkpoint("llama", tmp_path_factory.mktemp("llama"))
