"""The hub and transformers: the directory of a model, and the config and model that transformers makes of it.

No code of a model directory is run.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from minitron.core.errors import CheckpointError
from minitron.model import attention
from minitron.model.config_json import CODE_KEYS, DTYPE_KEYS
from minitron.model.families import family_of
from minitron.model.weight_files import CARRIED

CPU = torch.device("cpu")


def transformers_config(config: Mapping[str, Any]) -> Any:
    """transformers' config for a config.json of `read_config`, with the sizes that the family's table reads.

    Raises: CheckpointError if transformers refuses the config, UnsupportedArchitecture.
    """
    from transformers import AutoConfig

    architecture = family_of(config)
    shape = architecture.shape(config)
    said = {key: value for key, value in config.items() if key not in (*CODE_KEYS, *DTYPE_KEYS)}
    said |= {key: getattr(shape, dim) for dim, key in architecture.config_keys.items()}
    said["tie_word_embeddings"] = architecture.tied(config)
    with _refusals():
        made = AutoConfig.for_model(**_copied(said))
    kinds = getattr(made, "layer_types", None) or ()
    if "sliding_attention" in kinds and made.sliding_window is None:
        raise CheckpointError(
            "config.json: sliding_window is null, but by layer_types some layers have one: give its size in tokens"
        )
    pad = getattr(made, "pad_token_id", None)
    if pad is not None and pad >= shape.vocab:
        raise CheckpointError(
            f"config.json: pad_token_id is {pad}, beyond the vocabulary of {shape.vocab}: set it to null, or to a token"
        )
    return made


def new_model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """transformers' model for a config.json, with transformers' initial weights."""
    from transformers import AutoModelForCausalLM

    made = transformers_config(config)
    with _refusals():
        model = AutoModelForCausalLM.from_config(made, dtype=dtype, trust_remote_code=False)
    attention.use_in(model)
    return model


def empty_model(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device = CPU) -> Any:
    """transformers' model for a config.json, with matrices on meta and real buffers (rotary tables, ...)."""
    with _EmptyOnMeta():
        model = new_model(config, dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval().requires_grad_(False)


def _copied(value: Any) -> Any:
    """A copy of a JSON value: transformers changes the objects that it is given."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


@contextmanager
def _refusals() -> Iterator[None]:
    """In this block, errors of transformers about a config become one line about config.json.

    Its validator raises one kind of error; wrong values that pass the validator raise many others.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (StrictDataclassError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"config.json: transformers refuses it: {said[:300]}") from None


class _EmptyOnMeta(TorchFunctionMode):
    """Allocates uninitialised memory, with which modules make their matrices, on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        changed = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **changed})


def resolve_model(model: str, revision: str | None = None, *, config_only: bool = False) -> Path:
    """The directory of a model: a local directory, or a hub id that is downloaded to the hub's cache.

    Args:
        config_only: whether only config.json is downloaded.

    Raises: CheckpointError if there is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file; give the model's directory or a hub id")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"model directory {model} does not exist")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["config.json"] if config_only else ["*.json", "*.safetensors", "README.md", *CARRIED]
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{model!r} is neither a local directory nor a hub model that can be read: {reason}"
        ) from None
