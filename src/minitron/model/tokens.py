"""Text to token ids, by one rule for special tokens.

Text that spells a special token (`</s>`, `<|im_end|>`) becomes the tokens of its letters, in documents, prompts,
questions and benchmark requests alike. Special tokens come only from the delimiters that `data.delimiter` puts around
documents, from the tokens that the tokenizer itself puts before a text, and from a chat template. No token is put
behind a prompt: after the end of a text, a model begins another one.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from minitron.core.errors import CheckpointError, DataError

# Quotes around spelled special tokens in the messages of a chat, which tell them from the template's special tokens.
_QUOTES = ("\U000f1e00", "\U000f1e01")


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without special tokens around it.

    Raises: DataError for text that the tokenizer cannot read.
    """
    return texts_ids(tokenizer, [text])[0]


def texts_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of several texts, faster than one by one."""
    found: list[list[int]] = _encoded(tokenizer, list(texts)).input_ids
    for text, ids in zip(texts, found, strict=True):
        _require_no_special(tokenizer, text, ids)
    return found


def text_ends(tokenizer: Any, text: str) -> list[int]:
    """The position in the text at which each of its tokens ends, in characters."""
    (offsets,) = _encoded(tokenizer, [text], return_offsets_mapping=True)["offset_mapping"]
    return [end for _, end in offsets]


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a prompt, after the tokens that the tokenizer puts before every text, with at most one BOS."""
    return [*put_around(tokenizer)[0], *text_ids(tokenizer, text)]


def chat_ids(tokenizer: Any, chat: str) -> list[int]:
    """The ids of a chat in its template: special tokens of the template are special, those marked by `quoted` are text.
    BOS is put before it if the tokenizer does so and the template does not."""
    start, end = _QUOTES
    pieces = re.split(f"{start}(.*?){end}", chat, flags=re.DOTALL)
    ids: list[int] = []
    for number, piece in enumerate(pieces):
        if number % 2:
            ids += text_ids(tokenizer, piece)
        elif piece:
            require_unicode(piece)
            with _readable(piece):
                ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=False, verbose=False).input_ids
    before = put_around(tokenizer)[0]
    begins = ids[: len(before)] == before or (ids and ids[0] == tokenizer.bos_token_id)
    return ids if begins else [*before, *ids]


def quoted(tokenizer: Any, text: str) -> str:
    """The text of a message with quotes around spelled special tokens, for `chat_ids`."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not special:
        return text
    longest_first = "|".join(re.escape(content) for content in sorted(special, key=len, reverse=True))
    return re.sub(longest_first, lambda spelled: _QUOTES[0] + spelled.group() + _QUOTES[1], text)


@lru_cache(16)
def put_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer itself puts before and behind every text, with several BOS in a row as one.

    Raises: CheckpointError for a tokenizer that drops the text itself.
    """
    with _readable("a"):
        whole, bare = (tokenizer("a", add_special_tokens=added).input_ids for added in (True, False))
    at = next((at for at in range(len(whole) + 1) if whole[at : at + len(bare)] == bare), None)
    if at is None:
        raise CheckpointError("the tokenizer's post_processor gives other tokens with special ones around than without")
    before, behind = whole[:at], whole[at + len(bare) :]
    bos = tokenizer.bos_token_id
    kept = [id for index, id in enumerate(before) if id != bos or index == 0 or before[index - 1] != bos]
    return kept, behind


def first_token(tokenizer: Any, need: str, way_out: str) -> int:
    """The token before a text without context: BOS, or EOS if there is no BOS, as behind another text.

    Args:
        need, way_out: the beginning and the end of the error message.

    Raises: DataError if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError(f"{need}: its tokenizer has neither a BOS nor an EOS token to start from; {way_out}")


def num_rows_needed(tokenizer: Any) -> int:
    """The number of rows of an embedding for all tokens: the largest id plus one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def require_rows(tokenizer: Any, rows: int) -> None:
    """Check that the embedding has a row for every token of texts.

    Special tokens beyond the embedding are allowed: some models have them for images, and no text contains them. If one
    occurs in a chat, `require_within` refuses it.

    Raises: CheckpointError if a token of texts, or a token that is put around texts, has no row.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    around = {*(id for ids in put_around(tokenizer) for id in ids), tokenizer.bos_token_id, tokenizer.eos_token_id}
    beyond = {
        text: id for text, id in tokenizer.get_vocab().items() if id >= rows and (text not in special or id in around)
    }
    if beyond:
        text = max(beyond, key=lambda text: beyond[text])
        raise CheckpointError(
            f"the tokenizer has {num_rows_needed(tokenizer)} tokens but the model's vocabulary only {rows} "
            f"({text!r} is token {beyond[text]}): they do not belong together, or the model's embedding was never "
            "resized; use the model's own tokenizer"
        )


def require_within(ids: Iterable[int], rows: int, tokenizer: Any, where: str) -> None:
    """Raises: CheckpointError if a token has no row in the embedding."""
    largest = max(ids, default=-1)
    if largest >= rows:
        raise CheckpointError(
            f"{where} has the token {tokenizer.convert_ids_to_tokens(int(largest))!r}, whose id is {largest}, but the "
            f"model's embedding has {rows} rows: it was never resized for the tokenizer's added tokens; leave the "
            "token out, or use the model's own tokenizer"
        )


def require_unicode(text: str) -> None:
    """Raises: DataError for half of a surrogate pair, to which a command line decodes a byte that is no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text {text[:40]!r} is no Unicode text: {error.reason} at character {error.start}; give UTF-8"
        ) from None


def _encoded(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    for text in texts:
        require_unicode(text)
    with _readable(texts[0] if len(texts) == 1 else "some text"):
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False, **options)


def _require_no_special(tokenizer: Any, text: str, ids: list[int]) -> None:
    spelled = _spelled_by_letters(tokenizer)
    found = spelled and spelled.intersection(ids)
    if found:
        token = tokenizer.convert_ids_to_tokens(min(found))
        raise DataError(
            f"the text {text[:40]!r} spells {token!r}, and this tokenizer makes the special token of its letters too, "
            "so the two cannot be told apart: take it out of the text"
        )


@lru_cache(16)
def _spelled_by_letters(tokenizer: Any) -> frozenset[int]:
    """The special tokens that text can produce even without special tokens: vocabulary entries that are merged like any
    other. White space and single characters are ordinary text even if they are declared special."""
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = {id: text for id, text in special.items() if len(text.strip()) > 1 and id != tokenizer.unk_token_id}
    if not special:
        return frozenset()
    found = _encoded(tokenizer, list(special.values())).input_ids
    return frozenset(id for id, ids in zip(special, found, strict=True) if id in ids)


@contextmanager
def _readable(text: str) -> Iterator[None]:
    """In this block, errors of the tokenizers library, which are plain `Exception`s, become DataErrors."""
    try:
        yield
    except Exception as error:
        raise DataError(f"the tokenizer cannot read {text[:40]!r}: {error}") from None
