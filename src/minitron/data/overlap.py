"""What training text and held-out text have in common, so that no document is both trained on and measured.

Texts are compared by their words: line ends, blank lines and spaces differ from one format to the next. Where the same
text is cut into documents in two ways, it is told by its lines.
"""

import hashlib
from collections.abc import Iterator
from itertools import groupby

from minitron.data.sources import Document

# Of text that two documents share: less may be a common phrase.
LEAST_CHARS = 64


class HeldOut:
    """Remembers held-out documents, and says what is left of a training document without them.

    A row is left out whole, if it has the words of a held-out document, if all of its lines or half of its characters
    stand in held-out text, or if it holds a held-out document. Of a text file, which has no rows, the lines that stand
    in held-out text are left out.
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
        """The text of a training document that is not held out; empty if nothing is left."""
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
        return "" if 2 * shared >= total or self._holds_one(set(lines)) else text

    def _other_lines(self, text: str, lines: list[str]) -> Iterator[str]:
        """The lines of a text without runs of held-out ones, short lines and blank ones between long ones included."""
        known = [not line or line in self._lines for line in lines]
        pairs = zip(known, lines, text.splitlines(keepends=True), strict=True)
        for held, run in groupby(pairs, key=lambda pair: pair[0]):
            rows = list(run)
            if not held or sum(len(line) for _, line, _ in rows) < LEAST_CHARS:
                yield from (whole for _, _, whole in rows)

    def _holds_one(self, lines: set[str]) -> bool:
        return any(one <= lines for line in lines for one in self._longest.get(line, ()))


def _words(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def _plain(text: str) -> list[str]:
    """Its lines, spaces in them made alike."""
    return [" ".join(line.split()) for line in text.splitlines()]
