"""Text to token ids, by one rule for special tokens.

Text is text. What spells a special token (`</s>`, `<|im_end|>`) becomes the tokens of its letters, in documents,
prompts, questions and benchmark requests alike. Special tokens come from three places only: the delimiters that
`data.delimiter` puts around documents, what the tokenizer itself puts before a text, and a chat template. Nothing is
put behind a prompt: a model that has read the end of a text begins another one.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from minitron.core.errors import CheckpointError, DataError

# Around what spells a special token within a chat's messages, so that it is told from those of the template.
_QUOTES = ("\U000f1e00", "\U000f1e01")


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text alone: nothing is put around it.

    Raises: DataError for text that the tokenizer cannot read.
    """
    return texts_ids(tokenizer, [text])[0]


def texts_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`text_ids` of several texts, faster than one by one."""
    found: list[list[int]] = _encoded(tokenizer, list(texts)).input_ids
    for text, ids in zip(texts, found, strict=True):
        _require_no_special(tokenizer, text, ids)
    return found


def text_ends(tokenizer: Any, text: str) -> list[int]:
    """Where in the text each of its tokens ends, in characters."""
    (places,) = _encoded(tokenizer, [text], return_offsets_mapping=True)["offset_mapping"]
    return [end for _, end in places]


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that a model goes on from: behind what the tokenizer puts before every text, one BOS at most."""
    return [*put_around(tokenizer)[0], *text_ids(tokenizer, text)]


def chat_ids(tokenizer: Any, chat: str) -> list[int]:
    """Ids of a chat as its template wrote it: special tokens of the template are such, those that `quoted` marked are
    text. BOS is put before it where the tokenizer does so and the template has not."""
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
    """The text of a message with what spells a special token marked, for `chat_ids`."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not special:
        return text
    longest_first = "|".join(re.escape(content) for content in sorted(special, key=len, reverse=True))
    return re.sub(longest_first, lambda spelled: _QUOTES[0] + spelled.group() + _QUOTES[1], text)


@lru_cache(16)
def put_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before and behind every text; of several BOS in a row, one.

    Raises: CheckpointError for a tokenizer that leaves the text itself out.
    """
    with _readable("a"):
        whole, bare = (tokenizer("a", add_special_tokens=added).input_ids for added in (True, False))
    at = next((at for at in range(len(whole) + 1) if whole[at : at + len(bare)] == bare), None)
    if at is None:
        raise CheckpointError("the tokenizer's post_processor gives other tokens with special ones around than without")
    before, behind = whole[:at], whole[at + len(bare) :]
    bos = tokenizer.bos_token_id
    kept = [id for place, id in enumerate(before) if id != bos or place == 0 or before[place - 1] != bos]
    return kept, behind


def first_token(tokenizer: Any, need: str, way_out: str) -> int:
    """What a text begins with where nothing else stands before it: BOS, or EOS where there is no BOS, as it is behind
    another text.

    Args:
        need, way_out: of the message.

    Raises: DataError if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError(f"{need}: its tokenizer has neither a BOS nor an EOS token to start from; {way_out}")


def num_rows_needed(tokenizer: Any) -> int:
    """Rows of an embedding that has one for every token: the largest id and one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def require_rows(tokenizer: Any, rows: int) -> None:
    """Special tokens beyond the embedding are no fault by themselves: some models have such, for images that they never
    read, and no text is made of them. Where one occurs, in a chat, `require_within` refuses it.

    Raises: CheckpointError if a token that text is made of, or that stands around texts, has no row.
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
    """Raises: DataError for half of a surrogate pair, which a byte that is no UTF-8 becomes on a command line."""
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
    """Special tokens that come out of text though none is looked for: entries of the vocabulary that are found or
    merged like any other. White space and single characters are ordinary text even where they are named special."""
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = {id: text for id, text in special.items() if len(text.strip()) > 1 and id != tokenizer.unk_token_id}
    if not special:
        return frozenset()
    found = _encoded(tokenizer, list(special.values())).input_ids
    return frozenset(id for id, ids in zip(special, found, strict=True) if id in ids)


@contextmanager
def _readable(text: str) -> Iterator[None]:
    """The tokenizers library raises plain `Exception` for what a tokenizer has no tokens for."""
    try:
        yield
    except Exception as error:
        raise DataError(f"the tokenizer cannot read {text[:40]!r}: {error}") from None
