"""A GGUF file of any model: its keys and tensors, and an error in one line for a file that is no language model."""

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.core.errors import GgufError
from minitron.core.text import both
from minitron.gguf.config import require_gguf

if TYPE_CHECKING:
    from minitron.gguf.parse import FileTensor

# The keys of a GGUF file: name -> string, bool, int (32 bits), float (32 bits), or a list of one of these.
Keys = dict[str, Any]
SUFFIX, MAGIC = ".gguf", b"GGUF"
VERSIONS = (2, 3)
# general.type of a file that is no model -> the words for it in an error.
_OTHER_KINDS = {
    "adapter": "a LoRA adapter, which llama.cpp adds to a model's own file; merge it into the checkpoint instead",
    "mmproj": "the image or sound encoder of a model; give the file of the language model",
    "imatrix": "an importance matrix, which `minitron quantize --imatrix` takes",
    "vocab": "a tokenizer without weights",
}
# Keys that are read here -> the types of their values; some families state a size for each layer.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "split.count": int,
    "split.no": int,
    "{family}.vocab_size": int,
    "{family}.context_length": int,
    **dict.fromkeys(("{family}.block_count", "{family}.embedding_length", "{family}.attention.key_length"), int),
    **dict.fromkeys(("{family}.feed_forward_length", "{family}.attention.head_count"), (int, list)),
    "{family}.attention.head_count_kv": (int, list),
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.chat_template": str,
    **dict.fromkeys((f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges", "scores")), list),
    **dict.fromkeys((f"tokenizer.ggml.{role}_token_id" for role in ("bos", "eos", "eot", "padding", "unknown")), int),
}
_ENCODERS = ("bert", "nomic-bert", "jina-bert", "modern-bert", "neo-bert", "t5encoder", "eurobert", "clip")


@dataclass(frozen=True)
class GgufFile:
    """A readable GGUF file of a model, or several that are its parts.

    path: as it was given.
    said: key -> value.
    parts: file -> its tensors.
    """

    path: Path
    said: Keys
    parts: "Mapping[Path, list[FileTensor]]"

    @property
    def tensors(self) -> "list[FileTensor]":
        return [tensor for tensors in self.parts.values() for tensor in tensors]

    @property
    def family(self) -> str:
        return self.said["general.architecture"]

    def of_family(self, key: str) -> Any:
        """The value of a key that follows the family's name, or None."""
        return self.said.get(f"{self.family}.{key}")

    @property
    def vocab(self) -> int:
        """The number of tokens that the model has logits for."""
        return self.of_family("vocab_size") or len(self.said.get("tokenizer.ggml.tokens", ()))

    @property
    def context(self) -> int | None:
        return self.of_family("context_length")


def is_gguf(model: str) -> bool:
    """Whether MODEL is a GGUF file and no directory, by its name or its first bytes."""
    path = Path(model)
    if path.is_dir():
        return False
    return path.suffix.lower() == SUFFIX or (path.is_file() and _begins(path, 4) == MAGIC)


def read_gguf(file: Path, *, joined: bool = False) -> GgufFile:
    """Read the keys and the list of tensors of a model's GGUF file.

    Args:
        joined: whether all parts of a model are read, where the file is one of several; else such a file is refused.

    Raises: GgufError for a file that is not GGUF, is damaged, or is no model, and for a part that is missing.
    """
    said, tensors = _read(file)
    count = said.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        parts = {file: tensors}
    elif joined:
        first, *others = _names_of_parts(file, count)
        said, tensors = _read(first)
        parts = {first: tensors} | {other: _read(other)[1] for other in others}
    else:
        raise GgufError(
            f"{file} is one of {count} parts of a model: join them with llama.cpp's `llama-gguf-split --merge`, and "
            "give the whole file"
        )
    model = GgufFile(file, said, parts)
    _require_model(model)
    return model


def _read(file: Path) -> tuple[Keys, "list[FileTensor]"]:
    """The keys and tensors of one file."""
    require_gguf()
    from minitron.gguf.parse import parse

    require_readable(file)
    try:
        return parse(file)
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise GgufError(f"{file} is damaged or cut short: {error}") from None


def parts_beside(file: Path) -> list[Path]:
    """The files that have the name of a part of the same model, or the file alone; they need not exist."""
    end = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", file.name, re.IGNORECASE)
    if end is None:
        return [file]
    return [file.with_name(f"{end[1]}-{number:05d}-of-{end[2]}.gguf") for number in range(1, int(end[2]) + 1)]


def _names_of_parts(file: Path, count: int) -> list[Path]:
    """The files of all parts, of which one is given.

    Raises: GgufError if the file has no name of a part, or if a part is missing.
    """
    parts = parts_beside(file)
    if len(parts) != count:
        raise GgufError(
            f"{file} is one of {count} parts of a model, but has not the name of one (name-00001-of-{count:05d}.gguf): "
            "give the parts the names that they were made with"
        )
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise GgufError(
            f"{file} is one of {count} parts of a model, and beside it {both(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: download all parts"
        )
    return parts


def _require_model(model: GgufFile) -> None:
    file, said = model.path, model.said
    family = said.get("general.architecture")
    if other := _OTHER_KINDS.get(str(said.get("general.type"))):
        raise GgufError(f"{file} is {other}")
    if not isinstance(family, str) or not family:
        raise GgufError(f"{file} is no GGUF file of a model: it does not say general.architecture")
    for key, kind in _KINDS.items():
        value = said.get(key.format(family=family))
        if value is not None and not isinstance(value, kind):
            raise GgufError(f"{file} is damaged: its {key.format(family=family)} is {value!r}")
    if not any(tensor.count for tensor in model.tensors):
        raise GgufError(f"{file} holds no weights: it is no model")


def require_language_model(model: GgufFile) -> None:
    """Raises: GgufError for a model that does not predict the next token, or a file without a tokenizer."""
    if model.family in _ENCODERS or model.of_family("attention.causal") is False:
        raise GgufError(f"{model.path} is a {model.family} model, which reads text and does not continue it")
    if model.said.get("tokenizer.ggml.model", "no_vocab") in ("no_vocab", "none"):
        raise GgufError(f"{model.path} has no tokenizer, so it reads no text: write it from a model that has one")


def require_readable(file: Path) -> None:
    if not file.exists():
        raise GgufError(f"{file} does not exist")
    if not file.is_file():
        raise GgufError(f"{file} is no file")
    start = _begins(file, 24)
    if start[:4] != MAGIC:
        raise GgufError(f"{file} is no GGUF file: it begins with {start[:4]!r} and not with {MAGIC!r}")
    if len(start) < 24:
        raise GgufError(f"{file} is damaged or cut short: it has {len(start)} bytes")
    version, tensors, keys = struct.unpack("<IQQ", start[4:])
    if version not in VERSIONS:
        if struct.unpack(">I", start[4:8])[0] in VERSIONS:
            raise GgufError(
                f"{file} is of big-endian byte order, for other machines: convert it with `gguf-convert-endian`"
            )
        raise GgufError(
            f"{file} is a GGUF file of version {version}, and llama.cpp reads {' and '.join(map(str, VERSIONS))}: "
            "write it again from its checkpoint"
        )
    # Each key and tensor takes at least a name's length and some numbers.
    if 24 * tensors + 12 * keys > file.stat().st_size:
        raise GgufError(f"{file} is damaged or cut short: it says {keys:,} keys and {tensors:,} tensors")


def _begins(file: Path, count: int) -> bytes:
    try:
        with file.open("rb") as data:
            return data.read(count)
    except OSError as problem:
        raise GgufError(f"cannot read {file}: {problem.strerror}") from None


@dataclass(frozen=True)
class GgufFacts:
    """The keys and sizes of a GGUF file.

    shape: dim -> its size, or a size for each layer; None where the file does not state it.
    types: type of tensors -> the number of their weights, most weights first.
    keys: every key but the long lists of the tokenizer.
    prunable: the dims that can be cut; none where the file cannot be read as a checkpoint.
    obstacle: the reason for that.
    """

    family: str
    shape: Mapping[str, int | list[int] | None]
    bytes: int
    bits_per_weight: float
    types: Mapping[str, int]
    keys: Keys
    prunable: Sequence[str] = ()
    obstacle: str | None = None

    @property
    def weights(self) -> int:
        return sum(self.types.values())

    @property
    def context(self) -> int | None:
        context = self.shape["context"]
        assert not isinstance(context, list)
        return context

    def to_dict(self) -> dict[str, object]:
        """The facts as `minitron inspect --json` prints them."""
        counts = {"parameters": {"total": self.weights}}
        return {"family": self.family, "shape": self.shape, **counts, **vars(self)}


def inspect_gguf(file: Path) -> GgufFacts:
    """Read the facts of a GGUF file, or of all parts of a model, without weights.

    Raises: GgufError for a file that is no model in GGUF format.
    """
    model = read_gguf(file, joined=True)
    types: dict[str, int] = {}
    for tensor in model.tensors:
        kind = tensor.kind.name
        types[kind] = types.get(kind, 0) + tensor.count
    names = {
        "layers": "block_count",
        "hidden": "embedding_length",
        "ffn": "feed_forward_length",
        "heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "vocab": "vocab_size",
        "context": "context_length",
    }
    long = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
    return GgufFacts(
        family=model.family,
        shape={dim: model.of_family(key) for dim, key in names.items()},
        bytes=sum(part.stat().st_size for part in model.parts),
        bits_per_weight=8 * sum(tensor.num_bytes for tensor in model.tensors) / sum(types.values()),
        types=dict(sorted(types.items(), key=lambda item: -item[1])),
        keys={name: value for name, value in model.said.items() if name not in long},
    )
