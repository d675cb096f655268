"""The files of a model directory: its weights, with the location of each tensor, and the files that are copied along.

All readers use this module, so streamed or in memory, a tensor is read from the same file.
"""

from collections.abc import Mapping
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path
from typing import Any

from minitron.core.errors import CheckpointError
from minitron.core.reading import read_json
from minitron.model.config_json import ADAPTER, CODE_KEYS, CONFIG, adapter_alone
from minitron.model.gguf_weights import GGUF_TABLE, gguf_parts, gguf_tensors
from minitron.model.weights import StoredTensor, read_header, same_values

WEIGHT_INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_PICKLES = ("*.bin", "*.pt", "*.pth")
_WEIGHTS = ("*.safetensors", WEIGHT_INDEX, GGUF_TABLE, *_PICKLES)


def has_weights(path: Path) -> bool:
    """Whether a model directory has files of weights, of any format, complete or not; dangling links count too."""
    return any(fnmatch(file.name, pattern) for file in path.iterdir() for pattern in _WEIGHTS)


def weight_files(path: Path) -> list[Path]:
    """The weight files of a model: the files of the index, the single file, or GGUF files elsewhere.

    Raises: CheckpointError if there are none, if some are missing, or if there are two different sets.
    """
    if (path / GGUF_TABLE).exists():
        return gguf_parts(path)
    return [path / name for name in _decided(path)[0]]


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model directory by its name, from the headers of the files.

    Raises: CheckpointError; also for a tensor that is stored twice with different values.
    """
    if (path / GGUF_TABLE).exists():
        return gguf_tensors(path)
    names, said = _decided(path)
    headers = {name: read_header(path / name) for name in names}
    tensors: dict[str, StoredTensor] = {}
    for name, header in headers.items():
        for tensor, stored in header.items():
            if tensor in tensors and not same_values(tensors[tensor], stored):
                raise CheckpointError(
                    f"{path} stores {tensor} twice with different values, in {tensors[tensor].file.name} and in "
                    f"{name}: keep the one that is meant"
                )
            if tensor not in tensors or said.get(tensor) == name:
                tensors[tensor] = stored
    for tensor, name in said.items():
        if tensor in tensors and tensor not in headers[name]:
            raise CheckpointError(
                f"{path / WEIGHT_INDEX} says that {tensor} lies in {name}, but it lies in {tensors[tensor].file.name}: "
                "the index is of other files; write it again, or copy the model again"
            )
    return tensors


def _decided(path: Path) -> tuple[list[str], Mapping[str, str]]:
    """The names of the weight files, and the file of each tensor by the index."""
    index, single = _is_file(path / WEIGHT_INDEX), _is_file(path / SINGLE)
    said = _read_index(path) if index else {}
    names = sorted(set(said.values()))
    there = [name for name in names if _is_file(path / name)]
    if single and names != [SINGLE]:
        if there:
            raise CheckpointError(
                f"{path} holds two models: {SINGLE}, and {WEIGHT_INDEX} with {len(there)} of its {len(names)} shards "
                f"({there[0]}, ...): remove the one that is not meant, the index with its shards or the single file"
            )
        names, said = [SINGLE], {}
    elif index and len(there) < len(names):
        missing = [name for name in names if name not in there]
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(names)} shards that {WEIGHT_INDEX} names: {', '.join(missing)}"
        )
    adapters = [name for name in (*_ADAPTERS, ADAPTER) if (path / name).exists()]
    if adapters and names:
        raise CheckpointError(
            f"{path} holds a whole model ({names[0]}) and an adapter ({adapters[0]}): merge them (peft: "
            "merge_and_unload) and save the result, or remove the adapter's files"
        )
    if not names:
        raise CheckpointError(_nothing(path))
    return names, said


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path / WEIGHT_INDEX, CheckpointError, keys_once=True)
    said = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(said, dict) or not said or not all(isinstance(name, str) for name in said.values()):
        raise CheckpointError(
            f"{path / WEIGHT_INDEX} is not a safetensors index: it has no weight_map of tensors and files"
        )
    for name in said.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path / WEIGHT_INDEX} names {name!r}: a shard is a .safetensors file in the model's own directory"
            )
    return said


def _is_file(file: Path) -> bool:
    """Whether a file exists.

    Raises: CheckpointError if it is no file, or a dangling link.
    """
    if file.is_symlink() and not file.exists():
        raise CheckpointError(
            f"{file} is a link to {file.readlink()}, which does not exist: download or copy the model again"
        )
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file} is not a file, so it holds no weights")
    return file.is_file()


def _nothing(path: Path) -> str:
    """The message about a directory without readable weights."""
    if (path / ADAPTER).is_file():
        return adapter_alone(path)
    others = sorted(path.glob("*.safetensors"))
    if others:
        return (
            f"{path} has no weights that can be told: neither {SINGLE} nor {WEIGHT_INDEX}, but {others[0].name}"
            f"{' and others' if len(others) > 1 else ''}: shards need their index, and a model in another format must "
            "be converted to Hugging Face's"
        )
    pickles = [file for pattern in _PICKLES for file in path.glob(pattern)]
    if pickles:
        return (
            f"{path} has only pickled weights ({pickles[0].name}), which can run code when loaded: "
            "convert them to safetensors with a tool you trust, then try again"
        )
    return f"{path} has no weights: neither {SINGLE} nor {WEIGHT_INDEX}"


GENERATION = "generation_config.json"


# The files that are copied along with the weights: tokenizer, chat template, generation config, licence.
CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "tekken.json", "chat_template*", GENERATION, "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


# Carried files with tables of tokens, in which no key names code; they are checked when the tokenizer is loaded.
LARGE_TABLES = ("tokenizer.json", "vocab.json", "tekken.json", "added_tokens.json")


def without_code(file: Path) -> Any:
    """The content of a carried JSON file without the keys that name code; None if the file is copied as it is.

    Raises: CheckpointError for a .json file without JSON, and for a generation_config.json that is no object.
    """
    if file.suffix != ".json" or file.name in LARGE_TABLES:
        return None
    said = read_json(file, CheckpointError)
    if file.name == GENERATION and not isinstance(said, dict):
        raise CheckpointError(f"{file} must be a JSON object: transformers would not load the model; remove the file")
    code = [key for key in CODE_KEYS if key in said] if isinstance(said, dict) else []
    return {key: value for key, value in said.items() if key not in code} if code else None


def model_files(path: Path) -> list[Path]:
    """The files that define a model: config, weights, and the carried files, but no README and no records."""
    weights = weight_files(path)
    single = [file.name for file in weights] == [SINGLE] or (path / GGUF_TABLE).exists()
    index = [] if single else [path / WEIGHT_INDEX]
    return [path / CONFIG, *weights, *index, *carried_files(path)]


def carried_files(path: Path) -> list[Path]:
    """The files of a directory that are copied along with its weights, except for Python files.

    Raises: CheckpointError for a dangling link, as the copy would lack the file.
    """
    named = (file for file in path.iterdir() if any(fnmatchcase(file.name, pattern) for pattern in CARRIED))
    found = sorted(file for file in named if file.suffix != ".py" and not file.is_dir())
    for file in found:
        if not file.exists():
            raise CheckpointError(
                f"{file} is a link to {file.readlink()}, which does not exist: download or copy the model again"
            )
    return found
