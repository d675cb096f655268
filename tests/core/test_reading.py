"""Files that a user gives are read by one rule, or refused in one sentence."""

import sys
from pathlib import Path

import pytest

from minitron.core import reading
from minitron.core.errors import DataError


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "marked.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert reading.read_json(file, DataError) == {"a": 1}
    assert reading.read_text(file, DataError) == '{"a": 1}'
    assert list(reading.read_lines(file, DataError)) == [(1, '{"a": 1}')]


def test_lines_keep_their_numbers_where_blank_ones_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes("one\r\n\n  \nfour\u2028still\n\x85five\n".encode("utf-8"))
    assert list(reading.read_lines(file, DataError)) == [(1, "one"), (4, "four\u2028still"), (5, "\x85five")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": }', "is not JSON: Expecting value at column 7"),
        ('{\n"a": }', "is not JSON: Expecting value at line 2, column 6"),
        ("[" * 200_000, "nested too deeply"),
        ("1" * (sys.get_int_max_str_digits() + 1), "Exceeds the limit"),
    ],
    ids=["syntax", "line", "nesting", "digits"],
)
def test_text_that_is_no_json_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(DataError) as problem:
        reading.parse_json(text, "here.json", DataError)
    assert str(problem.value).startswith("here.json") and said in str(problem.value)


def test_the_texts_of_a_value_are_all_looked_at_however_deep_they_are(tmp_path: Path) -> None:
    value: object = "bad\0"
    for _ in range(5000):
        value = [value]
    for broken in (value, {"a": [{"b": "half \ud83d"}]}, {"key\0": 1}):
        with pytest.raises(DataError, match=r"^here (is binary|is no Unicode text)"):
            reading.require_texts(broken, "here", DataError)
    reading.require_texts({"a": ["fine", 1, None, {"b": "🙂"}]}, "here", DataError)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"ok\nok \xff")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, said in (
        ("bytes", "is not UTF-8 text (byte 6)"),
        ("dangling", "is a link to nowhere, which does not exist"),
        ("missing", "No such file or directory"),
        (".", "Is a directory"),
    ):
        with pytest.raises(DataError) as problem:
            reading.read_text(tmp_path / name, DataError)
        assert said in str(problem.value)
    with pytest.raises(DataError, match=r"bytes, line 2, is not UTF-8 text \(byte 3\)"):
        list(reading.read_lines(tmp_path / "bytes", DataError))
