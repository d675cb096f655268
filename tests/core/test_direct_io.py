"""Past the page cache or through it, the bytes are the same; what runs ahead ends with its caller."""

import fcntl
import hashlib
import os
import random
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.core import direct_io
from minitron.core.direct_io import AHEAD, ALIGNED, ahead, digest_file, opened, read_range, write_file

SIZES = (0, 1, ALIGNED - 1, ALIGNED, 3 * ALIGNED, 10 * ALIGNED + 17)


@pytest.fixture(params=["direct", "no O_DIRECT", "refused when used", "a little at a time"], autouse=True)
def _file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks on four kinds of file system."""
    monkeypatch.setattr(direct_io, "CHUNK_BYTES", 2 * ALIGNED)
    if request.param == "no O_DIRECT":
        monkeypatch.setattr(os, "O_DIRECT", 0)
    if request.param == "refused when used":  # as if its blocks were larger than ALIGNED
        monkeypatch.setattr(direct_io, "ALIGNED", 1)
    if request.param == "a little at a time":
        read, write = os.preadv, os.write
        monkeypatch.setattr(os, "preadv", lambda file, into, offset: read(file, [into[0][:ALIGNED]], offset))
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:ALIGNED]))


def content(num_bytes: int) -> bytes:
    return random.Random(num_bytes).randbytes(num_bytes)


def parts(data: bytes, seed: int = 0) -> Generator[torch.Tensor, None, None]:
    """`data` in parts of any length, in memory that is used again for the next."""
    draw, start = random.Random(seed), 0
    room = bytearray(3 * ALIGNED)
    while start < len(data):
        part = data[start : start + draw.randint(1, len(room))]
        room[: len(part)] = part
        yield torch.frombuffer(room, dtype=torch.uint8)[: len(part)]
        start += len(part)


def test_what_is_written_is_the_parts_and_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    for num_bytes in SIZES:
        data = content(num_bytes)
        (tmp_path / "file").write_text("longer than it will be" * 5000)
        digest = write_file(tmp_path / "file", parts(data))
        assert (tmp_path / "file").read_bytes() == data, num_bytes
        assert digest == hashlib.sha256(data).hexdigest() == digest_file(tmp_path / "file"), num_bytes


def test_any_range_of_a_file_is_read_and_one_past_its_end_comes_short(tmp_path: Path) -> None:
    for num_bytes in SIZES:
        data, draw = content(num_bytes), random.Random(1)
        (tmp_path / "file").write_bytes(data)
        with opened(tmp_path / "file", os.O_RDONLY) as file:
            for _ in range(20):
                start, stop = sorted(draw.choices(range(num_bytes + 2 * ALIGNED), k=2))
                buffer = None if draw.random() < 0.5 else direct_io.aligned_bytes(draw.randrange(20 * ALIGNED))
                assert bytes(read_range(file, start, stop, buffer).numpy()) == data[start:stop], num_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="needs O_DIRECT")
def test_reading_stays_past_the_cache_up_to_the_end(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "file").write_bytes(content(SIZES[-1]))
    with opened(tmp_path / "file", os.O_RDONLY) as file:
        before = fcntl.fcntl(file, fcntl.F_GETFL)
        for start, stop in ((0, 1), (5, ALIGNED + 6), (ALIGNED - 1, 3 * ALIGNED)):
            read_range(file, start, stop)
        if "refused" not in request.node.name:
            assert fcntl.fcntl(file, fcntl.F_GETFL) == before


def test_an_error_while_writing_reaches_the_caller(tmp_path: Path) -> None:
    def broken() -> Generator[torch.Tensor, None, None]:
        yield from parts(content(9 * ALIGNED))
        raise ValueError("no more")

    before = threading.active_count()
    with pytest.raises(ValueError, match="no more"):
        write_file(tmp_path / "file", broken())
    assert threading.active_count() == before


def test_items_come_in_order_from_another_thread_and_few_before_their_time() -> None:
    made: list[int] = []
    threads = set()

    def items() -> Generator[int, None, None]:
        for number in range(50):
            made.append(number)
            threads.add(threading.current_thread())
            yield number

    taken = []
    for number in ahead(items()):
        taken.append(number)
        assert len(made) <= len(taken) + AHEAD
    assert taken == list(range(50)) and threading.current_thread() not in threads


def test_an_error_comes_where_its_item_would_have_come() -> None:
    def items() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise OSError("the third")

    running = ahead(items())
    assert [next(running), next(running)] == [1, 2]
    with pytest.raises(OSError, match="the third"):
        next(running)


@pytest.mark.parametrize("leave", ["closed", "forgotten", "left by an error"])
def test_who_stops_asking_ends_the_thread_and_the_generators_below(leave: str) -> None:
    closed: list[str] = []

    def endless(name: str, source: Any) -> Generator[int, None, None]:
        try:
            yield from source
        finally:
            closed.append(name)

    before = threading.active_count()
    inner = endless("inner", iter(lambda: 0, 1))
    outer = endless("outer", ahead(inner))
    running = ahead(outer)
    assert next(running) == 0
    if leave == "closed":
        running.close()
    elif leave == "left by an error":
        with pytest.raises(KeyboardInterrupt):
            running.throw(KeyboardInterrupt)
    del running
    assert threading.active_count() == before and closed == ["inner", "outer"]
