"""A recipe loads strictly, names every mistake by its path, and dumps completely."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from minitron.core.errors import RecipeError
from minitron.recipe import Recipe, build_recipe, dump_recipe, load_recipe

SMALL: dict[str, Any] = {"model": "some/model", "prune": {"target": "50%"}}


def written(path: Path, text: str) -> Path:
    (path / "recipe.yaml").write_text(text)
    return path / "recipe.yaml"


def sections(model: type[BaseModel], path: str = "") -> list[tuple[str, type[BaseModel]]]:
    """Every section of a recipe with its path."""
    found = [(path, model)]
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += sections(field.annotation, f"{path}{name}.")
    return found


def test_a_short_recipe_has_a_default_for_everything_else(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, yaml.safe_dump(SMALL)))
    assert recipe == Recipe.model_validate(SMALL)
    assert (recipe.model, recipe.prune.target, recipe.seed) == ("some/model", "50%", 0)


def test_a_dumped_recipe_is_complete_and_loads_as_it_was(tmp_path: Path) -> None:
    changes = ["distill.learning_rate=0.000001", "distill.betas=[0.8, 0.9]", "data.heldout=b.txt", "seed=3"]
    recipe = build_recipe({"model": "m", "prune": {"shape": {"hidden": 24}}}, changes)
    dumped = dump_recipe(recipe)
    assert load_recipe(written(tmp_path, dumped)) == recipe
    for path, section in sections(Recipe):
        raw = yaml.safe_load(dumped)
        for name in filter(None, path.split(".")):
            raw = raw[name]
        assert raw.keys() == section.model_fields.keys()


@pytest.mark.parametrize(
    ("path", "section"), sections(Recipe), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_key_says_what_it_means(path: str, section: type[BaseModel]) -> None:
    fields = {
        name: field for name, field in section.model_fields.items() if f"{path}{name}." not in dict(sections(Recipe))
    }
    assert [name for name, field in fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=7", 7),
        ("distill.tokens=2_000_000", 2_000_000),
        ("distill.tokens=2.5M", 2_500_000),
        ("data.max_tokens=100K", 100_000),
        ("distill.learning_rate=0.001", 0.001),
        ("distill.learning_rate=1e-4", 1e-4),
        ("search.level=cut", "cut"),
        ("distill.compile=true", True),
        ("model=no", "no"),
        ("distill.learning_rate=2.5E-3", 2.5e-3),
        ("data.heldout=null", None),
        ("data.source=a=b.txt", "a=b.txt"),
        ("scratch_baseline=true", True),
        ("prune.target=30%", "30%"),
        ("revision=1e-4x", "1e-4x"),
    ],
)
def test_an_override_replaces_one_value(tmp_path: Path, override: str, value: object) -> None:
    before = load_recipe(written(tmp_path, yaml.safe_dump(SMALL)))
    after = load_recipe(tmp_path / "recipe.yaml", [override])
    names = override.partition("=")[0].split(".")

    def changed(recipe: Recipe) -> dict[str, Any]:
        raw = recipe.model_dump()
        inner = raw
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value
        return raw

    assert after.model_dump() == changed(before)


def test_an_override_leaves_the_mapping_it_is_given_alone() -> None:
    raw = {"model": "m", "prune": {"target": "50%"}}
    build_recipe(raw, ["prune.target=30%", "seed=3"])
    assert raw == {"model": "m", "prune": {"target": "50%"}}


def test_the_last_override_wins_and_a_section_may_be_new() -> None:
    recipe = build_recipe({"model": "m"}, ["prune.target=30%", "prune.target=40%"])
    assert recipe.prune.target == "40%"


def test_an_exponent_without_a_dot_is_a_number(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, "model: m\nprune: {target: 50%}\ndistill:\n  learning_rate: 1e-4\n"))
    assert recipe.distill.learning_rate == 1e-4


BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"sed": 1}, "unknown key sed; did you mean 'seed'. Available: calibrate, data, distill"),
    "unknown inner key": ({"distill": {"token": 1}}, "unknown key distill.token; did you mean 'tokens'"),
    "nothing near": ({"data": {"xyzzy": 1}}, "unknown key data.xyzzy; Available: block_tokens, delimiter"),
    "no model": ({"model": None}, "model: Input should be a valid string"),
    "number as text": ({"distill": {"tokens": "5"}}, r"distill.tokens: .*valid integer \(got '5'\)"),
    "no unit": ({"distill": {"tokens": "5X"}}, r"distill.tokens: .*valid integer \(got '5X'\)"),
    "less than one": ({"distill": {"tokens": "0.0001K"}}, "distill.tokens: .*greater than or equal to 1"),
    "fraction": ({"distill": {"tokens": 1.5}}, "distill.tokens: .*integer"),
    "below range": ({"data": {"block_tokens": 4}}, r"data.block_tokens: .*greater than or equal to 8 \(got 4\)"),
    "above range": ({"data": {"heldout_fraction": 1.0}}, "data.heldout_fraction: .*less than 1"),
    "not a choice": (
        {"distill": {"loss": "huber"}},
        r"distill.loss: .*'forward_kl'.* or 'cross_entropy' .*got 'huber'",
    ),
    "shape size": ({"prune": {"shape": {"ffn": "8"}}}, "prune.shape.ffn: .*valid integer"),
    "betas": ({"distill": {"betas": [0.9]}}, "distill.betas.1 is missing"),
    "section is a list": ({"data": []}, "data: .*dictionary"),
    "section is empty": ({"data": None}, "data: .*dictionary"),
    "two mistakes": ({"sed": 1, "seed": -1}, "seed: .*greater than or equal to 0.*; unknown key sed"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_mistakes_are_named_by_their_path(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path, yaml.safe_dump(SMALL | changes))
    with pytest.raises(RecipeError, match=f"recipe.yaml: {message}"):
        load_recipe(path)


@pytest.mark.parametrize("missing", ["model", "prune"])
def test_what_has_no_default_must_be_given(missing: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe: {missing} is missing"):
        build_recipe({name: value for name, value in SMALL.items() if name != missing})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "write it as section.key=value"),
        ("seed=[1", "the value is not YAML"),
        ("seed=x", r"seed: .*valid integer.*\(got 'x'\)"),
        ("model.name=x", "model is not a section"),
        ("distil.tokens=5", "unknown key distil; did you mean 'distill'"),
        ("distill.token=5", "unknown key distill.token; did you mean 'tokens'"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as problem:
        build_recipe({"model": "m", "prune": {"target": "50%"}}, [override], where="recipe.yaml")
    assert str(problem.value).startswith(f"--set {override!r}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "recipe.yaml is not YAML"),
        (b"- model", "recipe.yaml must be a mapping of recipe keys"),
        (b"", "recipe.yaml must be a mapping"),
        (b"model: caf\xe9", "recipe.yaml is not UTF-8 text"),
        (b"model: !!python/object/apply:os.getcwd []", "recipe.yaml is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_says_so(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read .*nothing.yaml: No such file"):
        load_recipe(tmp_path / "nothing.yaml")


def test_a_recipe_is_frozen() -> None:
    recipe = build_recipe(dict(SMALL))
    for section, name in ((recipe, "seed"), (recipe.distill, "tokens")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)
