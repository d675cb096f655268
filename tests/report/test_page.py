import dataclasses
import re
from html import escape, unescape
from pathlib import Path
from typing import Any

import browser
import example_run
import numpy as np
import pytest

from minitron.core.errors import RunError
from minitron.core.text import MISSING, duration, flops, share, short_count, size
from minitron.core.typed_files import as_typed
from minitron.distillation.layouts import Logged
from minitron.evaluation.layouts import Ratios
from minitron.evaluation.tasks.suite import SUITE
from minitron.gguf.layouts import QUANTIZATION
from minitron.pruning.depth import LAYER_CRITERIA
from minitron.pruning.layouts import PlanSizes, UnitScores
from minitron.pruning.repair import REPAIRS
from minitron.report.choices import describe_search, describe_units, kept_mass, layer_choices, shape_sentence, why
from minitron.report.layouts import CutRecipe, PrunedResult, ScoresResult
from minitron.report.page import headline, render, write_report
from minitron.report.plots import pareto_front
from minitron.report.published import DATASETS, PUBLISHED
from minitron.report.records import RunRecords, read_run, result_table, stage_flops
from minitron.report.tables import environments, hub_id, result_cells, source_name
from minitron.shapes import layouts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example_run.write(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(read_run(run)).read_text()


def test_report_loads_nothing_and_runs_nothing(page: str) -> None:
    references = re.findall(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?([^"')\s>]+)""", page.partition("<body>")[2])
    assert references
    assert {ref[:1] for ref in references if not ref.startswith("data:image/png;base64,")} <= {"#"}
    assert "@import" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page


def test_report_has_every_number_of_the_result_table(run: Path, page: str) -> None:
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)", row) for row in re.findall(r"<tr>(.*?)</tr>", unescape(page))]
    for row in result_table(read_run(run)):
        assert [row["model"], *result_cells(row)] in rows
    assert ["student", "1,697,616", "1,107,792", "47%", "3.803", "44.83", "1.433", "2.233", "35.5%", "6.79 MB"] in rows


def test_headline_says_who_what_and_how_far_in_one_sentence(run: Path) -> None:
    assert headline(read_run(run)) == (
        "acme/parent-3M was cut to 47% of its non-embedding parameters (2,361,792 → 1,107,792); the KL divergence to "
        "it on held-out text is 3.73 nats per token after pruning and 2.23 after distillation on 2,560 tokens."
    )


def test_generated_text_is_shown_as_text(page: str) -> None:
    assert escape(example_run.HOSTILE) in page
    assert "<script>alert" not in page
    assert "x):\n\treturn 1" in page


def test_report_works_without_scratch_and_without_speed(tmp_path: Path) -> None:
    page = render(read_run(example_run.write(tmp_path / "run", scratch=False, speed=False)))
    assert "scratch" not in page.partition("<body>")[2].replace("scratch_baseline", "")
    assert "Size and speed" not in page


def test_report_works_without_scores_and_metrics(run: Path) -> None:
    page = render(dataclasses.replace(read_run(run), scores=None, plan=None, cut=None, metrics=[], generations=[]))
    assert "Layers and units" not in page and "Training" not in page


def test_unmeasured_speed_is_a_dash(page: str) -> None:
    assert not re.search(r"\bnan\b", page)
    assert "<td>1.90 ×</td><td>–</td>" in page  # noqa: RUF001


def test_the_ratio_of_speeds_is_that_of_the_rounds_where_the_run_has_it(run: Path) -> None:
    records = read_run(run)
    assert records.speed is not None
    speed = records.speed.model_copy(update={"ratio": Ratios(prefill=1.5, decode=0.75)})
    page = render(dataclasses.replace(records, speed=speed))
    assert "<td>1.50 ×</td><td>0.75 ×</td>" in page  # noqa: RUF001


def test_the_report_says_what_the_run_cost(run: Path, page: str) -> None:
    # 2,560 tokens for the student and for the one from scratch; eight stages of 12.5 seconds.
    operations = flops(sum(stage_flops(read_run(run)).values()))
    said = f"5,120 tokens trained on, {operations} in calibration and training, 0.03 hours"
    assert f"<dt>Cost</dt><dd>{said}</dd>" in page
    records = read_run(run)
    stages = {name: stage.model_copy(update={"energy_joules": 4e5}) for name, stage in records.stages.items()}
    assert f"{said}, 0.889 kWh by the" in render(dataclasses.replace(records, stages=stages))


def test_equal_records_give_equal_bytes(run: Path, page: str) -> None:
    assert write_report(read_run(run)).read_text() == page


def test_ids_are_unique_and_every_reference_has_one(page: str) -> None:
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"""(?:href="|url\()#([\w-]+)""", page)) == set(ids)


def test_every_figure_has_a_description(page: str) -> None:
    assert page.count("<figure>") == page.count('role="img" aria-label="') == 9


def candidate(name: str, total: int, losses: dict[str, float]) -> dict[str, Any]:
    costs = {"total": total, "non_embedding": total // 2, "weight_bytes": 2.0 * total, "kv_cache_bytes": 4096 - total}
    times = {"decode_seconds": total / 1e6, "prefill_seconds": total / 1e7}
    return {"name": name, "shape": example_run.STUDENT, "predicted": 0.5, "losses": losses} | costs | times


SEARCH: dict[str, Any] = {
    "machine": {"bytes_per_second": 8.5e9, "flops_per_second": 1.2e12},
    "context_tokens": 2048,
    "batch": 1,
    "candidates": [
        candidate("a", 1000, {"0": 2.5, "4": 1.25, "8": 1.125}),
        candidate("b", 1200, {"0": 2.25, "4": 1.0, "8": 1.5}),
        candidate("c", 1400, {"0": 2.125, "4": 1.75}),
        candidate("d", 1500, {}),
    ],
}


def searched(records: RunRecords, candidates: list[dict[str, Any]] = SEARCH["candidates"]) -> RunRecords:
    """The records of a run that searched for its shape."""
    found = as_typed(SEARCH | {"candidates": candidates}, layouts.SEARCH, "candidates.json", RunError)
    return dataclasses.replace(records, search=found)


def test_a_search_shows_its_candidates_and_what_they_cost(run: Path) -> None:
    page = render(searched(read_run(run)))
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)", row) for row in re.findall(r"<tr>(.*?)</tr>", unescape(page))]
    sizes = [f"{example_run.STUDENT[dim]}" for dim in ("layers", "hidden", "ffn", "heads", "kv_heads")]
    costs = ["1.00K", "500", "2.00 kB", "3.10 kB", "1 ms", "0.1 ms", "0.500"]
    assert ["1", *sizes, *costs, "2.500", "1.250", "1.125"] in rows
    assert [row[-3:] for row in rows if row[0] == "4" and len(row) == 16] == [[MISSING] * 3]
    assert page.count("<figure>") == page.count('role="img" aria-label="') == 13
    assert "Loss after 4 steps" in page and "Successive elimination" in page
    for losses, words in (({}, "predicted, not measured"), ({"0": 2.0}, "right after the cut")):
        found = [one | {"losses": losses} for one in SEARCH["candidates"]]
        section = describe_search(searched(read_run(run), found))
        assert words in section and "Successive elimination" not in section


def test_gguf_files_are_shown_by_what_they_cost(run: Path) -> None:
    measured = {"perplexity": 44.0, "kl": 0.0123, "top1": 0.951, "tokens": 510, "reference_perplexity": 43.5}
    row = {"name": "Q4_K_M", "file": "a.gguf", "bytes": 2_500_000, "bits_per_weight": 4.8512, "informed": True}
    row |= {"kl_of_other": 0.02}
    files = [
        row | {"measured": measured},
        row | {"name": "4.5bpw", "measured": measured | {"kl": 0.01}, "kl_of_other": None},
    ]
    ladder = as_typed({"notes": ["it is <small>"], "files": files}, QUANTIZATION, "quantization.json", RunError)
    page = render(dataclasses.replace(read_run(run), exports={"gguf": ladder}))
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)", row) for row in re.findall(r"<tr>(.*?)</tr>", unescape(page))]
    assert ["Q4_K_M", "2.50 MB", "4.85", "yes", "44.00", "0.01230", "95.1%", "0.02000"] in rows
    assert ["4.5bpw", "2.50 MB", "4.85", "yes", "44.00", "0.01000", "95.1%", MISSING] in rows
    assert (
        "it is &lt;small&gt;" in page and "510 tokens of held-out text" in page and "What a smaller file costs" in page
    )
    assert page.count("<figure>") == page.count('role="img" aria-label="') == 10
    assert "GGUF" not in render(read_run(run)).replace("gguf", "")


def test_the_shape_is_explained_by_the_rule_that_it_came_by(run: Path) -> None:
    records = read_run(run)
    sizes = "layers 4 → 3 (75%), hidden 8 → 6 (75%), ffn 12 → 8 (67%), heads 4 → 2 (50%)"
    sizes = sizes.replace(" → ", "\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}")
    assert f"A target of 50% gave {sizes}, by the rule of an older version" in shape_sentence(records)
    given = records.recipe.model_copy(update={"prune": CutRecipe(target=None, criterion="activation")})
    assert f"The recipe gives the sizes: {sizes}." in shape_sentence(dataclasses.replace(records, recipe=given))
    text = shape_sentence(searched(records))
    assert f"A search ranked 4 shapes within the budgets and took {sizes}: its loss after 8 steps" in text
    assert "is 1.125 nats per token, the best of the others’ 1.500." in text  # noqa: RUF001
    for losses, words in (
        ({}, "its predicted damage, 0.500, is the lowest"),
        ({"0": 2.0}, "right after the cut is 2."),
    ):
        found = [one | {"losses": losses} for one in SEARCH["candidates"]]
        assert words in shape_sentence(searched(records, found))


def test_the_kept_share_of_the_scores_is_that_of_their_sum() -> None:
    assert kept_mass([1.0, 2.0, 5.0], [0, 2]) == 0.75
    assert np.isnan(kept_mass([0.0, 0.0], [1]))


def test_units_that_the_repair_chose_otherwise_are_counted_layer_by_layer(run: Path) -> None:
    records = read_run(run)
    assert records.scores and records.plan and records.cut
    ffn, heads = (layer_choices(dim, records.scores, records.plan, records.cut) for dim in ("ffn", "heads"))
    assert [one.layer for one in ffn] == example_run.KEPT_LAYERS
    assert [one.otherwise for one in ffn] == [0, 1, 0]
    assert [one.otherwise for one in heads] == [0, 0, 2]
    assert (heads[2].planned_mass, heads[2].mass) == (0.6, 0.4)
    section = unescape(describe_units(records))
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)", row) for row in re.findall(r"<tr>(.*?)</tr>", section)]
    assert rows[1:] == [
        ["0", "90.9%", MISSING, "60.0%", MISSING],
        ["1", "84.8%", "1 of 8", "60.0%", MISSING],
        ["3", "90.9%", MISSING, "40.0%", "2 of 2"],
    ]
    assert "8 of 12 kept per layer, with 88.9% of the scores’ sum. The scores alone would keep 90.9%" in section  # noqa: RUF001
    assert "the repair chose 1 of 24 otherwise" in section


def test_a_basis_leaves_the_scores_of_hidden_channels_without_a_say(run: Path) -> None:
    page = unescape(describe_units(read_run(run)))
    assert "not used: a basis of 6 directions took their place" in page
    assert "of 8 hidden channels, 6 of them kept" not in page


def test_every_repair_step_is_explained(run: Path) -> None:
    page = unescape(why(read_run(run)))
    assert [step for step in REPAIRS if f"<dt>{step}</dt><dd>{REPAIRS[step].text}</dd>" in page] == example_run.REPAIRS


def test_records_of_an_older_run_say_nothing_of_a_repair(tmp_path: Path) -> None:
    records = read_run(example_run.write(tmp_path / "run", repaired=False))
    page = unescape(why(records))
    assert "6 of 8 kept, with 96.6% of the scores’ sum." in page  # noqa: RUF001
    assert "the repair chose" not in page and "<h3>Repair" not in page


def test_a_plain_cut_is_called_so(run: Path) -> None:
    records = read_run(run)
    plain = dataclasses.replace(records.results, pruned=PrunedResult(repairs=[]))
    assert "None: what was kept was left as it was" in why(dataclasses.replace(records, results=plain))


@pytest.mark.parametrize("criterion", LAYER_CRITERIA)
def test_layers_are_shown_by_the_criterion_that_scored_them(run: Path, criterion: str) -> None:
    records = read_run(run)
    assert records.scores and records.cut
    scored = dataclasses.replace(records.results, scores=ScoresResult(layers=criterion))
    # The last one of `contiguous`.
    scores = records.scores.model_copy(update={"layers": [0.5, 0.25, -0.125, float("inf")]})
    fewer = {"layers": [0, 3], "ffn": [[]] * 2, "heads": [[]] * 2, "kv_heads": [[]] * 2}
    cut = records.cut.model_copy(update=fewer)
    two = describe_units(dataclasses.replace(records, results=scored, scores=scores, plan=cut, cut=cut))
    assert "dropped: 1-2." in two
    section = unescape(describe_units(dataclasses.replace(records, results=scored, scores=scores)))
    assert f"<b>Layers, by {LAYER_CRITERIA[criterion].title}</b>" in section
    assert "3 of 4 kept; dropped: 2." in section
    assert not re.search(r"\b(nan|inf)\b", section)


@pytest.mark.parametrize("key", ["drop_layers", "keep_layers"])
def test_layers_that_the_recipe_numbers_are_not_said_to_be_chosen_by_score(run: Path, key: str) -> None:
    records = read_run(run)
    given = {"target": None, key: "2" if key == "drop_layers" else "0,1,3"}
    prune = records.recipe.prune.model_copy(update=given)
    section = describe_units(dataclasses.replace(records, recipe=records.recipe.model_copy(update={"prune": prune})))
    assert "The recipe gives their numbers; the scores chose none." in section


def test_the_front_is_what_no_other_point_beats() -> None:
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.5, 2.5), (1.0, 4.0), (4.0, 1.0)]
    beaten = {a for a in points for b in points if a != b and b[0] <= a[0] and b[1] <= a[1]}
    assert [points[index] for index in pareto_front(points)] == sorted(set(points) - beaten)


def test_report_of_a_large_model_stays_small(run: Path) -> None:
    records = read_run(run)
    layers, hidden, ffn, heads = 32, 4096, 14336, 32
    rng = np.random.default_rng(0)
    assert records.plan is not None
    sizes = PlanSizes(layers=layers, hidden=hidden, ffn=ffn, heads=heads, kv_heads=8, head_dim=4, vocab=100)
    scores = {
        "layers": rng.random(layers).tolist(),
        "hidden": rng.random(hidden).tolist(),
        "ffn": rng.random((layers, ffn)).tolist(),
        "heads": rng.random((layers, heads)).tolist(),
        "kv_heads": rng.random((layers, 8)).tolist(),
    }
    kept = {"teacher": sizes, "student": sizes, "layers": list(range(layers)), "hidden": list(range(0, hidden, 2))} | {
        "ffn": [list(range(0, ffn, 2))] * layers,
        "heads": [list(range(heads))] * layers,
        "kv_heads": [list(range(8))] * layers,
    }
    plan = records.plan.model_copy(update=kept)
    steps = [Logged(step=n, tokens=n, loss=1 / n, learning_rate=1e-4) for n in range(1, 50_001)]
    changed = dataclasses.replace(records, scores=UnitScores(**scores), plan=plan, cut=plan, metrics=steps)
    assert len(render(changed)) < 1_000_000


@browser.needed
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_its_window_without_console_messages(page: str, tmp_path: Path, width: int) -> None:
    found = browser.measured(page, width, 'root.scrollWidth + " of " + root.clientWidth', tmp_path)
    assert found == f"{width} of {width}"


def test_numbers_are_written_for_people() -> None:
    assert [size(n) for n in (999, 1000, 12_592_896, 999_999, 16e9)] == [
        "999 bytes",
        "1.00 kB",
        "12.6 MB",
        "1.00 MB",
        "16.0 GB",
    ]
    assert [short_count(n) for n in (17, 1_697_616, 4_512_000_000)] == ["17", "1.70M", "4.51B"]
    assert [share(x) for x in (0, 0.0004, 0.469, 0.9996, 1)] == ["0%", "0.04%", "47%", "99.96%", "100%"]
    assert [duration(s) for s in (0.04, 86.9, 7384)] == ["0.0 s", "1 min 27 s", "2 h 03 min"]


def test_a_local_path_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert hub_id("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    for path in ("/data/mine", "./mine", "models/mine", "texts/train.jsonl", "a/b/c"):
        assert hub_id(path) is None
    assert source_name("/data/mine/") == "mine"


def test_a_run_of_two_machines_names_the_stages_of_each(run: Path) -> None:
    record = read_run(run).stages["data"]
    stages = {"data": record}
    assert list(environments(stages)) == ["Hardware", "Software"]
    other = record.hardware.model_copy(update={"device": "B"})
    stages["student"] = record.model_copy(update={"hardware": other})
    assert list(environments(stages))[::2] == ["Hardware (data)", "Hardware (student)"]


def test_benchmarks_stand_beside_the_published_ones(tmp_path: Path) -> None:
    page = unescape(render(read_run(example_run.write(tmp_path / "run", tasks=("winogrande", "mmlu", "stories")))))
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert ["Winogrande", "acc", "5", "1,234", "80.0 ± 1.2", "60.0 ± 1.2", "75.0%"] in rows
    assert ["stories", "acc", "5", "1,234", "80.0 ± 1.2", "60.0 ± 1.2", "75.0%"] in rows
    assert ["Model", "Winogrande", "MMLU"] in rows and ["Minitron-8B", "79.0", "63.8"] in rows
    assert "used to choose" not in page
    assert "Benchmarks" not in render(read_run(example_run.write(tmp_path / "other")))


def test_a_benchmark_that_chose_the_layers_is_marked(tmp_path: Path) -> None:
    run = example_run.write(tmp_path / "run", tasks=("winogrande", "mmlu"), chosen_by=("winogrande",))
    page = unescape(render(read_run(run)))
    assert "Winogrande (used to choose)" in page and "MMLU (used to choose)" not in page
    assert "its value is no result of the student" in page


def test_published_values_are_those_of_the_papers() -> None:
    assert len(PUBLISHED) == 8 and PUBLISHED["Minitron-4B"]["gsm8k"] == 24.1
    assert PUBLISHED["Mistral-NeMo-Minitron-8B"]["humaneval"] == 36.2
    assert "humaneval" not in PUBLISHED["Llama-3.1-Minitron-4B-Width"]
    assert {task for row in PUBLISHED.values() for task in row} == set(SUITE) == set(DATASETS)
