"""Numbers as people read them: one wording for the report, the card and the terminal.

Memory and file sizes are decimal: 1 MB is 10^6 bytes. A value that was not measured is a dash.
"""

import math
from collections.abc import Callable, Iterable, Sequence

Number = int | float

MISSING = "–"  # noqa: RUF001 (an en dash)


def either(names: Iterable[str]) -> str:
    """Join names as in `a, b or c`."""
    return _listed(names, "or")


def both(names: Iterable[str]) -> str:
    """Join names as in `a, b and c`."""
    return _listed(names, "and")


def _listed(names: Iterable[str], word: str) -> str:
    *others, last = names
    return f"{', '.join(others)} {word} {last}" if others else last


def count(number: Number) -> str:
    return f"{number:,.0f}"


def short_count(number: Number) -> str:
    """A number with three digits and a unit: 1.11M, 4.51B."""
    return _scaled(number, 1000, ("", "K", "M", "B", "T"))


def size(num_bytes: Number) -> str:
    return _scaled(num_bytes, 1000, (" bytes", " kB", " MB", " GB", " TB"))


def flops(operations: Number) -> str:
    return _scaled(operations, 1000, tuple(f" {prefix}FLOP" for prefix in ("", "k", "M", "G", "T", "P", "E", "Z")))


def share(fraction: Number) -> str:
    """A whole percentage, with more digits where a rounded 0% or 100% would be wrong."""
    return f"{fraction:.0%}" if 0.01 <= fraction <= 0.99 or fraction in (0, 1) else f"{fraction:.2%}"


def percent(fraction: Number) -> str:
    return f"{fraction:.1%}"


def nats(value: Number) -> str:
    return f"{value:.3f}"


def perplexity(value: Number) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def ratio(value: Number) -> str:
    return f"{value:.2f} ×"  # noqa: RUF001


def milliseconds(seconds: Number) -> str:
    return f"{1000 * seconds:,.3g} ms" if seconds < 1 else duration(seconds)


def duration(seconds: Number) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 72:
        return f"{hours / 24:,.0f} days"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def shown(value: Number | None, form: Callable[[Number], str]) -> str:
    return form(value) if value is not None and math.isfinite(value) else MISSING


def rate(per_second: Number) -> str:
    """A rate with three digits, or with all digits before the point if these are more."""
    return count(per_second) if per_second >= 100 else f"{per_second:.3g}"


def with_range(middle: Number, ends: Sequence[Number], form: Callable[[Number], str]) -> str:
    low, high = ends
    return shown(middle, lambda value: f"{form(value)} ({form(low)}–{form(high)})")  # noqa: RUF001


def _scaled(number: Number, step: int, units: tuple[str, ...]) -> str:
    for unit in units:
        if abs(number) < step * (1 - 0.0005) or unit == units[-1]:
            break
        number /= step
    digits = 0 if unit == units[0] else 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:,.{digits}f}{unit}"
