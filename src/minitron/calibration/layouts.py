"""The types of statistics.json and of the record of a calibration, checked when they are read."""

from pydantic import TypeAdapter

from minitron.core.layouts import Count, Layout, Positive
from minitron.core.typed_files import FileKind


class StatisticsFacts(Layout):
    """statistics/statistics.json."""

    samples: Positive
    tokens: Positive
    model: str = ""


class Calibrated(Layout):
    """The result of the stage statistics."""

    samples: Count
    tokens: Count


STATISTICS = FileKind("the description of statistics", TypeAdapter(StatisticsFacts))
STATISTICS_RESULT = FileKind("that of the stage statistics", TypeAdapter(Calibrated))
