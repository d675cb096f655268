"""The name of a model in file names and in files, which does not depend on its location."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST_BYTES = 160  # of a name, so that it is still a file name with a suffix
# The end of a GGUF file's name: its type and the number of its part.
_OF_FILE = re.compile(r"([-._](I?Q\d\w*|TQ\d_\d|MXFP4\w*|BF16|F16|F32))?(-\d{5}-of-\d{5})?$", re.IGNORECASE)
RUN_MODELS = ("student", "pruned", "scratch", "corrected")  # directories of a run that hold a model


def model_name(model: str | Path) -> str:
    """The name of a directory or hub id, with letters, digits, dots, hyphens and underscores only.

    The name of a hub id, or of a snapshot in the hub's cache, is its last part. The name of a run's student consists of
    the teacher's name and the target; the run's other models add the name of their directory. A GGUF file's is without
    the suffix, the number of the part and the type, as files of a student have types of their own.
    """
    path = Path(os.path.abspath(Path(model).expanduser()))  # not resolved: a link keeps its name
    cached = path.parent.parent.name
    if path.parent.name == "snapshots" and cached.startswith("models--"):
        return _clean(cached.split("--")[-1])
    if path.name in RUN_MODELS and (recipe := _recipe(path.parent)) is not None:
        source, target = str(recipe["model"]), (recipe.get("prune") or {}).get("target")
        own = source if Path(source).name not in ("", "..") else path.parent
        name = model_name(own) if path.name == "corrected" else run_name(own, target)
        return name if path.name == "student" else f"{name}-{path.name}"
    whole = path.name.removesuffix(".gguf")
    return _clean(whole if whole == path.name else _OF_FILE.sub("", whole) or whole)


def run_name(model: str | Path, target: str | None) -> str:
    """The name of the student that a run makes of a model."""
    return _clean(f"{model_name(model)}-{target or 'small'}".replace("%", "pct"))


def _clean(name: str) -> str:
    name = re.sub(r"[^\w.+-]+", "-", name).strip("-.")
    return name.encode()[:MOST_BYTES].decode(errors="ignore").strip("-.") or "model"


def _recipe(run: Path) -> Mapping[str, Any] | None:
    """The resolved recipe of a run directory; None if it is no run directory."""
    import yaml

    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    named = isinstance(recipe, Mapping) and isinstance(recipe.get("model"), str)
    return recipe if named and isinstance(recipe.get("prune") or {}, Mapping) else None
