"""A plan keeps the best units that fit the target, and a plan that contradicts itself is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from teachers import REAL, TEACHER

from minitron.core.errors import PlanError
from minitron.model.architecture import PRUNABLE
from minitron.model.families import FAMILIES
from minitron.pruning.config import PruneConfig
from minitron.pruning.given import Given, given_layers
from minitron.pruning.importance import Scores
from minitron.pruning.plan import Plan, choose, compose, load_given, needs_scores, require_consistent
from minitron.pruning.target import given_shape, is_given, parse_target, require_cuttable, step_shapes
from minitron.shapes.space import SearchConfig, feasible

STUDENTS = [
    {},
    {"layers": 1},
    {"hidden": 7, "ffn": 11},
    {"heads": 4},
    {"kv_heads": 2, "heads": 4},
    {"kv_heads": 1, "heads": 1},
    {"layers": 2, "hidden": 16, "ffn": 1, "heads": 3, "kv_heads": 3},
]


def random_scores(seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"ffn": TEACHER.ffn, "heads": TEACHER.heads, "kv_heads": TEACHER.kv_heads}
    per_layer = {dim: torch.randn(TEACHER.layers, size, generator=generator).double() for dim, size in sizes.items()}
    rows = {dim: torch.randn(getattr(TEACHER, dim), generator=generator).double() for dim in ("layers", "hidden")}
    return Scores(**rows, **per_layer)


# --- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", STUDENTS, ids=str)
def test_no_dropped_unit_scores_higher_than_a_kept_one(sizes: dict[str, int]) -> None:
    scores, student = random_scores(), replace(TEACHER, **sizes)
    plan = choose(scores, TEACHER, student)
    require_consistent(plan)

    def best(kept: tuple[int, ...], row: torch.Tensor, among: range) -> bool:
        dropped = [row[unit] for unit in among if unit not in kept]
        return not dropped or max(dropped) <= min(row[unit] for unit in kept if unit in among)

    assert best(plan.layers, scores.layers, range(TEACHER.layers))
    assert best(plan.hidden, scores.hidden, range(TEACHER.hidden))
    for index, layer in enumerate(plan.layers):
        assert best(plan.ffn[index], scores.ffn[layer], range(TEACHER.ffn))
        assert best(plan.kv_heads[index], scores.kv_heads[layer], range(TEACHER.kv_heads))
        for kv_head in plan.kv_heads[index]:
            group = range(kv_head * TEACHER.group, (kv_head + 1) * TEACHER.group)
            assert best(plan.heads[index], scores.heads[layer], group)
            assert len(set(group) & set(plan.heads[index])) == student.group


def test_ties_go_to_the_lower_index() -> None:
    even = Scores(
        **{dim: torch.zeros(size).double() for dim, size in (("layers", 4), ("hidden", 32))},
        **{dim: torch.zeros(4, size).double() for dim, size in (("ffn", 40), ("heads", 8), ("kv_heads", 4))},
    )
    plan = choose(even, TEACHER, replace(TEACHER, layers=2, ffn=3, kv_heads=2, heads=2))
    assert (plan.layers, plan.ffn, plan.kv_heads, plan.heads) == (
        (0, 1),
        ((0, 1, 2),) * 2,
        ((0, 1),) * 2,
        ((0, 2),) * 2,
    )


def test_the_students_own_shape_is_the_identity() -> None:
    assert choose(random_scores(), TEACHER, TEACHER) == tiny.identity_plan(TEACHER)
    assert str(tiny.identity_plan(TEACHER)) == "identity"
    assert str(choose(random_scores(), TEACHER, replace(TEACHER, ffn=3, layers=2))) == "layers 4 -> 2, ffn 40 -> 3"


UNREACHABLE: dict[str, tuple[dict[str, int], str]] = {
    "larger": ({"ffn": 41}, "target ffn=41 is larger than the teacher's ffn=40; pruning only removes units: lower ffn"),
    "head_dim": ({"head_dim": 2}, "head_dim cannot change: the teacher has 4, keep it"),
    "vocab": ({"vocab": 300}, "vocab cannot change: the teacher has 320"),
    "group": ({"kv_heads": 2, "heads": 8}, "heads=8 with kv_heads=2 cannot be cut from heads=8 with kv_heads=4"),
    "no multiple": ({"heads": 6}, "heads=6 with kv_heads=4 cannot be cut"),
    "nothing left": ({"kv_heads": 0}, "kv_heads=0.* must be positive"),
    "negative": ({"hidden": -8}, "hidden=-8.* must be positive"),
}


@pytest.mark.parametrize(("sizes", "message"), UNREACHABLE.values(), ids=UNREACHABLE)
def test_a_student_that_cannot_be_cut_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        choose(random_scores(), TEACHER, replace(TEACHER, **sizes))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", STUDENTS, ids=str)
def test_a_plan_reads_back_as_it_was_saved(tmp_path: Path, sizes: dict[str, int]) -> None:
    plan = tiny.plan(TEACHER, **sizes)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


INCONSISTENT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "missing part": (lambda raw: raw.pop("hidden"), "plan.json is not a plan file: hidden is missing"),
    "unknown size": (lambda raw: raw["student"].update(width=3), "is not a plan file: .*width"),
    "texts for units": (lambda raw: raw.update(hidden=[chr(65 + i) for i in range(24)]), "is not a plan file"),
    "no kv heads": (lambda raw: raw["student"].update(kv_heads=0), "kv_heads=0"),
    "too few layers": (
        lambda raw: raw["layers"].pop(),
        "layers must list 3 different indices below 4, in ascending order",
    ),
    "layer twice": (lambda raw: raw.update(layers=[0, 1, 1]), "layers must list 3 different"),
    "descending": (lambda raw: raw["hidden"].reverse(), "hidden must list 24 different indices below 32, in ascending"),
    "out of range": (lambda raw: raw["ffn"][1].__setitem__(-1, 40), "ffn must list 20 different indices below 40"),
    "negative": (lambda raw: raw["hidden"].__setitem__(0, -1), "hidden must list 24"),
    "list too few": (lambda raw: raw["heads"].pop(), "heads has 2 lists for 3 layers"),
    "foreign heads": (
        lambda raw: raw.update(heads=[[0, 1]] * 3, kv_heads=[[0, 1]] * 3),
        "each kept kv head must keep the same number of its own query heads",
    ),
    "larger": (lambda raw: raw["student"].update(ffn=41), "target ffn=41 is larger"),
}


@pytest.mark.parametrize(("change", "message"), INCONSISTENT.values(), ids=INCONSISTENT)
def test_a_plan_that_contradicts_itself_is_refused(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    path = tmp_path / "plan.json"
    tiny.plan(TEACHER, layers=3, hidden=24, ffn=20, kv_heads=2, heads=2).save(path)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


@pytest.mark.parametrize("content", ["", "[]", "7", "{}", "plan"])
def test_a_file_that_is_no_plan_says_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(PlanError, match=r"plan.json is not (a plan file|JSON)"):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nothing.json does not exist"):
        Plan.load(tmp_path / "nothing.json")


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50%", ("non_embedding", 0.5)),
        ("100 %", ("non_embedding", 1.0)),
        ("12.5%", ("non_embedding", 0.125)),
        ("4.5B", ("total", 4.5e9)),
        ("300m", ("total", 3e8)),
        ("12k", ("total", 12e3)),
        (" 12_000 ", ("total", 12000)),
    ],
)
def test_targets_are_shares_or_counts(text: str, expected: tuple[str, float]) -> None:
    assert parse_target(text) == expected


@pytest.mark.parametrize("text", ["", "half", "50%%", "-1B", "1e9", "4.5T", "%", "1 2"])
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"is neither a percentage such as 50% nor a count such as 4.5B or 300M"):
        parse_target(text)


@pytest.mark.parametrize("text", ["0%", "101%"])
def test_shares_are_above_zero_and_at_most_all(text: str) -> None:
    with pytest.raises(PlanError, match="must be more than 0% and at most 100%"):
        parse_target(text)


def test_an_explicit_shape_is_taken_as_it_is() -> None:
    student = given_shape(FAMILIES["llama"], TEACHER, PruneConfig(shape={"hidden": 24, "ffn": 7}))
    assert student == replace(TEACHER, hidden=24, ffn=7)


@pytest.mark.parametrize(
    ("drop", "layers"), [("3", (0, 1, 2)), ("0-1", (2, 3)), ("0, 2-3", (1,)), ("1,1-2", (0, 3)), (None, None)]
)
def test_layers_dropped_by_hand_are_dropped_whatever_their_score(
    drop: str | None, layers: tuple[int, ...] | None
) -> None:
    prune = PruneConfig(drop_layers=drop, shape={"ffn": 7})
    student = given_shape(FAMILIES["llama"], TEACHER, prune)
    plan = choose(random_scores(), TEACHER, student, given_layers(prune, TEACHER))
    assert plan.layers == (layers or (0, 1, 2, 3)) and (student.layers, student.ffn) == (len(plan.layers), 7)
    require_consistent(plan)


@pytest.mark.parametrize(("keep", "layers"), [("3", (3,)), ("0-1", (0, 1)), ("2-3, 0", (0, 2, 3)), ("1,1", (1,))])
def test_layers_kept_by_hand_are_the_ones_that_stay(keep: str, layers: tuple[int, ...]) -> None:
    prune = PruneConfig(keep_layers=keep)
    student = given_shape(FAMILIES["llama"], TEACHER, prune)
    assert choose(random_scores(), TEACHER, student, given_layers(prune, TEACHER)).layers == layers


BAD_TARGETS: dict[str, tuple[PruneConfig, str]] = {
    "neither": (PruneConfig(), r"give either prune.target \(such as 50%\), or prune.shape and prune.drop"),
    "both": (PruneConfig(target="50%", shape={"ffn": 8}), "and not both"),
    "unknown dim": (
        PruneConfig(shape={"hiden": 8}),
        "unknown dim 'hiden'; did you mean 'hidden'. Available: ffn, heads",
    ),
    "fixed dim": (PruneConfig(shape={"vocab": 8}), "unknown dim 'vocab'"),
    "shape too large": (PruneConfig(shape={"layers": 5}), "target layers=5 is larger than the teacher's layers=4"),
    "no such llama": (PruneConfig(shape={"hidden": 20}), "hidden=20 is no multiple of heads=8"),
    "target and layers": (PruneConfig(target="50%", drop_layers="1"), "and not both"),
    "no layers": (PruneConfig(drop_layers="two"), "drop_layers 'two' is no list of layers such as 15-30 or 3,7,9-11"),
    "too many layers": (PruneConfig(drop_layers="2-4"), "must name some, not all, of the teacher's layers 0 to 3"),
    "all layers": (PruneConfig(drop_layers="0-3"), "must name some, not all"),
    "backwards": (PruneConfig(drop_layers="3-1"), "must name some, not all"),
    "layers twice": (
        PruneConfig(drop_layers="1-2", shape={"layers": 3}),
        "drop_layers keeps 2 layers, but prune.shape wants layers=3: give one",
    ),
    "keep and drop": (PruneConfig(keep_layers="1", drop_layers="2"), "drop_layers or prune.keep_layers, and not both"),
    "no layers to keep": (PruneConfig(keep_layers="last"), "keep_layers 'last' is no list of layers such as 15-30"),
    "all kept": (PruneConfig(keep_layers="0-3"), "keep_layers '0-3' must name some, not all"),
    "no task": (PruneConfig(target="50%", layer_criterion="task"), "layer_task is None: the criterion 'task' needs a"),
    "idle task": (
        PruneConfig(target="50%", layer_task="a.jsonl"),
        "layer_task is 'a.jsonl': .* no other criterion has",
    ),
    "zero": (PruneConfig(shape={"kv_heads": 0}), "kv_heads=0.* must be positive"),
}


@pytest.mark.parametrize(("prune", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_impossible_targets_are_refused_with_a_reason(prune: PruneConfig, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        if is_given(prune):
            given_shape(FAMILIES["llama"], TEACHER, prune)


def test_prunable_dims_are_those_a_plan_lists() -> None:
    assert set(PRUNABLE) == Plan.__dataclass_fields__.keys() - {"teacher", "student"}


# --- units given in a file -------------------------------------------------------------------------------------------


def given(tmp_path: Path, raw: Any) -> Any:
    (tmp_path / "units.json").write_text(json.dumps(raw))
    return load_given(tmp_path / "units.json", TEACHER)


def chosen_with(units: Given, **shape: int) -> Plan:
    student = given_shape(FAMILIES["mistral"], TEACHER, PruneConfig(shape=shape or None), units)
    return choose(random_scores(), TEACHER, student, units)


def test_a_plan_with_all_dims_is_a_plan_and_needs_no_choice(tmp_path: Path) -> None:
    plan = tiny.plan(TEACHER, layers=3, hidden=24, ffn=20, kv_heads=2, heads=2)
    plan.save(tmp_path / "plan.json")
    assert load_given(tmp_path / "plan.json", TEACHER) == plan


def test_listed_units_stay_and_the_scores_choose_the_rest(tmp_path: Path) -> None:
    hidden, ffn = list(range(3, 27)), [list(range(layer, 20 + layer)) for layer in range(4)]
    free = choose(random_scores(), TEACHER, replace(TEACHER, layers=2, hidden=24, ffn=20))
    plan = chosen_with(given(tmp_path, {"hidden": hidden, "ffn": ffn}), layers=2)
    assert list(plan.hidden) == hidden
    assert plan.layers == free.layers
    assert [list(units) for units in plan.ffn] == [ffn[layer] for layer in plan.layers]  # lists go with their layers
    by_layer = chosen_with(given(tmp_path, {"layers": [1, 3], "ffn": ffn[:2]}), hidden=24)
    assert by_layer.layers == (1, 3) and [list(units) for units in by_layer.ffn] == ffn[:2]
    assert by_layer.hidden == free.hidden


def test_heads_that_are_listed_bring_their_kv_heads(tmp_path: Path) -> None:
    plan = chosen_with(given(tmp_path, {"heads": [[0, 5], [3, 6], [1, 3], [4, 7]]}))
    assert plan.kv_heads == ((0, 2), (1, 3), (0, 1), (2, 3)) and plan.student.heads == 2
    groups = chosen_with(given(tmp_path, {"kv_heads": [[0, 3]] * 4}))
    assert groups.heads == ((0, 1, 6, 7),) * 4
    half = chosen_with(given(tmp_path, {"kv_heads": [[0, 3]] * 4}), heads=2)
    assert all(len(heads) == 2 and heads[0] < 2 and heads[1] > 5 for heads in half.heads)


@pytest.mark.parametrize(
    ("raw", "shape", "needed"),
    [
        ({"layers": [0, 3]}, {}, False),
        ({"ffn": [[1, 2]] * 4}, {}, False),
        ({"heads": [[0, 3]] * 4}, {}, False),
        ({"kv_heads": [[0, 3]] * 4}, {}, True),  # of heads, all of the groups stay, and that is counted as a choice
        ({"layers": [0, 3]}, {"ffn": 20}, True),
    ],
)
def test_scores_are_needed_where_a_dim_shrinks_that_is_not_listed(
    tmp_path: Path, raw: Any, shape: dict[str, int], needed: bool
) -> None:
    units = given(tmp_path, raw)
    student = given_shape(FAMILIES["mistral"], TEACHER, PruneConfig(shape=shape or None), units)
    assert needs_scores(TEACHER, student, units) == needed


BAD_UNITS: dict[str, tuple[Any, dict[str, int], str]] = {
    "empty": ({}, {}, "must be an object that lists the units"),
    "list": ([1], {}, "must be an object that lists the units"),
    "unknown dim": ({"layer": [1]}, {}, "unknown dim 'layer'; did you mean 'layers'"),
    "no list": ({"layers": 3}, {}, "is not a plan file: layers: .* a valid list .*; layers and hidden are lists of"),
    "texts": ({"hidden": ["a"]}, {}, "is not a plan file: hidden.0: .* a valid integer"),
    "flat ffn": ({"ffn": [1, 2, 3, 4]}, {}, "ffn, heads and kv_heads lists of such lists, one per layer"),
    "layer twice": ({"layers": [1, 1]}, {}, "layers must list 2 different indices below 4"),
    "no layer": ({"layers": []}, {}, "layers=0 leaves nothing"),
    "too few lists": ({"ffn": [[1]] * 3}, {}, "ffn has 3 lists, and needs one for each layer of the teacher, 4"),
    "of kept layers": ({"layers": [1], "ffn": [[1]] * 4}, {}, "ffn has 4 lists, and needs one for each kept layer, 1"),
    "uneven": ({"ffn": [[1], [1], [1, 2], [1]]}, {}, "ffn must list 1 different indices below 40"),
    "uneven groups": ({"heads": [[0, 1], [0, 2], [0, 1], [0, 1]]}, {}, "the same number of kv heads in each layer"),
    "foreign heads": ({"heads": [[0, 1]] * 4, "kv_heads": [[2]] * 4}, {}, "must keep the same number of its own"),
    "other size": ({"hidden": [1, 2]}, {"hidden": 3}, "the plan file keeps 2 hidden, but prune.shape wants hidden=3"),
    "nothing": ({"ffn": [[]] * 4}, {}, "ffn=0 leaves nothing"),
}


@pytest.mark.parametrize(("raw", "shape", "message"), BAD_UNITS.values(), ids=BAD_UNITS)
def test_units_that_contradict_the_teacher_or_themselves_are_refused(
    tmp_path: Path, raw: Any, shape: dict[str, int], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        chosen_with(given(tmp_path, raw), **shape)


# --- in steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_steps_go_down_to_the_student_by_shapes_that_the_family_has(name: str) -> None:
    family, teacher, tied = REAL[name]
    config = {"tie_word_embeddings": tied}
    for share, steps in product(("70%", "15%"), (1, 2, 5)):
        prune = PruneConfig(target=share)
        found = feasible(FAMILIES[family], config, teacher, prune, SearchConfig(), itemsize=2)
        student = found[len(found) // 2].shape
        shapes = step_shapes(FAMILIES[family], teacher, student, steps)
        assert shapes[-1] == student and min(steps, 2) <= len(shapes) <= steps, (share, steps)
        for larger, smaller in pairwise([teacher, *shapes]):
            FAMILIES[family].require_valid(smaller)
            require_cuttable(larger, smaller)
            assert larger != smaller


def test_layers_that_are_given_go_in_the_first_step_and_other_units_in_one_step_only() -> None:
    student = replace(TEACHER, layers=2, ffn=20)
    shapes = step_shapes(FAMILIES["llama"], TEACHER, student, 2, Given(layers=(0, 3)))
    assert shapes == [replace(TEACHER, layers=2, ffn=30), student]
    with pytest.raises(PlanError, match="units that a plan file lists are cut at once: give no iterations"):
        step_shapes(FAMILIES["llama"], TEACHER, student, 2, Given(layers=(0, 3), hidden=tuple(range(32))))


@pytest.mark.parametrize("seed", range(5))
def test_plans_compose_unit_by_unit(seed: int) -> None:
    first = tiny.plan(TEACHER, seed, layers=3, hidden=24, ffn=30, kv_heads=3, heads=6)
    second = tiny.plan(first.student, seed + 9, layers=2, hidden=16, ffn=11, kv_heads=2, heads=2)
    both = compose(first, second)
    require_consistent(both)
    assert (both.teacher, both.student) == (TEACHER, second.student)
    for index, layer in enumerate(second.layers):
        assert both.layers[index] == first.layers[layer]
        for dim in ("ffn", "heads", "kv_heads"):
            kept = getattr(first, dim)[layer]
            assert getattr(both, dim)[index] == tuple(kept[unit] for unit in getattr(second, dim)[index])
    assert compose(tiny.identity_plan(TEACHER), first) == first == compose(first, tiny.identity_plan(first.student))
