"""Several runs on one page: every number is that of a run's own records, and what cannot be compared is said."""

import dataclasses
import re
from html import unescape
from pathlib import Path

import browser
import example_run
import pytest
import yaml

from minitron.cli.main import main
from minitron.core.errors import RunError
from minitron.report.comparison import cautions, comparison_headline, name_runs, render_comparison
from minitron.report.records import ResultRow, RunRecords, read_run, result_table, stage_flops
from minitron.report.tables import result_cells


def variant(path: Path, **distill: object) -> RunRecords:
    """A run like the example, with another recipe."""
    example_run.write(path, scratch=False)
    recipe = example_run.recipe("acme/parent-3M")
    recipe["distill"] |= distill
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return read_run(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecords]:
    path = tmp_path_factory.mktemp("comparison")
    return [variant(path / "half"), variant(path / "other", tokens=9999)]


@pytest.fixture(scope="module")
def page(runs: list[RunRecords]) -> str:
    return render_comparison(runs)


def rows_of(page: str) -> list[list[str]]:
    return [re.findall(r"<t[hd][^>]*>([^<]*)", row) for row in re.findall(r"<tr>(.*?)</tr>", unescape(page))]


def test_every_student_has_the_numbers_of_its_own_report(runs: list[RunRecords], page: str) -> None:
    (student,) = (row for row in result_table(runs[0]) if row["model"] == "student")
    total, non_embedding, share, loss, perplexity, _, kl, top1, weights = result_cells(student)
    for name in ("half", "other"):
        assert [name, total, non_embedding, share, loss, perplexity, kl, top1, "3.726"] in rows_of(page)
        (cost,) = (row for row in rows_of(page) if row[0] == name and weights in row)
        assert cost[1] == "2,560" and cost[3] == "1 min 28 s" and cost[-2:] == ["1.90 ×", "–"]  # noqa: RUF001
        assert [name, "3", "6", "8", "2", "2", "4", "100", "192"] in rows_of(page)
    assert ["teacher acme/parent-3M", "4", "8", "12", "4", "2", "4", "100", "256"] in rows_of(page)


def test_what_differs_between_the_recipes_is_shown_and_nothing_else(page: str) -> None:
    differs = rows_of(page.partition("What differs")[2])
    assert differs[0] == ["Key", "half", "other"] and differs[1:] == [["distill.tokens", "2560", "9999"]]


def test_runs_that_are_the_same_are_said_to_be(tmp_path: Path) -> None:
    page = render_comparison([variant(tmp_path / "a"), variant(tmp_path / "b")])
    assert "The recipes are the same, key by key." in page and cautions({"a": variant(tmp_path / "c")}) == []


def test_what_cannot_be_compared_is_said(runs: list[RunRecords]) -> None:
    one, two = runs
    stage = two.stages["evaluations"]
    hardware = stage.hardware.model_copy(update={"threads": 64})
    stage = stage.model_copy(update={"inputs": {"teacher": "x", "data": "y"}, "hardware": hardware})
    distill = two.recipe.distill.model_copy(update={"loss": "reverse_kl"})
    other = dataclasses.replace(
        two,
        recipe=two.recipe.model_copy(update={"model": "acme/another", "distill": distill}),
        stages={**two.stages, "evaluations": stage},
    )
    notes = cautions({"one": one, "two": other})
    assert [note.split("(")[0].split(":")[0].strip() for note in notes] == [
        "The runs have different teachers",
        "They were not measured on the same tokens of held-out text",
        "They ran on different hardware or numbers of threads",
    ]
    assert "Their curves cannot be compared." in render_comparison([one, other])


def test_the_headline_names_the_nearest_and_the_smallest(runs: list[RunRecords]) -> None:
    (student,) = (row for row in result_table(runs[0]) if row["model"] == "student")
    students: dict[str, ResultRow] = {
        "a": {**student, "kl_to_teacher": 0.5, "total": 10_000},
        "b": {**student, "kl_to_teacher": 0.25, "total": 20_000},
    }
    assert comparison_headline(students) == (
        "b is nearest to its teacher, with a KL divergence of 0.250 nats per token; a is the smallest, "
        "with 10.0K parameters."
    )
    assert "; it is the smallest" in comparison_headline(students | {"b": {**students["b"], "total": 1}})


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    some = [variant(tmp_path / name / "run") for name in ("a", "b") if not (tmp_path / name).mkdir()]
    assert list(name_runs(some)) == ["a/run", "b/run"]
    with pytest.raises(RunError, match="a/run is given twice; name each run once"):
        name_runs([some[0], some[1], some[0]])


def test_page_loads_nothing_and_its_figures_are_described(page: str) -> None:
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page and "@import" not in page
    assert page.count("<figure>") == page.count('role="img" aria-label="') == 4
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"""(?:href="|url\()#([\w-]+)""", page)) == set(ids)


def test_many_runs_have_a_name_and_a_mark_each(runs: list[RunRecords]) -> None:
    many = [dataclasses.replace(runs[0], path=Path(f"/runs/number{index}")) for index in range(11)]
    page = render_comparison(many)
    for index in range(11):
        assert page.count(f">number{index}</text>") == 4  # the legend of each figure


def test_the_verb_writes_one_page_where_it_is_told(
    runs: list[RunRecords], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(records.path) for records in runs]
    assert main(["report", *paths, "--out", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both.html'}\n"
    assert (tmp_path / "both.html").read_text() == render_comparison(runs)
    assert main(["report", paths[0], "--out", str(tmp_path / "one.html")]) == 0
    assert (tmp_path / "one.html").is_file() and not (runs[0].path / "report.html").exists()
    capsys.readouterr()
    assert main(["report", *paths, "--out", str(tmp_path / "one.html" / "page.html")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert main(["report", paths[0], paths[0]]) == 1
    assert "is given twice" in capsys.readouterr().err


def test_operations_are_those_of_the_tokens(runs: list[RunRecords]) -> None:
    # Twice the matrices' weights and the output projection, and attention over 64 tokens of context.
    teacher = 2 * (589824 + 1769472 + 2496 + 100 * 8) + 2 * 64 * 4 * 4 * 4
    student = 2 * (442368 + 663552 + 1872 + 100 * 6) + 2 * 64 * 2 * 4 * 3
    assert stage_flops(runs[0]) == {"statistics": 512 * teacher, "student": 2560 * (teacher + 3 * student)}


@browser.needed
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_its_window(page: str, tmp_path: Path, width: int) -> None:
    drawn = '[...root.querySelectorAll("figure svg")].filter(svg => svg.getBoundingClientRect().height > 100).length'
    assert (
        browser.measured(page, width, f'root.scrollWidth + ", figures " + {drawn}', tmp_path) == f"{width}, figures 4"
    )
