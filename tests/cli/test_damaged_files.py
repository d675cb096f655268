"""Damaged files of every kind that minitron reads: each is refused in one line that names it, or harmless.

A few inputs of each kind, always the same ones; benchmarks/bad_input.py draws thousands.
"""

from collections.abc import Iterator

import pytest
from bad_input import Room
from bad_targets import TARGETS
from hypothesis import HealthCheck, given, settings
from mutations import Mutation

EXAMPLES = 2  # the simplest, and one that is drawn
# Files of a run, whose making takes half a minute, are in core/test_typed_files.py.
NAMES = ("config.json: inspect", "plan.json, whole", "statistics.safetensors: search", "rows of winogrande")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    room = Room(tmp_path_factory.mktemp("room"), [TARGETS[name] for name in NAMES])
    yield room
    room.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_one_line_that_names_it_or_harmless(room: Room, name: str) -> None:
    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(room.inputs(TARGETS[name]))
    def holds(mutation: Mutation) -> None:
        outcome = room.outcome(TARGETS[name], mutation)
        assert not outcome.violations, (mutation.how, outcome.violations, outcome.ended)

    holds()
