"""The types of plan files and scores.json, checked when they are read."""

from pydantic import Field, TypeAdapter, model_validator

from minitron.core.layouts import Finite, Layout, Unbounded
from minitron.core.typed_files import FileKind


class PlanSizes(Layout, extra="forbid"):
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


class ListedUnits(Layout):
    """A plan file that lists the units of some dims only, which `load_given` reads."""

    layers: list[int] = Field(default=[])
    hidden: list[int] = Field(default=[])
    ffn: list[list[int]] = Field(default=[])
    heads: list[list[int]] = Field(default=[])
    kv_heads: list[list[int]] = Field(default=[])


class PlanFile(Layout):
    """plan/plan.json and pruned/plan.json; `Plan.load` checks that its lists fit its sizes."""

    teacher: PlanSizes
    student: PlanSizes
    layers: list[int]
    hidden: list[int]
    ffn: list[list[int]]
    heads: list[list[int]]
    kv_heads: list[list[int]]


class MadePlan(PlanFile):
    """A plan file whose lists fit its sizes."""

    @model_validator(mode="after")
    def of_its_sizes(self) -> "MadePlan":
        teacher, student = vars(self.teacher), vars(self.student)
        for dim in ("ffn", "heads", "kv_heads"):
            if len(getattr(self, dim)) != self.student.layers:
                raise ValueError(f"{dim} has not a list for each of {self.student.layers} layers")
        for dim in ("layers", "hidden", "ffn", "heads", "kv_heads"):
            for units in [getattr(self, dim)] if dim in ("layers", "hidden") else getattr(self, dim):
                fits = bool(units) and len(units) == student[dim] and 0 <= units[0] <= units[-1] < teacher[dim]
                if not fits or units != sorted(set(units)):
                    raise ValueError(
                        f"{dim} must list {student[dim]} different indices below {teacher[dim]}, in ascending order"
                    )
        return self


class UnitScores(Layout):
    """scores/scores.json."""

    layers: list[Unbounded]
    hidden: list[Finite]
    ffn: list[list[Finite]]
    heads: list[list[Finite]]
    kv_heads: list[list[Finite]]


PLAN = FileKind("a plan file", TypeAdapter(PlanFile))
MADE_PLAN = FileKind("a plan file", TypeAdapter(MadePlan))
LISTED_UNITS = FileKind("a plan file", TypeAdapter(ListedUnits))
SCORES = FileKind("scores of units", TypeAdapter(UnitScores))
