"""What a GGUF file says of its model besides how to compute it: names, size, licence, origin and sampling.

The keys and the reading of names and model cards are those of the gguf package, which llama.cpp's converter has too.
Two things differ. The size is that of the weights, also where a name states one: a student is called after its
teacher. And the name is given, because the directories of a run and of the hub's cache are not called after the model.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import yaml

from minitron.model.checkpoint import Checkpoint

CARD = "README.md"
# Field of the package's Metadata -> key of generation_config.json, and the types that its value can have.
_SAMPLING: dict[str, tuple[str, tuple[type, ...]]] = {
    "sampling_top_k": ("top_k", (int,)),
    "sampling_top_p": ("top_p", (int, float)),
    "sampling_min_p": ("min_p", (int, float)),
    "sampling_temp": ("temperature", (int, float)),
    "sampling_penalty_repeat": ("repetition_penalty", (int, float)),
}
# Key of a GGUF file -> key of a model card.
_OF_CARD = {
    gguf.Keys.General.LICENSE: "license",
    gguf.Keys.General.LICENSE_NAME: "license_name",
    gguf.Keys.General.LICENSE_LINK: "license_link",
    gguf.Keys.General.LANGUAGES: "language",
    gguf.Keys.General.TAGS: "tags",
}
_HUB = "https://huggingface.co/"
_MOST_BASES = 64  # that are read of a file
_MOST = 1 << 31  # which a file's numbers of 32 bits are below
# Fields of Metadata that are lists; a model card may state several licences.
_LISTS = ("base_models", "datasets", "tags", "languages", "license")


def metadata_of(
    checkpoint: Checkpoint, name: str, card: Mapping[str, Any] | None = None
) -> tuple[gguf.Metadata, list[str]]:
    """What a file says of its model, and notes for the user.

    Args:
        name: of the model.
        card: the metadata of its model card; default what the card in its directory has.
    """
    notes: list[str] = []
    if card is None:
        card, notes = read_card(checkpoint.path)
    total = checkpoint.parameters.total
    found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(name=name), _texts(card), total_params=total)
    for field in vars(found):
        if not _fits(field, getattr(found, field)):
            setattr(found, field, None)
    # The sign chooses the package's rule for adapters, which like students have fewer parameters than the size in their
    # name says: only a number below an eighth of the parameters is a length of context.
    _, _, basename, finetune, version, _ = gguf.Metadata.get_model_id_components(name, -total)
    found.basename = found.basename or basename
    found.finetune = found.finetune or finetune
    found.version = found.version or version
    found.size_label = gguf.size_label(total, 0, 0, 0)
    for field, value in _sampling(checkpoint.path).items():
        setattr(found, field, value)
    return found, notes


def read_card(path: Path) -> tuple[Mapping[str, Any], list[str]]:
    """The metadata of the model card in a directory, empty without one, and a note where it cannot be read."""
    try:
        return gguf.Metadata.load_model_card(path), []
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        note = f"the metadata of the model card {path / CARD} cannot be read: a file says nothing of licence and origin"
        return {}, [note]


def card_of(said: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """The metadata of a model card that a file's keys state: licence, languages, tags and base models on the hub."""
    found = {name: said[key] for key, name in _OF_CARD.items() if key in said}
    count = said.get(gguf.Keys.General.BASE_MODEL_COUNT)
    urls = [said.get(gguf.Keys.General.BASE_MODEL_REPO_URL.format(id=number)) for number in range(_count(count))]
    if names := [url.removeprefix(_HUB) for url in urls if isinstance(url, str) and url.startswith(_HUB)]:
        found["base_model"] = names
    return _texts(found)


def sampling_of(said: Mapping[str, Any]) -> dict[str, int | float]:
    """The settings of generation_config.json that a file recommends, with `do_sample` where there are any.

    Numbers with a fraction have 7 digits, as many as the file's have.
    """
    keys = {getattr(gguf.Keys.General, field.upper()): one for field, one in _SAMPLING.items()}
    stated = {name: said[key] for key, (name, kinds) in keys.items() if type(said.get(key)) in kinds}
    found = {name: value for name, value in stated.items() if math.isfinite(value)}
    rounded = {name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in found.items()}
    return rounded | ({"do_sample": True} if rounded else {})


def _count(value: Any) -> int:
    return min(value, _MOST_BASES) if type(value) is int else 0


def _texts(card: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """A card's texts and lists of texts; YAML takes some of them for numbers or dates."""
    found: dict[str, str | list[str]] = {}
    for key, value in card.items():
        items = [_text(item) for item in (value if isinstance(value, list) else [value]) if _is_plain(item)]
        if items:
            found[str(key)] = items if isinstance(value, list) else items[0]
    return found


def _is_plain(value: Any) -> bool:
    return value is not None and not isinstance(value, list | dict | set | bytes)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"  # the language, which YAML takes for a denial
    return str(value).encode("utf-8", "replace").decode()


def _fits(field: str, value: Any) -> bool:
    """Whether a file can say this of a model: not a list where there is one value, and no empty list."""
    return not isinstance(value, list) or (field in _LISTS and bool(value))


def _sampling(path: Path) -> dict[str, int | float]:
    """The settings of sampling that a checkpoint recommends, which llama.cpp takes where its user names none."""
    stated = gguf.Metadata.load_generation_config(path)
    found = {field: stated[key] for field, (key, kinds) in _SAMPLING.items() if type(stated.get(key)) in kinds}
    return {field: value for field, value in found.items() if abs(value) < _MOST}
