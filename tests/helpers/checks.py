"""The type checker that the import hook of tests/conftest.py puts on every function of minitron."""

from typing import Any

from beartype import beartype


def checked(function: Any) -> Any:
    """Check a function's calls, unless it is made inside another: its checker would be built anew at each call of that
    one, which took a third of the time of all tests."""
    return function if "<locals>" in getattr(function, "__qualname__", "") else beartype(function)
