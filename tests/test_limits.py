"""The limits: what docs/limits.md says is what the code has, and what it has holds."""

from __future__ import annotations

import importlib
import os
import re
import struct
import tracemalloc

import pytest

from kvmtool import cache
from kvmtool.errors import ExpressionError, FormatError, KvmError
from kvmtool.expression import parse
from kvmtool.formats import elf_core, flattened, kdump, lime, vmware
from kvmtool.prelink_info import parse_plist
from kvmtool.source import BytesSource
from kvmtool.types import ctype, profile_zip
from kvmtool.types.ctype import Array, Base, Typedef, unqualified
from kvmtool.types.literal import LiteralError, parse_literal
from tests.builders import kdump as kdumps
from tests.builders import physical
from tests.builders import vmware as vmwares
from tests.inputs import ROOT
from tools import limits

PAGE = bytes(4096)
UNITS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50}


def told() -> dict[str, list[str]]:
    """The rows of the document, by the constant."""
    with open(os.path.join(ROOT, "docs", "limits.md"), encoding="utf-8") as file:
        rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", file.read(), re.MULTILINE)
    return {where: rest.split(" | ") for where, rest in rows}


def test_the_document_has_every_limit_and_no_other() -> None:
    assert set(told()) == {one.where for one in limits.constants()}
    assert len(told()) > 120


def test_the_numbers_are_those_of_the_code() -> None:
    compared = 0
    for where, (said, *_) in told().items():
        module, _, name = where.rpartition(".")
        value = getattr(importlib.import_module(f"kvmtool.{module}"), name)
        number = re.fullmatch(r"([\d,]+) ?([KMGTP]i)?", said)
        if isinstance(value, int):
            assert number is not None, where
            assert int(number[1].replace(",", "")) * UNITS[number[2] or ""] == value, where
            compared += 1
        else:
            assert said.startswith("`"), where
    assert compared > 120


def test_each_says_what_it_counts_and_what_happens_beyond() -> None:
    """A new one needs a comment, or a line in `WHAT`, and a line in `BEYOND`: tools/limits.py."""
    empty = [where for where, (_, what, beyond) in told().items() if not what or beyond == "?"]
    assert empty == []
    assert set(limits.BEYOND) <= set(told())


# Those that nothing else tests. Where the limit is far off, a near one takes its place.


def bare(data: bytes) -> BytesSource:
    return BytesSource(data, "dump")


def test_ranges_of_lime(monkeypatch) -> None:
    data = physical.lime(*((n << 13, PAGE) for n in range(4)))
    assert len(list(lime.Lime(bare(data)).runs())) == 4
    monkeypatch.setattr(lime, "_RANGES_LIMIT", 3)
    with pytest.raises(FormatError, match="more than 0x3 ranges"):
        lime.Lime(bare(data))


def test_segments_of_elf(monkeypatch) -> None:
    data = physical.elf(*(physical.Segment(PAGE, n << 13) for n in range(4)))
    assert len(list(elf_core.ElfCore(bare(data)).runs())) == 4
    monkeypatch.setattr(elf_core, "_SEGMENTS_LIMIT", 3)
    with pytest.raises(FormatError, match="0x4"):
        elf_core.ElfCore(bare(data))


def test_notes_of_elf_are_cut_with_a_warning(monkeypatch) -> None:
    notes = physical.qemu_note({"cr3": 0x1000}) * 4
    data = physical.elf(physical.Segment(notes, p_type=4), physical.Segment(PAGE))
    assert len(elf_core.ElfCore(bare(data)).notes) == 4
    monkeypatch.setattr(elf_core, "_NOTES_LIMIT", len(notes) - 8)
    cut = elf_core.ElfCore(bare(data))
    assert len(cut.notes) == 3
    assert cut.warnings


def test_records_of_flattened_files(monkeypatch) -> None:
    data = kdumps.flattened(*((n << 12, PAGE) for n in range(4)))
    assert flattened.FlattenedSource(bare(data)).size == 4 * 4096
    monkeypatch.setattr(flattened, "_RECORDS_LIMIT", 3)
    with pytest.raises(FormatError, match="more than 0x3 records"):
        flattened.FlattenedSource(bare(data))


def test_a_flattened_file_of_exabytes() -> None:
    far = kdumps.flattened((flattened._SIZE_LIMIT - 1, PAGE))
    with pytest.raises(FormatError, match="offset 0xffffffffffffff"):
        flattened.FlattenedSource(bare(far))


def test_bitmap_of_kdump(monkeypatch) -> None:
    data = kdumps.kdump({0: PAGE[:-1] + b"x"})
    kdump.Kdump(bare(data))
    monkeypatch.setattr(kdump, "_BITMAP_LIMIT", 4096)
    with pytest.raises(FormatError, match="0x2000"):
        kdump.Kdump(bare(data))


@pytest.mark.parametrize(
    ("name", "limit", "said"),
    [("_GROUPS_LIMIT", 1, "groups"), ("_TAGS_LIMIT", 3, "tags"), ("_REGIONS_LIMIT", 1, "region")],
)
def test_parts_of_a_machines_state(monkeypatch, name, limit, said) -> None:
    memory = [vmwares.Tag("Memory", PAGE * 6, (0, 0), 63), *vmwares.regions((0, 0, 4), (9, 4, 2))]
    cpu = [vmwares.number("cpu:numVCPUs", 2)]
    data = vmwares.state({"cpu": cpu, "memory": memory})
    assert list(vmware.Vmware(bare(data)).runs())
    monkeypatch.setattr(vmware, name, limit)
    with pytest.raises(FormatError, match=said):
        vmware.Vmware(bare(data))


@pytest.mark.parametrize(
    "text",
    ["1" * 4097, "(" * 49 + "1" + ")" * 49, "-" * 49 + "1", "+".join(["1"] * 200)],
    ids=["characters", "parentheses", "signs", "words"],
)
def test_expressions(text) -> None:
    with pytest.raises(ExpressionError, match=r"at most|deeper|more than"):
        parse(text, lambda _name: False)


def test_elements_in_elements() -> None:
    parse_plist(b"<array>" * 127 + b"</array>" * 127, "file", 0)
    with pytest.raises(FormatError, match="deeper than 128"):
        parse_plist(b"<array>" * 200 + b"</array>" * 200, "file", 0)


def test_lists_in_lists() -> None:
    assert parse_literal("[" * 20 + "1" + "]" * 20, 0)
    with pytest.raises(LiteralError, match="deeper than 32"):
        parse_literal("[" * 40 + "1" + "]" * 40, 0)


def test_typedefs_of_typedefs() -> None:
    found: ctype.CType = Base("int", 4)
    for number in range(ctype.DEPTH_LIMIT + 1):
        found = Typedef(f"t{number}", found)
    with pytest.raises(KvmError, match="more than 64 typedefs"):
        unqualified(found)


def test_arrays_of_arrays() -> None:
    found: ctype.CType = Base("int", 4)
    for _ in range(ctype.DEPTH_LIMIT + 2):
        found = Array(found, 2)
    with pytest.raises(KvmError, match="deeper than 64"):
        _ = found.size


def test_profiles(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(b"PK\3\4" + bytes(100))
    monkeypatch.setattr(profile_zip, "_FILE_LIMIT", 64)
    with pytest.raises(FormatError, match="at most 0x40 bytes"):
        profile_zip.read_profile(str(path))


def test_the_cache_makes_room(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KVMTOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "LIMIT", 1000)
    assert cache.store("kind", "first", bytes(600))
    os.utime(next(iter(tmp_path.iterdir())), (1, 1))
    assert cache.store("kind", "second", bytes(600))
    assert cache.load("kind", "first") is None
    assert cache.load("kind", "second") == bytes(600)
    assert not cache.store("kind", "third", bytes(2000))


def test_a_header_alone_takes_no_memory() -> None:
    """What it claims is held against the file before anything is made for it."""
    claim = struct.pack("<I", 0xFFFFFFFF)
    tracemalloc.start()
    try:
        lone = lime.Lime(bare(physical.lime_header(0, (1 << 40) - 1)))
        with pytest.raises(FormatError):
            elf_core.ElfCore(bare(physical.elf(extended=True)[:64] + claim * 10))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert lone.warnings
    assert peak < 1 << 20
