"""A GGUF file given as a model: the directory that is made of it once, and is then read like any model directory.

It holds a config.json, the tokenizer, the licence and origin that the file states as a model card, and a table of
tensors. It holds no weights: these are read from the GGUF file, and dequantized as they are read. It lies in the user's
cache, or in the directory that MINITRON_CACHE names.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from minitron.core.errors import GgufError, MinitronError, RunError
from minitron.core.files import readable_os_errors, scratch_directory
from minitron.core.reading import Json
from minitron.gguf.config import require_gguf
from minitron.gguf.reader import GgufFile, is_gguf, parts_beside, read_gguf, require_readable
from minitron.model.architecture import Architecture
from minitron.model.checkpoint import open_checkpoint
from minitron.model.config_json import CONFIG
from minitron.model.gguf_weights import GGUF_TABLE, GgufEntry, GgufPart, GgufTable, can_dequantize
from minitron.model.hub import resolve_model
from minitron.model.naming import model_name
from minitron.model.tokenizer import load_tokenizer
from minitron.model.weight_files import GENERATION

CACHE_VARIABLE = "MINITRON_CACHE"
_LAYOUT = 2  # of the directories: those of another number are made again
_HEADER_BYTES = 1 << 20  # of each file, in the name of its directory
_NO_VOCABULARY = ("no_vocab", "none")
_SEVERAL = 5  # tensors named in an error


def model_directory(model: str, revision: str | None = None, *, config_only: bool = False) -> Path:
    """The directory of a model: as `resolve_model`, or for a GGUF file the directory that is made of it.

    Raises: GgufError for a file that cannot be read as a checkpoint, with the reason; CheckpointError.
    """
    if not is_gguf(model):
        return resolve_model(model, revision, config_only=config_only)
    if revision is not None:
        raise GgufError(f"--revision {revision} is of a hub id, and {model} is a file: leave it out")
    require_gguf()
    file = Path(os.path.abspath(Path(model).expanduser()))  # not resolved: links of parts have the names of parts
    place = _cache() / _key(file) / model_name(file)
    if not (place / CONFIG).exists():
        with readable_os_errors(place, way_out=f"set {CACHE_VARIABLE} to another directory"):
            _cache().mkdir(parents=True, exist_ok=True)
            with scratch_directory(_cache(), prefix=".making-") as scratch:
                _make(read_gguf(file, joined=True), scratch / "model")
                try:
                    place.parent.mkdir(exist_ok=True)
                    (scratch / "model").rename(place)
                except OSError:
                    if not (place / CONFIG).exists():  # else another process was faster
                        raise
    return place


def _cache() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    if named is not None:
        if not named:
            raise RunError(f"{CACHE_VARIABLE} is empty: set it to a directory, or leave it out")
        return Path(named).expanduser() / "gguf"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitron" / "gguf"


def _key(file: Path) -> str:
    """A name that changes with a file and with the parts beside it: by paths, sizes, times of change and first bytes.

    Raises: GgufError if the file cannot be read.
    """
    require_readable(file)
    digest = hashlib.sha256(f"{_LAYOUT}".encode())
    for part in filter(Path.exists, parts_beside(file)):
        status = part.stat()
        digest.update(os.fsencode(part) + f"\0{status.st_size} {status.st_mtime_ns}\n".encode())
        with part.open("rb") as data:
            digest.update(data.read(_HEADER_BYTES))
    return digest.hexdigest()[:16]


def _make(model: GgufFile, out: Path) -> None:
    """Fill a directory, and read it back as any reader will.

    Raises: GgufError for whatever any reader would refuse.
    """
    from minitron.gguf.file_config import config_of_file
    from minitron.gguf.metadata import CARD, card_of
    from minitron.gguf.tokenizer import file_tokenizer

    out.mkdir()
    try:
        architecture, config = config_of_file(model)
        table = _table(model, architecture, config)
        _write(out / CONFIG, config | {"architectures": [_class_of(architecture)], "dtype": table.dtype})
        _write(out / GGUF_TABLE, table.model_dump())
        _write(out / GENERATION, _generation(model.said))
        if card := card_of(model.said):
            (out / CARD).write_text(f"---\n{yaml.safe_dump(card, allow_unicode=True)}---\n", encoding="utf-8")
        has_vocabulary = model.said.get("tokenizer.ggml.model", "no_vocab") not in _NO_VOCABULARY
        if has_vocabulary:
            file_tokenizer(model.path, model.said).save_pretrained(out)
        open_checkpoint(out)
        if has_vocabulary:
            load_tokenizer(out)
    except MinitronError as error:
        said = str(error).replace(f"{out}/", "").replace(str(out), str(model.path)).removeprefix(f"{CONFIG}: ")
        raise GgufError(said if str(model.path) in said else f"{model.path}: {said}") from None


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def _class_of(architecture: Architecture) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture.name])


def _generation(said: Mapping[str, Any]) -> Json:
    """The tokens that end a text, EOS and the end of a turn in a chat, and the settings of sampling."""
    from minitron.gguf.metadata import sampling_of

    ends = [said[key] for role in ("eos", "eot") if (key := f"tokenizer.ggml.{role}_token_id") in said]
    first = said.get("tokenizer.ggml.bos_token_id")
    return (
        ({"bos_token_id": first} if first is not None else {})
        | {"eos_token_id": list(dict.fromkeys(ends)) or None}
        | sampling_of(said)
    )


def _table(model: GgufFile, architecture: Architecture, config: Json) -> GgufTable:
    """The place of every tensor of the family's table.

    Raises: GgufError for tensors that are missing, that nobody knows, or that are of another shape or type.
    """
    from minitron.gguf.file import names_of
    from minitron.gguf.file_config import HEAD, ROPE_TENSORS

    shape, table = architecture.shape(config), architecture.gguf
    assert table is not None
    found = {tensor.name: (number, tensor) for number, part in enumerate(model.parts.values()) for tensor in part}
    specs = dict(names_of(architecture, config, shape.layers))
    missing = [name for name in specs.values() if name not in found]
    if missing:
        raise GgufError(f"{model.path} lacks {len(missing)} tensors of a {architecture.name} model: {_some(missing)}")
    strange = [name for name in found if name not in {*specs.values(), *ROPE_TENSORS, HEAD}]
    if strange:
        raise GgufError(
            f"{model.path} has {len(strange)} tensors that no {architecture.name} model has here: {_some(strange)}"
        )
    tensors: dict[str, GgufEntry] = {}
    for spec, name in specs.items():
        number, tensor = found[name]
        kind = tensor.kind.name
        if tensor.shape != spec.shape(shape):
            raise GgufError(
                f"{model.path} is damaged: its {name} is {list(tensor.shape)}, but by its keys it must be "
                f"{list(spec.shape(shape))}"
            )
        if not can_dequantize(kind):
            raise GgufError(f"{model.path}: its {name} is stored as {kind}, which the gguf package cannot dequantize")
        tensors[spec.name] = GgufEntry(
            part=number,
            name=name,
            type=kind,
            shape=list(tensor.shape),
            offset=tensor.offset,
            pair_rows=shape.head_dim if table.in_heads(name) else 0,
            added=architecture.norm_gain_offset if spec.name.endswith("norm.weight") else 0.0,
        )
    whole = all(entry.type == "F32" for entry in tensors.values())
    parts = [_part(file) for file in model.parts]
    return GgufTable(dtype="float32" if whole else "bfloat16", parts=parts, tensors=tensors)


def _part(file: Path) -> GgufPart:
    status = file.stat()
    return GgufPart(path=str(file), num_bytes=status.st_size, mtime_ns=status.st_mtime_ns)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SEVERAL]) + (", ..." if len(names) > _SEVERAL else "")
