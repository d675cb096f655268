"""Links in the documentation lead somewhere, and what it names exists."""

import importlib
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

import minitron
from minitron.core.config import Section
from minitron.recipe import Recipe

ROOT = Path(__file__).parents[1]
PACKAGE = Path(minitron.__file__).parent
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]+)\)")
DOTTED = re.compile(r"`(?:minitron\.)?((?:\w+\.)+(?!(?:safetensors|jsonl?|gguf|bin|py)`)\w+)`")
SOURCE = re.compile(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?)`")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def recipe_keys() -> Iterator[str]:
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from (f"{name}.{key}" for key in field.annotation.model_fields)


def exists(dotted: str) -> bool:
    """Whether a name below the package, such as pruning.plan.choose, is a module or something in one."""
    parts = dotted.split(".")
    for known in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["minitron", *parts[:known]]))
        except ModuleNotFoundError:
            continue
        for part in parts[known:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_every_relative_link_leads_to_something() -> None:
    dead = []
    for page in PAGES:
        for target in LINK.findall(page.read_text()):
            path, _, anchor = target.partition("#")
            end = (page.parent / path).resolve() if path else page
            if not end.exists() or (anchor and end.suffix == ".md" and anchor not in anchors(end)):
                dead.append(f"{name_of(page)}: {target}")
    assert not dead


@pytest.mark.parametrize("folder", ["explain", "extend", "guide"])
def test_every_module_and_function_that_is_named_exists(folder: str) -> None:
    keys, packages = set(recipe_keys()), {path.stem for path in PACKAGE.iterdir()}
    missing = {
        f"{name_of(page)}: {name}"
        for page in sorted((ROOT / "docs" / folder).glob("*.md"))
        for name in DOTTED.findall(page.read_text())
        if name.split(".")[0] in packages and name not in keys and not exists(name)
    }
    assert not missing


def test_every_file_of_the_extension_pages_exists() -> None:
    missing = {
        f"{name_of(page)}: {name}"
        for page in sorted((ROOT / "docs" / "extend").glob("*.md"))
        for name in SOURCE.findall(page.read_text())
        if not (PACKAGE / name).exists() and not (ROOT / name).exists()
    }
    assert not missing


def test_every_page_is_in_an_index() -> None:
    docs, benchmarks = ROOT / "docs", ROOT / "benchmarks"
    indexed = {
        (index.parent / target.partition("#")[0]).resolve()
        for index in (docs / "README.md", docs / "log" / "README.md", benchmarks / "README.md")
        for target in LINK.findall(index.read_text())
    }
    superseded = {page for page in benchmarks.rglob("*.md") if "\nsuperseded by " in page.read_text()[:1000]}
    pages = {*docs.rglob("*.md"), *benchmarks.rglob("*.md"), *benchmarks.glob("*.py")}
    assert not {name_of(page) for page in pages - superseded - {docs / "README.md", benchmarks / "README.md"} - indexed}


# Generated page -> lines that show what its generator reads.
GENERATED = {
    "recipe": ("| `gguf.types` | list[str] | `[]` |", "| `model` | str | required |"),
    "cli": ("\n## quantize\n", "| `--target-params` SIZE | ", "\nminitron demo --out runs/demo\n"),
    "api": ("\nminitron.prune(\n    model: Model,\n", "\n### DistillConfig\n", "\nvocab: int\n"),
}


@pytest.mark.parametrize("name", GENERATED)
def test_a_reference_page_is_what_its_script_prints(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "reference" / f"{name}.md").read_text()
    runpy.run_path(str(ROOT / "docs" / f"{name}_reference.py"), run_name="__main__")
    assert page == capsys.readouterr().out, "make docs"
    assert all(line in page for line in GENERATED[name])
