"""What the watchdog refuses; what it does in a job stands in test_parallel."""

import pytest

from minitron.core.errors import RunError
from minitron.core.watchdog import Watchdog


class Empty:
    def set(self, key: str, value: str) -> None:
        raise AssertionError

    def multi_get(self, keys: list[str]) -> list[bytes]:
        raise AssertionError


@pytest.mark.parametrize("seconds", ["", "ten", "0", "-1", "inf", "nan"])
def test_a_time_out_that_is_no_number_of_seconds_is_refused(seconds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_TIMEOUT", seconds)
    with pytest.raises(RunError, match=f"MINITRON_TIMEOUT is '{seconds}'; it must be a number of seconds above 0"):
        Watchdog(Empty(), 0, 2)
