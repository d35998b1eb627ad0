"""Bytes by position: every kind of source keeps the one contract, and says what is wrong."""

from __future__ import annotations

import gzip
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtool.errors import FormatError, KvmError, TruncatedError
from kvmtool.source import (
    BytesSource,
    FileSource,
    SliceSource,
    find_by_chunks,
    open_source,
)

DATA = bytes(range(256)) * 4 + b"needle" + bytes(100) + b"needle"
HUGE = 1 << 64


def _file(folder, data):
    path = os.path.join(folder, "data")
    with open(path, "wb") as out:
        out.write(data)
    return FileSource(path)


def _slice(folder, data):
    return SliceSource(BytesSource(b"before" + data + b"after", "slice"), 6, len(data))


def _slice_of_slice(folder, data):
    whole = SliceSource(_file(folder, b"12345" + data + b"needle"), 2, len(data) + 5)
    return SliceSource(whole, 3, len(data), "inner")


@pytest.fixture(
    params=[
        _file,
        lambda _, data: BytesSource(data),
        _slice,
        _slice_of_slice,
    ],
    ids=["file", "bytes", "slice", "slice of a slice"],
)
def make(request, tmp_path):
    made = []

    def maker(data):
        made.append(request.param(str(tmp_path), data))
        return made[-1]

    yield maker
    for source in made:
        source.close()


def test_size_and_every_byte(make):
    source = make(DATA)
    assert source.size == len(DATA)
    assert source.read_at(0, len(DATA)) == DATA
    assert b"".join(source.read_at(at, 1) for at in range(300)) == DATA[:300]


@pytest.mark.parametrize("at", [0, 1, len(DATA) - 1, len(DATA)])
def test_no_bytes_may_be_asked_for_anywhere_inside(make, at):
    assert make(DATA).read_at(at, 0) == b""


@pytest.mark.parametrize(
    ("off", "size", "got"),
    [
        (0, len(DATA) + 1, len(DATA)),
        (len(DATA) - 3, 4, 3),
        (len(DATA), 1, 0),
        (len(DATA) + 1, 0, 0),
        (len(DATA) + 7, 5, 0),
        (HUGE, HUGE, 0),
        (0, HUGE, len(DATA)),
    ],
)
def test_what_is_not_there_is_an_error_with_its_numbers(make, off, size, got):
    source = make(DATA)
    with pytest.raises(TruncatedError) as caught:
        source.read_at(off, size)
    error = caught.value
    assert (error.source, error.offset, error.wanted, error.got) == (source.name, off, size, got)
    assert f"{off:#x}" in str(error)


@pytest.mark.parametrize(("off", "size"), [(-1, 1), (-1, 0), (0, -1), (-5, 5), (5, -5)])
def test_negative_numbers_never_count_from_the_end(make, off, size):
    with pytest.raises(TruncatedError):
        make(DATA).read_at(off, size)


def test_an_empty_source(make):
    source = make(b"")
    assert source.size == 0
    assert source.read_at(0, 0) == b""
    assert source.find(b"x", 0, 10) == -1
    with pytest.raises(TruncatedError):
        source.read_at(0, 1)


def test_find_gives_the_lowest_that_lies_wholly_inside(make):
    source = make(DATA)
    assert source.find(b"needle", 0, source.size) == 1024
    assert source.find(b"needle", 1025, source.size) == 1130
    assert source.find(b"needle", 0, 1029) == -1
    assert source.find(b"needle", 0, 1030) == 1024
    assert source.find(b"needle", 1131, HUGE) == -1
    assert source.find(b"needle", source.size, 0) == -1


@given(
    data=st.lists(st.sampled_from(b"ab"), max_size=60).map(bytes),
    needle=st.lists(st.sampled_from(b"ab"), min_size=1, max_size=4).map(bytes),
    before=st.lists(st.sampled_from(b"ab"), max_size=5).map(bytes),
    after=st.lists(st.sampled_from(b"ab"), max_size=5).map(bytes),
    start=st.integers(0, 70),
    end=st.integers(0, 70),
)
def test_find_is_that_of_bytes(data, needle, before, after, start, end):
    expected = data.find(needle, start, end)
    plain = BytesSource(data)
    inside = SliceSource(BytesSource(before + data + after), len(before), len(data))
    assert plain.find(needle, start, end) == expected
    assert inside.find(needle, start, end) == expected
    assert find_by_chunks(plain, needle, start, end) == expected


def test_find_by_chunks_sees_over_the_seam(monkeypatch):
    monkeypatch.setattr("kvmtool.source._FIND_CHUNK", 16)
    for at in range(60):
        data = bytes(at) + b"abc" + bytes(70 - at)
        assert find_by_chunks(BytesSource(data), b"abc", 0, len(data)) == at
        assert find_by_chunks(BytesSource(data), b"abc", at + 1, len(data)) == -1


def test_find_by_chunks_holds_a_chunk_at_a_time():
    class Counting(BytesSource):
        largest = 0

        def read_at(self, off, size):
            self.largest = max(self.largest, size)
            return super().read_at(off, size)

    source = Counting(bytes(5 << 20) + b"here")
    assert find_by_chunks(source, b"here", 0, source.size) == 5 << 20
    assert source.largest < (1 << 20) + 8


# slices


@pytest.mark.parametrize(("off", "size"), [(-1, 2), (0, -1), (0, 7), (6, 1), (7, 0), (HUGE, 1)])
def test_a_slice_must_lie_in_its_parent(off, size):
    with pytest.raises(TruncatedError) as caught:
        SliceSource(BytesSource(b"parent", "parent"), off, size)
    assert caught.value.source == "parent"


def test_a_slice_is_named_as_its_parent_or_as_told():
    parent = BytesSource(b"abcdef", "parent")
    assert SliceSource(parent, 1, 2).name == "parent"
    assert SliceSource(parent, 1, 2, "child").name == "child"


def test_closing_a_slice_leaves_the_parent_open(tmp_path):
    parent = _file(str(tmp_path), b"abcdef")
    SliceSource(parent, 1, 2).close()
    assert parent.read_at(0, 6) == b"abcdef"
    parent.close()


# files


def test_a_file_is_mapped_not_read(tmp_path):
    path = tmp_path / "sparse"
    with open(path, "wb") as out:
        out.truncate(1 << 40)  # a TiB that no memory holds
        out.seek((1 << 40) - 4)
        out.write(b"last")
    source = FileSource(str(path))
    assert source.size == 1 << 40
    assert source.read_at((1 << 40) - 4, 4) == b"last"
    source.close()


def test_a_closed_file_cannot_be_read(tmp_path):
    source = _file(str(tmp_path), b"abc")
    source.close()
    with pytest.raises(ValueError, match="closed"):
        source.read_at(0, 1)
    source.close()  # twice is once


def test_no_file_descriptor_stays_open(tmp_path):
    path = str(tmp_path / "data")
    with open(path, "wb") as out:
        out.write(b"abc")
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    source = FileSource(path)
    assert list(source.stored(0, 3)) == [(0, 3)]
    source.close()
    with pytest.raises(FormatError):
        FileSource(str(tmp_path))
    after = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    assert len(after) == len(before)


def sparse(path, size, **places):
    """A file of `size` bytes, all holes but a block at each of `places`."""
    with open(path, "wb") as out:
        for letter, at in places.items():
            out.seek(at)
            out.write(letter.encode() * 4096)
        out.truncate(size)
    if os.stat(path).st_blocks * 512 >= size:
        pytest.skip("this file system keeps no holes")
    return FileSource(str(path))


def test_the_holes_of_a_file_are_not_stored(tmp_path):
    source = sparse(tmp_path / "data", 64 << 20, a=1 << 20, b=32 << 20)
    parts = list(source.stored(0, source.size))
    assert parts == sorted(parts)
    assert sum(last - first for first, last in parts) < 1 << 20
    zeros = bytearray(source.size)
    for first, last in parts:
        zeros[first:last] = source.read_at(first, last - first)
    assert zeros == source.read_at(0, source.size)
    inside = (1 << 20) + 100
    assert list(source.stored(inside, inside + 50)) == [(inside, inside + 50)]
    assert list(source.stored(8 << 20, 9 << 20)) == []
    assert list(source.stored(0, 1 << 60)) == parts
    source.close()


def test_another_file_of_that_name_tells_nothing_of_holes(tmp_path):
    source = sparse(tmp_path / "data", 64 << 20, a=1 << 20)
    os.rename(tmp_path / "data", tmp_path / "moved")
    assert list(source.stored(5, 100)) == [(5, 100)]
    (tmp_path / "data").write_bytes(b"another")
    assert list(source.stored(5, 100)) == [(5, 100)]
    source.close()


def test_a_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_source(str(tmp_path / "nothing"))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FormatError, match="is a directory, expected a file") as caught:
        open_source(str(tmp_path))
    assert caught.value.source == str(tmp_path)
    assert caught.value.offset is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_no_file_and_is_not_waited_for(tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    with pytest.raises(FormatError, match="not a regular file"):
        open_source(path)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no /dev/zero here")
def test_an_endless_device_is_no_file():
    assert stat.S_ISCHR(os.stat("/dev/zero").st_mode)
    with pytest.raises(FormatError, match="not a regular file"):
        open_source("/dev/zero")


# open_source


def test_a_plain_file_is_opened_as_it_is(tmp_path):
    path = str(tmp_path / "plain")
    with open(path, "wb") as out:
        out.write(DATA)
    source = open_source(path)
    assert isinstance(source, FileSource)
    assert source.read_at(0, source.size) == DATA
    source.close()


@pytest.mark.parametrize("name", ["core.gz", "core"])
def test_gzip_is_seen_through_by_its_bytes(tmp_path, name):
    path = str(tmp_path / name)
    with gzip.open(path, "wb") as out:
        out.write(DATA)
    source = open_source(path)
    assert source.name == path
    assert source.size == len(DATA)
    assert source.read_at(1024, 6) == b"needle"
    assert source.find(b"needle", 1025, source.size) == 1130
    source.close()


@pytest.mark.parametrize("data", [b"", b"\x1f", b"core"])
def test_what_is_too_short_for_gzip_is_plain(tmp_path, data):
    path = str(tmp_path / "short.gz")
    with open(path, "wb") as out:
        out.write(data)
    source = open_source(path)
    assert source.size == len(data)
    source.close()


def test_a_gzip_magic_alone_is_an_error_of_ours(tmp_path):
    path = str(tmp_path / "half.gz")
    with open(path, "wb") as out:
        out.write(b"\x1f\x8b")
    with pytest.raises(KvmError) as caught:
        open_source(path)
    assert path in str(caught.value)
