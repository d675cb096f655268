"""What happens to files on their way to a program: hypothesis strategies of a file's contents, damaged.

Each draws a Mutation of the one file it is given. The simplest come first, which is where hypothesis shrinks to.
"""

import codecs
import copy
import itertools
import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from hypothesis import strategies as st

Draw = st.DrawFn
Kind = Literal["file", "missing", "directory", "dangling link", "link to itself"]


@dataclass(frozen=True)
class Mutation:
    """What becomes of a file.

    how: in a few words. data: its bytes, where it is still a file. keys: the keys that were touched.
    """

    how: str
    data: bytes = field(repr=False, default=b"")
    keys: tuple[str, ...] = ()
    kind: Kind = "file"


class Contents(bytes):
    """The bytes of a file; hypothesis shows what a strategy is made of, and these are many."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 0.5, -0.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), -float("inf")),
    *(True, False, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400),
)
TEXTS: tuple[str, ...] = (
    *(
        "",
        " ",
        "x",
        "0",
        "12",
        "-1",
        "1e3",
        "nan",
        "null",
        "true",
        "auto",
        "float16",
        "../../up",
        "/",
        ".",
        "~",
        "é漢🙂",
    ),
    *("\x00", "a\nb", "\ud800", "\u202e\ufeff", "{}", "[[]]", "%s {0} {x}", "<script>", "x" * 5000),
)
VALUES: tuple[Any, ...] = (None, *NUMBERS, *TEXTS, [], {}, [None], [0], {"x": 0}, [[[]]], [1, "x"], [[0, 1], [2]])
WHOLES: tuple[bytes, ...] = (
    *(b"", b"\n", b" ", b"null", b"{}", b"[]", b"0", b"true", b'"text"', b"[1]", b"{", b"}", b'{"a": 1}{"b": 2}'),
    *(b"NaN", b"\x00" * 64, b"\xff" * 64, b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"<!DOCTYPE html>"),
    *(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", b"\xef\xbb\xbf", b"PK\x03\x04"),
)
KINDS: tuple[Kind, ...] = ("missing", "directory", "dangling link", "link to itself")


@st.composite
def of_bytes(draw: Draw, data: bytes, *, front: int = 400) -> Mutation:
    """Bytes changed, put in, taken out or lost at the end; half of the time near the front, where headers are."""
    last = max(0, len(data) - 1)
    at = draw(st.integers(0, min(front, last)) | st.integers(0, last))
    act = draw(st.sampled_from(["flip", "set", "cut", "put", "end", "more", "number", "swap", "double"]))
    match act:
        case "flip":
            bit = draw(st.integers(0, 7))
            return Mutation(
                f"bit {bit} of byte {at} flipped", data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            )
        case "set":
            value = draw(st.sampled_from([0, 0xFF, 0x20, 0x7B, 0x0A, 0x80, 0xC0]))
            return Mutation(f"byte {at} set to {value:#x}", data[:at] + bytes([value]) + data[at + 1 :])
        case "cut":
            count = draw(st.sampled_from([1, 2, 4, 8, 100]))
            return Mutation(f"{count} bytes cut at {at}", data[:at] + data[at + count :])
        case "put":
            text = draw(st.sampled_from([b"\x00", b"\xff", b" ", b'"', b"\x00" * 8, b"\xff\xfe", b"{", b"]", b"\n"]))
            return Mutation(f"{text!r} put in at {at}", data[:at] + text + data[at:])
        case "end":
            return Mutation(f"ends after {at} of {len(data)} bytes", data[:at])
        case "more":
            count = draw(st.sampled_from([1, 8, 4096]))
            return Mutation(f"{count} bytes more at the end", data + b"\x01" * count)
        case "number":
            size, mark = draw(st.sampled_from([(4, "<i"), (8, "<q")]))
            value = draw(st.sampled_from([0, 1, -1, 2 ** (8 * size - 1) - 1, -(2 ** (8 * size - 1)), 2**20]))
            return Mutation(f"{size} bytes at {at} are the number {value}", _over(data, at, struct.pack(mark, value)))
        case "swap":
            half = len(data) // 2
            return Mutation("its halves swapped", data[half:] + data[:half])
    return Mutation("twice in a row", data + data)


@st.composite
def of_words(draw: Draw, data: bytes) -> Mutation:
    """A binary file with one of the words in it changed: the names and values that a format spells out."""
    words = sorted({match[0] for match in re.finditer(rb"[a-zA-Z][\w.]{3,60}", data)})
    word = draw(st.sampled_from(words))
    other = draw(st.sampled_from([word[:-1] + b"!", word.upper(), b"\xff" * len(word), word[::-1], b"x" * len(word)]))
    return Mutation(f"{word.decode()} spelt {other!r}", data.replace(word, other, 1), (word.decode(),))


@st.composite
def of_whole(draw: Draw, data: bytes) -> Mutation:
    """Another file, or none, in its place."""
    if draw(st.booleans()):
        kind = draw(st.sampled_from(KINDS))
        return Mutation(kind, kind=kind)
    whole = draw(st.sampled_from(WHOLES))
    return Mutation(f"holds {len(whole)} bytes: {whole[:30]!r}", whole)


@st.composite
def of_encoding(draw: Draw, data: bytes) -> Mutation:
    """A text in another encoding, or with what editors put in."""
    text = data.decode()
    made = {
        "a byte order mark": codecs.BOM_UTF8 + data,
        "UTF-16": text.encode("utf-16"),
        "UTF-16 without a mark": text.encode("utf-16-le"),
        "UTF-32": text.encode("utf-32"),
        "line ends of Windows": text.replace("\n", "\r\n").encode(),
        "line ends of old": text.replace("\n", "\r").encode(),
        "a byte order mark twice": codecs.BOM_UTF8 * 2 + data,
        "a NUL at the end": data + b"\x00",
        "Latin-1 in front": "é".encode("latin-1") + data,
        "a comment in front": b"# comment\n" + data,
        "another document behind": data + b"\n---\n" + data,
        "control characters": b"\x1b[31m" + data,
    }
    name = draw(st.sampled_from(sorted(made)))
    return Mutation(f"with {name}", made[name])


@st.composite
def of_tree(draw: Draw, tree: Any) -> tuple[Any, str, tuple[str, ...]]:
    """A value of nested dicts and lists with one place changed; the value, how, and the keys on the way there."""
    tree = copy.deepcopy(tree)
    path = draw(_places(tree))
    if not path:
        value = draw(st.sampled_from(VALUES))
        return value, f"all of it = {_short(value)}", ()
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    keys, where = tuple(part for part in path if isinstance(part, str)), ".".join(map(str, path))
    act = draw(st.sampled_from(["value", "near", "gone", "renamed", "wrapped", "added", "many"]))
    if act == "near":
        parent[key] = draw(_near(old))
        return tree, f"{where} = {_short(parent[key])}", keys
    if act == "gone":
        del parent[key]
        return tree, f"{where} is gone", keys
    if act == "renamed" and isinstance(key, str):
        name = draw(st.sampled_from([key.upper(), f"{key}_", key[:-1], f" {key}", ""]))
        parent[name] = parent.pop(key)
        return tree, f"{where} is called {name!r}", (*keys, name)
    if act == "wrapped":
        parent[key] = draw(st.sampled_from([[old], {"value": old}, [old, old], str(old)]))
        return tree, f"{where} = {_short(parent[key])}", keys
    if act == "added":
        if isinstance(parent, dict):
            name = draw(st.sampled_from(["x", "", "_", "é", key + "s" if isinstance(key, str) else "s", "\x00"]))
            parent[name] = copy.deepcopy(old)
            return tree, f"{where} also as {name!r}", (*keys, name)
        parent.insert(draw(st.sampled_from([0, len(parent)])), copy.deepcopy(old))
        return tree, f"{where} twice", keys
    if act == "many" and isinstance(old, list):
        parent[key] = draw(st.sampled_from([old * 2, old * 100, old[:-1], old[::-1], sorted(old, key=repr)]))
        return tree, f"{where} has {len(parent[key])} entries of {len(old)}, in another order", keys
    parent[key] = draw(st.sampled_from(VALUES))
    return tree, f"{where} = {_short(parent[key])}", keys


@st.composite
def _places(draw: Draw, tree: Any) -> tuple[str | int, ...]:
    """The way to a place in a tree, seldom the root."""
    path: list[str | int] = []
    while isinstance(tree, dict | list) and tree and (not path or draw(st.integers(0, 2))):
        if not path and draw(st.integers(0, 30)) == 30:
            break
        path.append(draw(st.sampled_from(list(tree) if isinstance(tree, dict) else range(len(tree)))))
        tree = tree[path[-1]]
    return tuple(path)


def _near(old: Any) -> st.SearchStrategy[Any]:
    """Values of about the same kind."""
    match old:
        case bool():
            return st.sampled_from([not old, int(old), str(old), None])
        case int() | float():
            return st.sampled_from([old + 1, old - 1, 2 * old, -old, old * 1000, float(old), str(old), old / 2])
        case str():
            return st.sampled_from([old + "x", old.upper(), old[:-1], old[::-1], [old], f" {old}", old.encode().hex()])
        case list():
            return st.sampled_from([old[:1], old[1:], [*old, None], dict(enumerate(map(str, old))), None, [old]])
        case dict():
            return st.sampled_from([list(old), list(old.values()), dict.fromkeys(old), None, {}, [old]])
    return st.sampled_from([0, "", False, "None", [], {}])


@st.composite
def of_json(draw: Draw, data: bytes) -> Mutation:
    tree = json.loads(data)
    if isinstance(tree, dict) and tree and draw(st.integers(0, 9)) == 9:
        key, value = draw(st.sampled_from(list(tree))), draw(st.sampled_from(VALUES))
        pair, body = f"{json.dumps(key)}: {json.dumps(value)}", json.dumps(tree)
        first = draw(st.booleans())
        text = f"{{{pair}, {body[1:]}" if first else f"{body[:-1]}, {pair}}}"
        return Mutation(f"{key} twice, the {'first' if first else 'last'} = {_short(value)}", text.encode(), (key,))
    changed, how, keys = draw(of_tree(tree))
    return Mutation(how, json.dumps(changed).encode(), keys)


@st.composite
def of_yaml(draw: Draw, data: bytes) -> Mutation:
    if draw(st.integers(0, 9)) == 9:
        name = draw(st.sampled_from(sorted(YAML_ODDITIES)))
        return Mutation(f"with {name}", YAML_ODDITIES[name](data))
    changed, how, keys = draw(of_tree(yaml.safe_load(data)))
    text = yaml.dump(_without_surrogates(changed), sort_keys=False, allow_unicode=True)
    return Mutation(how, text.encode(errors="replace"), keys)


YAML_ODDITIES: Mapping[str, Callable[[bytes], bytes]] = {
    "a Python object": lambda data: data + b"\nx: !!python/object/apply:os.getcwd []\n",
    "a tab": lambda data: data.replace(b"  ", b"\t"),
    "an alias to nothing": lambda data: data + b"\nx: *nothing\n",
    "aliases of aliases": lambda data: data + _laughs(),
    "a mapping as key": lambda data: data + b"\n? {a: 1}\n: 2\n",
    "a list as key": lambda data: data + b"\n? [a, b]\n: 2\n",
    "a number as key": lambda data: data + b"\n7: 2\n",
    "nothing as key": lambda data: data + b"\n~: 2\n",
    "a date": lambda data: data + b"\nseed: 2024-01-02\n",
    "a number in base 60": lambda data: data + b"\nseed: 1:30\n",
    "a merge": lambda data: data + b"\n<<: [1, 2]\n",
    "an unclosed bracket": lambda data: data + b"\nx: [1, 2\n",
    "a value that holds itself": lambda data: data + b"\nx: &a [*a]\n",
    "too many brackets": lambda data: data + b"\nx: " + b"[" * 3000,
    "bytes": lambda data: data + b"\nseed: !!binary aGk=\n",
    "a set": lambda data: data + b"\nseed: !!set {a, b}\n",
    "an odd timestamp": lambda data: data + b"\nseed: 2024-13-45\n",
}


def _laughs() -> bytes:
    names = "abcdefghi"
    lines = ["x0: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [
        f"x{n}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for n, (before, name) in enumerate(itertools.pairwise(names), 1)
    ]
    return "\n".join(["", *lines, ""]).encode()


def _without_surrogates(tree: Any) -> Any:
    return json.loads(json.dumps(tree).replace("\\ud800", "?"))


@st.composite
def of_lines(draw: Draw, data: bytes) -> Mutation:
    """A file of JSON lines with one line, or every line, changed in one place."""
    lines = data.decode().splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    act = draw(st.sampled_from(["one", "all", "raw", "cut", "short", "few"]))
    if act == "raw":
        raw = draw(
            st.sampled_from([b"null", b"[]", b"3", b'"text"', b"{", b"", b"\xff", b"{}", b"[" * 100_000, b"NaN"])
        )
        put = [line.encode() for line in lines]
        return Mutation(f"line {at + 1} is {raw[:20]!r}", b"\n".join([*put[:at], raw, *put[at + 1 :]]))
    if act == "cut":
        return Mutation(
            f"line {at + 1} is cut short", "\n".join([*lines[:at], lines[at][:-3], *lines[at + 1 :]]).encode()
        )
    if act == "few":
        return Mutation(f"{at} lines", "\n".join(lines[:at]).encode())
    if act == "short":
        return Mutation("a JSON list of its rows", f"[{', '.join(lines)}]".encode())
    changed, how, keys = draw(of_tree(json.loads(lines[at])))
    if act == "all":
        return Mutation(f"every line: {how}", "\n".join([json.dumps(changed)] * len(lines)).encode(), keys)
    return Mutation(
        f"line {at + 1}: {how}", "\n".join([*lines[:at], json.dumps(changed), *lines[at + 1 :]]).encode(), keys
    )


@st.composite
def of_safetensors(draw: Draw, data: bytes) -> Mutation:
    """The header changed as JSON, with its length put right or not."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length], data[8 + length :]
    if draw(st.integers(0, 4)) == 4:
        claim = draw(st.sampled_from([0, 1, length - 1, length + 1, length + 8, 2**31, 2**63, 2**64 - 1]))
        return Mutation(f"says that its header has {claim} bytes of {length}", struct.pack("<Q", claim) + data[8:])
    changed, how, keys = draw(of_tree(json.loads(header)))
    text = json.dumps(changed).encode()
    return Mutation(f"header: {how}", struct.pack("<Q", len(text)) + text + body, keys)


def _over(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


# Form of a file -> the strategies for it; a strategy that stands twice is drawn from twice as often.
FORMS: dict[str, tuple[Callable[[bytes], st.SearchStrategy[Mutation]], ...]] = {
    "json": (of_json, of_json, of_json, of_json, of_bytes, of_whole, of_encoding),
    "yaml": (of_yaml, of_yaml, of_yaml, of_yaml, of_bytes, of_whole, of_encoding),
    "lines": (of_lines, of_lines, of_lines, of_bytes, of_whole, of_encoding),
    "text": (of_bytes, of_whole, of_encoding),
    "safetensors": (of_safetensors, of_safetensors, of_bytes, of_whole),
    "binary": (of_bytes, of_bytes, of_words, of_whole),
    "numbers": (of_bytes, of_bytes, of_whole),
}


def mutations(form: str, data: bytes) -> st.SearchStrategy[Mutation]:
    """Every way in which a file of a form and these bytes is damaged here, but for the one that leaves it as it is."""
    return st.one_of([strategy(Contents(data)) for strategy in FORMS[form]]).filter(
        lambda mutation: mutation.kind != "file" or mutation.data != data
    )
