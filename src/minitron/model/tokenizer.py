"""The tokenizer of a model directory: tokenizer.json, as the tokenizers library reads it.

The class in tokenizer_config.json is not used: some classes of transformers rebuild the tokenizer from its vocabulary
by other rules, and a class in the directory would be code to run. The other files only name the tokens with a role
(BOS, EOS, ...) and the chat template.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron.core.errors import CheckpointError
from minitron.core.reading import Json, parse_json, read_json, read_text
from minitron.model.tokens import put_around, require_rows

FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
GENERAL_CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is, in every version of transformers
TOKEN_ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
# The files of other kinds of tokenizers, and the names of these kinds.
_OTHERS = {"tokenizer.model": "SentencePiece", "*.tiktoken": "tiktoken", "tekken.json": "Mistral", "vocab.txt": ""}
_MAKE = "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
# Texts that tell readings of a tokenizer.json apart: by leading, repeated and trailing spaces, lines, digits, scripts.
PROBES = (
    "a",
    " lead",
    "  two   three \n\n\tfour ",
    "It's 12345 o'clock; I'LL pay 3.50!\r\n  def f(x_1):\n\treturn x_1**2",
    "Café naïve “quoted” … Привет, мир! 漢字かな 한국어 🙂👍🏽 \u00a0x",
)


def load_tokenizer(path: Path) -> Any:
    """Load the directory's tokenizer as transformers' general class.

    Raises: CheckpointError if it is missing or damaged, or has tokens for which the model has no rows.
    """
    file = path / FILE
    tokenizer = _of_json(path) if file.exists() or file.is_symlink() else _of_merges(path)
    rows = _object(path / "config.json").get("vocab_size")
    if isinstance(rows, int):
        try:
            require_rows(tokenizer, rows)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
    return tokenizer


def end_ids(path: Path) -> list[int]:
    """The tokens that end a model's text, by generation_config.json, or by config.json if there is no such file.

    Raises: CheckpointError if the value there is no token id and no list of ids.
    """
    file = next(file for name in ("generation_config.json", "config.json") if (file := path / name).exists())
    named = _object(file).get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise CheckpointError(f"{file}: eos_token_id must be the number of a token, or a list of them, not {named!r}")
    return ids


def make_portable(path: Path) -> None:
    """Change tokenizer_config.json so that transformers' AutoTokenizer reads the directory's tokenizer.json as it is.

    If transformers reads it otherwise for this model type in any case, a warning says so. A tokenizer that cannot be
    loaded is not changed: a cut needs none.
    """
    if not (path / FILE).exists():
        return
    try:
        ours = load_tokenizer(path)
    except CheckpointError as error:
        warnings.warn(f"the tokenizer is carried along as it is: {error}", stacklevel=2)
        return
    if _read_alike(path, ours):
        return
    roles = {f"{role}_token": getattr(ours, f"{role}_token") for role in TOKEN_ROLES}
    said = {
        key: value for key, value in _object(path / TOKENIZER_CONFIG).items() if key != "auto_map" and key not in roles
    }
    said |= {"tokenizer_class": GENERAL_CLASS} | {key: token for key, token in roles.items() if token is not None}
    (path / TOKENIZER_CONFIG).write_text(json.dumps(said, indent=2, ensure_ascii=False), encoding="utf-8")
    (path / SPECIAL_TOKENS).unlink(missing_ok=True)  # the other file has all of its content now
    if not _read_alike(path, ours):  # if only tokenizer_config.json named BOS before a text
        (path / FILE).write_text(ours.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    if not _read_alike(path, ours):
        warnings.warn(
            f"transformers' AutoTokenizer has a class of its own for this model type, which makes other tokens than "
            f"{FILE} says: load the tokenizer with {GENERAL_CLASS}.from_pretrained",
            stacklevel=2,
        )


def _read_alike(path: Path, ours: Any) -> bool:
    from transformers import AutoTokenizer

    try:
        other = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception:  # of any kind: then it is not read alike
        return False
    roles = all(getattr(other, f"{role}_token_id") == getattr(ours, f"{role}_token_id") for role in ("bos", "eos"))
    return roles and all(_ids(other, text) == _ids(ours, text) for text in PROBES)


def _ids(tokenizer: Any, text: str) -> list[int] | None:
    """The ids of a text; None if the tokenizer cannot encode it."""
    try:
        ids: list[int] = tokenizer(text).input_ids
        return ids
    except Exception:
        return None


def _of_json(path: Path) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = path / FILE
    text = read_text(file, CheckpointError)
    stored = parse_json(text, str(file), CheckpointError)
    if not isinstance(stored, dict) or not isinstance(stored.get("model"), dict):
        raise CheckpointError(f"{file} is no tokenizer: it must be a JSON object with a model")
    if stored["model"].get("dropout"):
        raise CheckpointError(
            f"{file}: model.dropout is {stored['model']['dropout']}, so a text would be other tokens each time: "
            "set it to null"
        )
    with _damage_named(file):
        core = Tokenizer.from_str(text)
        core.no_truncation()  # some files keep it from training, and it would cut documents
        core.no_padding()
    _require_template(file, stored)
    with _damage_named(file):
        by_config = {} if core.num_special_tokens_to_add(False) else _put_by_config(path)
    _require_ids(file, stored, core)
    _require_same_added(path, core)
    with _damage_named(file):
        options = _roles(path, stored, core) | {"chat_template": _chat_template(path)} | by_config
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **options)
        around = put_around(tokenizer)
    for id in (*around[0], *around[1]):
        if core.id_to_token(id) is None:
            raise CheckpointError(f"{file}: its post_processor puts token {id} around a text, and there is none")
    return tokenizer


def _of_merges(path: Path) -> Any:
    """The tokenizer of a vocab.json and merges.txt, by the class of transformers for its model type."""
    from transformers import AutoTokenizer
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    if not all((path / name).is_file() for name in ("vocab.json", "merges.txt")):
        for pattern, kind in _OTHERS.items():
            for file in path.glob(pattern):
                raise CheckpointError(
                    f"{path} has {file.name}{f', a {kind} file,' if kind else ''} and no {FILE}, which is what text is "
                    f"tokenized by here: make one with transformers, {_MAKE}, in an environment that can read the other"
                )
        raise CheckpointError(
            f"{path} has no tokenizer that transformers can load: neither {FILE} nor vocab.json and merges.txt"
        )
    said = _object(path / TOKENIZER_CONFIG)
    if said.get("auto_map"):
        raise CheckpointError(
            f"{path} has no {FILE}, and {TOKENIZER_CONFIG} names code of its own for its tokenizer "
            f"({said.get('tokenizer_class')}), which is never run here: make {FILE} where you trust that code, with "
            f"{_MAKE}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of whatever kind: the files are the user's
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(f"{path} has no tokenizer that transformers can load: {reason}") from None
    if not isinstance(tokenizer, TokenizersBackend):
        raise CheckpointError(
            f"{path} has no {FILE}, and its tokenizer ({type(tokenizer).__name__}) is none of the tokenizers library: "
            f"make one with {_MAKE}"
        )
    vocabulary = _object(path / "vocab.json")
    if not vocabulary.items() <= tokenizer.get_vocab().items():
        raise CheckpointError(
            f"{path} has no {FILE}, and {type(tokenizer).__name__}, which transformers makes of it, does not have the "
            f"tokens of vocab.json: make {FILE} with the class that the vocabulary is of"
        )
    return tokenizer


def _roles(path: Path, stored: Mapping[str, Any], core: Any) -> dict[str, str]:
    """The tokens with a role, by tokenizer_config.json and special_tokens_map.json, or if neither names a BOS or EOS
    token, by the ids in config.json."""
    added = {token["content"]: token for token in stored.get("added_tokens") or []}
    files = [path / TOKENIZER_CONFIG, path / SPECIAL_TOKENS]
    named: dict[str, str] = {}
    for role in TOKEN_ROLES:
        found = {file: _content(file, role) for file in files}
        texts = {file: text for file, text in found.items() if text is not None}
        if role in ("bos", "eos") and len(set(texts.values())) > 1:
            both = " and ".join(f"{text!r} in {file.name}" for file, text in texts.items())
            raise CheckpointError(f"{path}: {role}_token is {both}: make them name the same token")
        for file, text in texts.items():
            if core.token_to_id(text) is not None and (text in added or role in ("bos", "eos", "unk")):
                named.setdefault(f"{role}_token", text)
            elif role in ("bos", "eos"):
                raise CheckpointError(
                    f"{file} names {text!r} as {role}_token, which {FILE} does not have: name one that it has"
                )
    if not named.keys() & {"bos_token", "eos_token"}:
        config = _object(path / "config.json")
        for role in ("bos", "eos"):
            ids = config.get(f"{role}_token_id")
            first = ids[0] if isinstance(ids, list) and ids else ids
            own = core.id_to_token(first) if isinstance(first, int) and first >= 0 else None
            if own is not None and added.get(own, {}).get("special"):
                named[f"{role}_token"] = own
    return named


def _content(file: Path, role: str) -> str | None:
    token = _object(file).get(f"{role}_token")
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise CheckpointError(f"{file}: {role}_token must be a text, not {token!r}")
    return text or None


def _put_by_config(path: Path) -> dict[str, bool]:
    """The keys of tokenizer_config.json about tokens around a text, which count if tokenizer.json puts none."""
    said = _object(path / TOKENIZER_CONFIG)
    return {key: True for key in ("add_bos_token", "add_eos_token") if said.get(key) is True}


def _chat_template(path: Path) -> str | dict[str, str] | None:
    if (path / "chat_template.jinja").is_file():
        return read_text(path / "chat_template.jinja", CheckpointError)
    template = _object(path / TOKENIZER_CONFIG).get("chat_template")
    if template is None or isinstance(template, str):
        return template or None
    try:
        named = {one["name"]: one["template"] for one in template}
    except (TypeError, KeyError):
        named = {"": None}
    if not all(isinstance(text, str) for text in named.values()):
        raise CheckpointError(
            f"{path / TOKENIZER_CONFIG}: chat_template must be a text, or a list of texts with their names"
        )
    return named


def _require_template(file: Path, stored: Mapping[str, Any]) -> None:
    """Check the post_processor: the library panics if it names a token that it does not describe."""
    for part in _templates(stored):
        known = part["special_tokens"]
        if sum(piece.get("Sequence", {}).get("id") == "A" for piece in part["single"]) != 1:
            raise CheckpointError(f"{file}: its post_processor does not have the text itself once, as $A")
        for piece in [*part["single"], *part["pair"]]:
            name = piece.get("SpecialToken", {}).get("id")
            if name is not None and name not in known:
                raise CheckpointError(
                    f"{file}: its post_processor puts {name!r} around a text and does not say what tokens that is"
                )


def _templates(stored: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    whole = stored.get("post_processor") or {}
    return [part for part in whole.get("processors") or [whole] if part.get("type") == "TemplateProcessing"]


def _require_ids(file: Path, stored: Mapping[str, Any], core: Any) -> None:
    """Check the ids of added tokens: the library gives them the next free ids, whatever the file says."""
    vocabulary: dict[str, int] = core.get_vocab()
    by_id: dict[int, str] = {}
    for text, id in vocabulary.items():
        other = by_id.setdefault(id, text)
        if other != text:
            raise CheckpointError(f"{file}: {other!r} and {text!r} are both token {id}")
    for token in stored.get("added_tokens") or []:
        found = vocabulary.get(token["content"])
        if found != token["id"]:
            raise CheckpointError(
                f"{file}: the added token {token['content']!r} has the id {token['id']} there, and is token {found} to "
                "the tokenizers library: ids of added tokens go on from the vocabulary's, without a gap"
            )
    for part in _templates(stored):
        for entry in part["special_tokens"].values():
            for id, text in zip(entry["ids"], entry["tokens"], strict=False):
                if vocabulary.get(text) != id:
                    raise CheckpointError(
                        f"{file}: its post_processor puts {text!r} around a text as token {id}, and it is token "
                        f"{vocabulary.get(text)} of the vocabulary"
                    )


def _require_same_added(path: Path, core: Any) -> None:
    """Raises: CheckpointError if another file gives an added token another id."""
    said = _object(path / TOKENIZER_CONFIG).get("added_tokens_decoder") or {}
    try:
        tokens = {path / TOKENIZER_CONFIG: {int(id): token["content"] for id, token in said.items()}}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{path / TOKENIZER_CONFIG}: added_tokens_decoder must be tokens by their ids") from None
    tokens[path / "added_tokens.json"] = {id: text for text, id in _object(path / "added_tokens.json").items()}
    for file, of_file in tokens.items():
        for id, text in of_file.items():
            if core.token_to_id(text) != id:
                own = core.token_to_id(text)
                raise CheckpointError(
                    f"{file} has {text!r} as token {id}, and {FILE} has "
                    f"{'no such token' if own is None else f'it as token {own}'}: the two are of different times; "
                    "correct one of them"
                )


def _object(file: Path) -> Json:
    """Read a JSON file of the directory; empty if it is missing."""
    if not file.exists() and not file.is_symlink():
        return {}
    value = read_json(file, CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must be a JSON object")
    return value


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """In this block, errors of the tokenizers library about a damaged file become one line. They are plain `Exception`s
    or panics, which are no `Exception`s and print a message."""
    with _stderr_silent():
        try:
            yield
        except CheckpointError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise CheckpointError(
                f"{file} is damaged, or of another kind than the tokenizers library reads: {reason}"
            ) from None


@contextmanager
def _stderr_silent() -> Iterator[None]:
    """Discard messages that the library prints."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
