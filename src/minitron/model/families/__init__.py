"""The families, one table each. `FAMILIES` maps the `model_type` of a config.json to its table."""

from collections.abc import Mapping
from typing import Any

from minitron.errors import CheckpointError, UnsupportedArchitecture
from minitron.model.architecture import Architecture
from minitron.model.families.llama import LLAMA, MISTRAL

FAMILIES: dict[str, Architecture] = {"llama": LLAMA, "mistral": MISTRAL}


def family_of(config: Mapping[str, Any]) -> Architecture:
    """The table for a config.json.

    Raises: UnsupportedArchitecture for a model type without one.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("config.json has no model_type: it does not describe a Hugging Face model")
    if model_type not in FAMILIES:
        raise UnsupportedArchitecture(model_type, FAMILIES)
    return FAMILIES[model_type]
