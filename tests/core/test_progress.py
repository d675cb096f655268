"""The speed and the remaining time that are shown: those of the recent reports, whatever came before."""

import pytest

from minitron.core.progress import RECENT_REPORTS, RECENT_SECONDS, Pace


def paced(*steps: float) -> Pace:
    """A pace after steps of so many seconds each."""
    pace, now = Pace(), 0.0
    for done, seconds in enumerate(steps, start=1):
        now += seconds
        pace.report(done, now)
    return pace


def test_a_slow_first_step_does_not_count() -> None:
    pace = paced(90.0, 2.0, 2.0)
    assert pace.per_second == 0.5
    assert pace.seconds_left(103) == 200.0


def test_nothing_is_said_before_two_steps() -> None:
    assert Pace().seconds_left(10) is None
    assert paced(90.0).per_second is None


def test_a_machine_that_has_become_slower_is_noticed() -> None:
    pace = paced(*[1.0] * 1000, *[10.0] * 40)
    assert pace.per_second == pytest.approx(0.1)
    assert pace.seconds_left(1040 + 6) == pytest.approx(60.0)


def test_the_speed_of_long_steps_is_that_of_several() -> None:
    pace = paced(*[300.0] * 20, 400.0)
    others = RECENT_REPORTS - 1
    assert RECENT_SECONDS < 300 and pace.per_second == pytest.approx(others / (300 * (others - 1) + 400))


def test_work_that_begins_anew_has_a_speed_of_its_own() -> None:
    pace = paced(1.0, 1.0, 1.0)
    pace.report(1, 50.0)
    assert pace.per_second is None
    pace.report(2, 60.0)
    assert pace.seconds_left(3) == 10.0


def test_work_that_is_done_leaves_no_time() -> None:
    assert paced(1.0, 1.0).seconds_left(2) == 0.0
