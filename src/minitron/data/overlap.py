"""Text that the training text and the held-out text share, so that no document is both trained on and measured.

Texts are compared by their words, because line ends, blank lines and spaces differ between formats. If the same text is
cut into documents in two ways, its lines are compared.
"""

import hashlib
from collections.abc import Iterator
from itertools import groupby

from minitron.data.sources import Document

# Shorter shared text may be a common phrase.
LEAST_CHARS = 64


class HeldOut:
    """The held-out documents, whose text is taken out of training documents.

    A row is left out if it has the words of a held-out document, if all of its lines or half of its characters are in
    held-out text, or if it contains a held-out document. From a text file, which has no rows, the lines that are in
    held-out text are left out.
    """

    def __init__(self) -> None:
        self._words: set[bytes] = set()
        self._lines: set[str] = set()
        self._longest: dict[str, list[frozenset[str]]] = {}  # line of a document -> all lines of each such document

    def add(self, text: str) -> None:
        self._words.add(_words(text))
        lines = frozenset(filter(None, _plain(text)))
        self._lines |= lines
        if sum(map(len, lines)) >= LEAST_CHARS:
            self._longest.setdefault(max(lines, key=lambda line: (len(line), line)), []).append(lines)

    def without(self, document: Document) -> str:
        """The text of a training document without held-out text; empty if nothing is left."""
        text = document.text
        if _words(text) in self._words:
            return ""
        lines = _plain(text)
        shared = sum(len(line) for line in lines if line in self._lines)
        total = sum(map(len, lines))
        if shared == total:
            return ""
        if shared == 0 or shared < LEAST_CHARS:
            return text
        if document.section:
            rest = "".join(self._other_lines(text, lines))
            return rest if rest.strip() else ""
        return "" if 2 * shared >= total or self._contains_heldout(set(lines)) else text

    def _other_lines(self, text: str, lines: list[str]) -> Iterator[str]:
        """The lines of a text without runs of held-out lines, which include short and blank lines between long ones."""
        known = [not line or line in self._lines for line in lines]
        pairs = zip(known, lines, text.splitlines(keepends=True), strict=True)
        for held, run in groupby(pairs, key=lambda pair: pair[0]):
            rows = list(run)
            if not held or sum(len(line) for _, line, _ in rows) < LEAST_CHARS:
                yield from (whole for _, _, whole in rows)

    def _contains_heldout(self, lines: set[str]) -> bool:
        return any(document <= lines for line in lines for document in self._longest.get(line, ()))


def _words(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def _plain(text: str) -> list[str]:
    """The lines of a text, with each run of spaces as one space."""
    return [" ".join(line.split()) for line in text.splitlines()]
