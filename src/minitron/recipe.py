"""A recipe holds every setting that changes a number, a section for each package; it loads strictly."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from pydantic import Field, ValidationError

from minitron.calibration.statistics import CalibrateConfig
from minitron.core.config import Section, UserPath
from minitron.core.errors import RecipeError, did_you_mean
from minitron.core.reading import Json
from minitron.core.typed_files import key_of, parse_yaml, read_yaml, short
from minitron.data.config import DataConfig
from minitron.distillation.config import DistillConfig
from minitron.evaluation.quality import EvaluateConfig
from minitron.gguf.config import QuantizeConfig
from minitron.pruning.config import PruneConfig
from minitron.pruning.repair import RepairConfig
from minitron.shapes.space import SearchConfig

# Complete recipes of the demo and of the published models, by name.
SHIPPED = Path(__file__).parent / "recipes"
DEMO_TEACHER = Path(__file__).parent / "assets" / "demo-teacher"


class Recipe(Section):
    model: UserPath
    """The teacher: a local directory, a Hugging Face hub id, or a GGUF file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order, of random weights and of text sampled from the teacher."""
    scratch_baseline: bool = False
    """Also train the student's shape from random weights on the same tokens, as a row to compare with."""
    data: DataConfig = DataConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
    prune: PruneConfig
    search: SearchConfig = SearchConfig()
    repair: RepairConfig = RepairConfig()
    distill: DistillConfig = DistillConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gguf: QuantizeConfig = QuantizeConfig()

    @property
    def searches(self) -> bool:
        """Whether the shape is searched for, and not given as sizes."""
        return self.prune.shape is None and self.prune.drop_layers is None and self.prune.keep_layers is None


SectionKind = TypeVar("SectionKind", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4 for text and `off` for false; here they are a number and text, as in YAML 1.2.

    A key that is there twice is an error: of two values one would not be read.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for number, name in enumerate(names) if name in names[:number]]:
            raise yaml.YAMLError(f"in the mapping at line {node.start_mark.line + 1}, key {twice[0]!r} is there twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:[tT]rue|TRUE|[fF]alse|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def find_recipe(name: str) -> Path:
    """Find the file of that name, or the recipe that comes with minitron under that name.

    Raises: RecipeError if there is neither.
    """
    for path in (Path(name).expanduser(), SHIPPED / f"{name}.yaml"):
        if path.exists():
            return path
    known = [file.stem for file in SHIPPED.glob("*.yaml")]
    raise RecipeError(
        f"there is no recipe file {name}, and none comes with minitron under that name{did_you_mean(name, known)}"
    )


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `--set` overrides such as `distill.tokens=2000000`.

    Raises: RecipeError naming the path of every key that is unknown or has a bad value.
    """
    raw = read_yaml(path, _Loader, RecipeError)
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} must be a mapping of recipe keys")
    if path.parent == SHIPPED and str(raw.get("model")).startswith("../"):  # a model that comes with minitron too
        raw["model"] = str((SHIPPED / raw["model"]).resolve())
    return build_recipe(raw, overrides, where=str(path))


def demo_recipe(overrides: Iterable[str] = ()) -> Recipe:
    """Load the recipe of the demo, which halves a small Llama that writes Python.

    Raises: RecipeError for a bad override.
    """
    return load_recipe(SHIPPED / "demo.yaml", overrides)


def build_recipe(raw: Json, overrides: Iterable[str] = (), *, where: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe, after overrides.

    Raises: RecipeError.
    """
    return _build(Recipe, raw, overrides, where=where)


def build_asked(values: Mapping[str, Any], overrides: Iterable[str], spelled: Mapping[str, str]) -> Recipe:
    """Make the recipe of a command that reads some sections of one: keys and their values, then overrides.

    Args:
        values: such as {"distill.tokens": 1000}; keys of other sections have their defaults.
        spelled: key -> the option that sets it.

    Raises: RecipeError.
    """
    raw: Json = {"prune": {}}
    for key, value in values.items():
        *sections, name = key.split(".")
        _section_at(raw, sections)[name] = value
    return _build(Recipe, raw, overrides, where="--set", spelled=spelled)


def _section_at(raw: Json, sections: Sequence[str]) -> Json:
    for section in sections:
        raw = raw.setdefault(section, {})
    return raw


def dump_recipe(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _build(
    kind: type[SectionKind],
    raw: Json,
    overrides: Iterable[str],
    *,
    where: str,
    spelled: Mapping[str, str] = MappingProxyType({}),
) -> SectionKind:
    """Validate a mapping as a section, after overrides.

    Args:
        where: the source that an error names if no override caused it.
        spelled: key -> the option that an error names instead of it.
    """
    raw, overrides = copy.deepcopy(raw), list(overrides)
    for override in overrides:
        _apply(raw, override)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for one in error.errors():
            if (key := ".".join(map(str, one["loc"][:2]))) in spelled:
                found.setdefault(spelled[key], []).append(f"{one['msg']} (got {one['input']!r})")
                continue
            found.setdefault(_said_by(one, overrides) or where, []).append(_explain(one, kind))
        raise RecipeError("; ".join(f"{source}: {'; '.join(reasons)}" for source, reasons in found.items())) from None


def _said_by(error: Any, overrides: list[str]) -> str | None:
    """Return the last of the overrides that set the value of an error."""
    place = [str(part) for part in error["loc"]]
    for override in reversed(overrides):
        path = override.partition("=")[0].split(".")
        if all(one == other for one, other in zip(path, place, strict=False)):
            return f"--set {override!r}"
    return None


def _apply(raw: Json, override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator:
        raise RecipeError(f"--set {override!r}: write it as section.key=value")
    value = parse_yaml(text, f"--set {override!r}: the value", _Loader, RecipeError)
    *sections, key = path.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise RecipeError(f"--set {override!r}: {section} is not a section")
    raw[key] = value


def _explain(error: Any, kind: type[Section]) -> str:
    path = key_of(error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {path}{did_you_mean(str(error['loc'][-1]), _keys_at(kind, error['loc'][:-1]))}"
    return (
        f"{path}: {error['msg']} (got {short(error['input'])})" if error["type"] != "missing" else f"{path} is missing"
    )


def _keys_at(kind: type[Section], path: tuple[Any, ...]) -> list[str]:
    section: Any = kind
    for name in path:
        section = section.model_fields[name].annotation
    return list(section.model_fields)
