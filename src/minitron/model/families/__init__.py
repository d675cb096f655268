"""The tables of the families. `FAMILIES` maps the `model_type` of a config.json to a table."""

from collections.abc import Mapping
from typing import Any

from minitron.core.errors import CheckpointError, UnsupportedArchitecture
from minitron.model.architecture import Architecture
from minitron.model.families.gemma import GEMMA, GEMMA2, GEMMA3
from minitron.model.families.granite import GRANITE
from minitron.model.families.llama import LLAMA, MISTRAL
from minitron.model.families.nemotron import NEMOTRON
from minitron.model.families.olmo2 import OLMO2
from minitron.model.families.phi3 import PHI3
from minitron.model.families.qwen import QWEN2, QWEN3
from minitron.model.families.smollm3 import SMOLLM3

TABLES = (LLAMA, MISTRAL, NEMOTRON, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, SMOLLM3, OLMO2, GRANITE)
FAMILIES: dict[str, Architecture] = {table.name: table for table in TABLES}


def family_of(config: Mapping[str, Any]) -> Architecture:
    """The table for a config.json.

    Raises: UnsupportedArchitecture for a model type without a table.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("config.json has no model_type: it does not describe a Hugging Face model")
    text = config.get("text_config")
    if model_type not in FAMILIES and isinstance(text, Mapping) and text.get("model_type") in FAMILIES:
        raise CheckpointError(
            f"model_type {model_type!r} is more than a language model; its text part is a {text['model_type']} model, "
            "which is supported where it is stored on its own"
        )
    if model_type not in FAMILIES:
        raise UnsupportedArchitecture(model_type, FAMILIES)
    return FAMILIES[model_type]
