"""A GGUF file of any model: its keys and tensors, and an error in one line for a file that is no language model."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.core.errors import GgufError
from minitron.gguf.config import require_gguf

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
    **dict.fromkeys((f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges", "scores")), list),
    **dict.fromkeys((f"tokenizer.ggml.{role}_token_id" for role in ("bos", "eos", "padding", "unknown")), int),
}
_ENCODERS = ("bert", "nomic-bert", "jina-bert", "modern-bert", "neo-bert", "t5encoder", "eurobert", "clip")


@dataclass(frozen=True)
class GgufFile:
    """A readable GGUF file of a model.

    said: key -> value.
    tensors: as the gguf package reads them.
    """

    path: Path
    said: Keys
    tensors: list[Any]

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


def read_gguf(file: Path) -> GgufFile:
    """Read the keys and the list of tensors of a model's GGUF file.

    Raises: GgufError for a file that is not GGUF, is damaged, or is no model.
    """
    require_gguf()
    import gguf

    _require_readable(file)
    try:
        reader = gguf.GGUFReader(file)
        said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    except (OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        raise GgufError(f"{file} is damaged or cut short: {error}") from None
    family = said.get("general.architecture")
    if other := _OTHER_KINDS.get(str(said.get("general.type"))):
        raise GgufError(f"{file} is {other}")
    if not isinstance(family, str) or not family:
        raise GgufError(f"{file} is no GGUF file of a model: it does not say general.architecture")
    for key, kind in _KINDS.items():
        value = said.get(key.format(family=family))
        if value is not None and not isinstance(value, kind):
            raise GgufError(f"{file} is damaged: its {key.format(family=family)} is {value!r}")
    if said.get("split.count", 0) > 1:
        raise GgufError(
            f"{file} is part {said.get('split.no', 0) + 1} of {said['split.count']} of a model: join them with "
            "llama.cpp's `llama-gguf-split --merge`, and give the whole file"
        )
    if not any(tensor.n_elements for tensor in reader.tensors):
        raise GgufError(f"{file} holds no weights: it is no model")
    return GgufFile(file, said, reader.tensors)


def require_language_model(model: GgufFile) -> None:
    """Raises: GgufError for a model that does not predict the next token, or a file without a tokenizer."""
    if model.family in _ENCODERS or model.of_family("attention.causal") is False:
        raise GgufError(f"{model.path} is a {model.family} model, which reads text and does not continue it")
    if model.said.get("tokenizer.ggml.model", "no_vocab") in ("no_vocab", "none"):
        raise GgufError(f"{model.path} has no tokenizer, so it reads no text: write it from a model that has one")


def _require_readable(file: Path) -> None:
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
    """

    family: str
    shape: Mapping[str, int | list[int] | None]
    bytes: int
    bits_per_weight: float
    types: Mapping[str, int]
    keys: Keys

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
    """Read the facts of a GGUF file, without its weights.

    Raises: GgufError for a file that is no model in GGUF format.
    """
    model = read_gguf(file)
    types: dict[str, int] = {}
    for tensor in model.tensors:
        kind = tensor.tensor_type.name
        types[kind] = types.get(kind, 0) + int(tensor.n_elements)
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
        bytes=file.stat().st_size,
        bits_per_weight=8 * sum(int(tensor.n_bytes) for tensor in model.tensors) / sum(types.values()),
        types=dict(sorted(types.items(), key=lambda item: -item[1])),
        keys={name: value for name, value in model.said.items() if name not in long},
    )
