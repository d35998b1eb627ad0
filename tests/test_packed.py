"""Types in the cache: the same as those they were made from, and nothing worse than absent."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import shutil
import struct

import pytest

from kvmtool import cache, type_files
from kvmtool.errors import FormatError, KvmError
from kvmtool.source import FileSource
from kvmtool.type_files import KernelIdentity, open_types
from kvmtool.type_readers import read_types
from kvmtool.types import layouts, packed
from kvmtool.types.ctype import (
    Array,
    Base,
    Compound,
    Enum,
    Field,
    Function,
    Opaque,
    Pointer,
    Qualified,
    Typedef,
    Void,
)
from kvmtool.types.declare import declare
from kvmtool.types.flatten import flatten
from kvmtool.types.packed import COLUMNS, HEADER, Identity, PackedTypes
from kvmtool.types.packer import pack
from kvmtool.types.remembered import KIND, Remembered, recall
from tests.inputs import real

CTF = "types/x86_64-xnu-2422.115.4.ctfdata"
OBJECT = "objects/x86_64-xnu-2422.115.4-kern_proc.o"
FILES = (
    OBJECT,
    "objects/ppc-xnu-792.25.20-kern_proc.o",
    CTF,
    "types/x86_64-10.13.6.types.json.gz",
    "profiles/Mavericks_10.9.4_13e28.zip",
)


@functools.cache
def source_of(name):
    return read_types([FileSource(real(name))], None, 8).source


def told(ctype, depth=0):
    """All there is to say of a type, as text; what a pointer leads to by its declaration."""
    if isinstance(ctype, Compound) and (depth == 0 or not ctype.tag):
        inside = [(field.name, told(field.type, depth + 1), *field[2:]) for field in ctype.fields]
        return f"{ctype.kind} {ctype.tag} {ctype.size} {inside if depth < 20 else ''}"
    if isinstance(ctype, Enum):
        return f"enum {ctype.tag} {ctype.size} {ctype.signed} {list(ctype.values)}"
    if isinstance(ctype, (Typedef, Qualified)) and depth < 20:
        name = ctype.name if isinstance(ctype, Typedef) else ctype.qualifier
        return f"{ctype.kind} {name} {told(ctype.target, depth + 1)}"
    if isinstance(ctype, Array) and depth < 20:
        return f"array {ctype.count} {told(ctype.target, depth + 1)}"
    if isinstance(ctype, Base):
        return f"base {ctype.name} {ctype.size} {ctype.form} {ctype.signed}"
    more = ctype.ptrauth if isinstance(ctype, Pointer) else None
    return f"{ctype.kind} {declare(ctype)} {ctype.size} {more}"


# ------------------------------------------------------------------------------ the same


@pytest.mark.parametrize("name", FILES)
def test_everything_comes_back(name):
    source = source_of(name)
    again = PackedTypes(pack(source))
    compared = 0
    for kind in ("tag", "typedef", "base"):
        known = sorted(set(source.names(kind)))
        assert sorted(again.names(kind)) == known
        for one in known:
            before, after = source.find(kind, one), again.find(kind, one)
            assert told(after) == told(before), (kind, one)
            compared += len(before.fields) if isinstance(before, Compound) else 1
    assert compared > (20_000 if "objects" not in name else 300)
    assert again.find("tag", "no such thing") is None
    assert again.knows("tag", "no such thing")
    assert (again.name, again.origin) == (source.name, source.origin)
    assert (again.byteorder, again.pointer_size) == (source.byteorder, source.pointer_size)


@pytest.mark.parametrize("name", FILES)
def test_what_was_asked_for_comes_back(name):
    """With what lies in it; pointers lead on by name, to the source behind."""
    source = source_of(name)
    roots = [("tag", "proc"), ("tag", "pgrp"), ("typedef", "pid_t"), ("tag", "nonesuch")]
    content = pack(source, [*roots, ("variable", "allproc")])
    asked = []

    def behind(kind, one):
        asked.append((kind, one))
        return source.find(kind, one)

    again = PackedTypes(content, behind)
    assert len(content) < 16_000
    for kind, one in roots:
        assert again.knows(kind, one)
        before = source.find(kind, one)
        after = again.find(kind, one)
        assert (before is None) == (after is None)
        if before is not None:
            assert told(after) == told(before)
    flat = flatten(again.find("tag", "proc"))
    assert flat.members == flatten(source.find("tag", "proc")).members
    assert not again.knows("tag", "session")
    asked.clear()
    assert again.find("tag", "session").size == source.find("tag", "session").size
    assert asked == [("tag", "session")]


def test_every_layout_can_be_packed():
    types = layouts.table("15.5 arm64")
    again = PackedTypes(pack(types.source))
    for tag in types.structs():
        assert told(again.find("tag", tag)) == told(types.source.find("tag", tag))


class Made:
    """A source of given types."""

    name, origin, byteorder, pointer_size = "made", "test", ">", 4

    def __init__(self, **types):
        self._types = types

    def find(self, kind, name):
        return self._types.get(name) if kind == "tag" else None

    def names(self, kind):
        return list(self._types) if kind == "tag" else []

    def variable(self, name):
        return None


def test_every_kind_of_type():
    u = Base("unsigned int", 4, "int", signed=False)
    every = Compound(
        "union",
        "every",
        1 << 40,
        lambda: [
            Field("a", Pointer(lambda: every, 8, ptrauth=0xFFFFFFFF), 0),
            Field(None, Compound("class", None, 8, [Field("x", u, 4, 31, 1)]), 8),
            Field("f", Pointer(Function(Void(), [u, Pointer(u, 8)], variadic=True), 8), 16),
            Field("g", Pointer(Function(u), 8), 24),
            Field("h", Pointer(Function(u, []), 8), 24),
            Field("flexible", Array(Array(u, 3), None), 32),
            Field("é\udcff", Qualified("const", Typedef("t", Opaque(12))), -8),
            Field("e", Enum("e", 8, [("BIG", 2**64 - 1), ("LOW", -(2**63))], signed=False), 40),
            Field("d", Enum("declared", None), 48),
            Field("z", Base("_Bool", 1, "bool", signed=False), 48, 0, 0),
        ],
    )
    content = pack(Made(every=every, declared=Compound("struct", "declared", None)))
    again = PackedTypes(content)
    after = again.find("tag", "every")
    assert told(after) == told(every)
    assert after.fields[0].type.target is after
    assert again.find("tag", "declared").size is None
    assert (again.byteorder, again.pointer_size) == (">", 4)
    e = after.fields[7].type
    assert e.values == [("BIG", 2**64 - 1), ("LOW", -(2**63))]


def test_what_does_not_fit_is_refused():
    def packed_fields(*fields):
        return pack(Made(a=Compound("struct", "a", 8, list(fields))))

    u = Base("int", 4)
    endless = Typedef("t", lambda: endless)
    for field in (
        Field("a", u, 1 << 70),
        Field("a\0b", u, 0),
        Field("a", u, 0, 1 << 40, 1),
        Field("a", Enum("e", 4, [("x", 1 << 70)]), 0),
        Field("a", endless, 0),
    ):
        with pytest.raises(KvmError):
            packed_fields(field)


# ------------------------------------------------------------------------------ damage


@functools.cache
def good():
    """A small table with every column in use."""
    e = Enum("e", 4, [("A", 1), ("B", -1)])
    u = Base("int", 4)

    def fields():
        return [
            Field("next", Pointer(s, 8), 0),
            Field("e", e, 8),
            Field("f", Pointer(Function(u, [u, Pointer(s, 8)]), 8), 16),
            Field("b", u, 24, 3, 2),
            Field("t", Typedef("word", Qualified("const", Array(u, 2))), 28),
        ]

    s = Compound("struct", "s", 40, fields)
    return pack(Made(s=s, e=e), [("tag", "s"), ("tag", "e"), ("tag", "none")])


def walk(types):
    """Look at everything; the number of types seen."""
    seen = 0
    waiting = [types.find(kind, name) for kind, name in types.entries()]
    known = set()
    while waiting and seen < 10_000:
        ctype = waiting.pop()
        if ctype is None or id(ctype) in known:
            continue
        known.add(id(ctype))
        seen += 1
        if isinstance(ctype, (Pointer, Array, Typedef, Qualified)):
            waiting.append(ctype.target)
        elif isinstance(ctype, Compound):
            waiting += [field.type for field in ctype.fields]
        elif isinstance(ctype, Enum):
            assert all(isinstance(value, int) for _, value in ctype.values)
        elif isinstance(ctype, Function):
            waiting += [ctype.result, *(ctype.parameters or ())]
        assert ctype.name is None or isinstance(ctype.name, str)
        try:
            assert isinstance(ctype.size, (int, type(None)))
            declare(ctype, "x")
        except KvmError:
            continue
    return seen


def test_cut_anywhere_is_refused():
    content = good()
    assert walk(PackedTypes(content)) > 8
    for size in range(len(content)):
        with pytest.raises(FormatError):
            PackedTypes(content[:size])
    with pytest.raises(FormatError):
        PackedTypes(content + b"\0")


def test_any_byte_changed_is_refused_or_harmless():
    content = good()
    refused = 0
    for at in range(len(content)):
        for value in (0, 1, 0x7F, 0x80, 0xFF, content[at] ^ 1):
            mutant = content[:at] + bytes([value]) + content[at + 1 :]
            try:
                walk(PackedTypes(mutant))
            except FormatError:
                refused += 1
    assert refused > 1000


def test_many_bytes_changed_are_refused_or_harmless():
    content = good()
    chance = random.Random(5)
    start = HEADER.size + 4 * len(COLUMNS)
    for _ in range(3000):
        mutant = bytearray(content)
        for _ in range(chance.randrange(1, 30)):
            mutant[chance.randrange(start, len(mutant))] = chance.choice((0, 1, 2, 10, 255))
        try:
            walk(PackedTypes(bytes(mutant)))
        except FormatError:
            continue


def test_a_name_that_leads_to_itself_is_refused():
    """An index entry whose node says: what the source has under this name."""
    node = pack(Made(s=Compound("struct", "s", 8, ())), [("tag", "s")])
    table = PackedTypes(node)
    at = HEADER.size + 4 * len(COLUMNS)
    mutant = bytearray(node)
    mutant[at] = packed.NAMED  # the first column: kinds
    mutant[at + 1] = 0
    assert table.entries() == [("tag", "s")]
    with pytest.raises(FormatError, match="a name leads to a name"):
        PackedTypes(bytes(mutant))


def test_lengths_beyond_the_file_are_refused():
    content = bytearray(good())
    for column in range(len(COLUMNS)):
        for length in (0xFFFFFFFF, 0x7FFFFFFF, 0):
            mutant = bytearray(content)
            struct.pack_into("<I", mutant, HEADER.size + 4 * column, length)
            with pytest.raises(FormatError):
                PackedTypes(bytes(mutant))


# ------------------------------------------------------------------------------ in the cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ask(path, *names):
    """Open a file as a command does, ask, close; the sizes found."""
    found = open_types(path, KernelIdentity("x86_64", "<", 8))
    sizes = []
    for name in names:
        ctype = found.source.find("tag", name)
        sizes.append(None if ctype is None else ctype.size)
    for one in found.held:
        one.close()
    return sizes


def forbid(monkeypatch):
    def never(*_):
        raise AssertionError("the file is read again")

    monkeypatch.setattr(type_files, "read_types", never)


def test_the_second_time_the_file_is_not_read(folder, monkeypatch, tmp_path):
    path = shutil.copy(real(CTF), tmp_path / "kernel.ctfdata")
    assert ask(path, "proc", "nonesuch") == [1192, None]
    (entry,) = os.listdir(folder)
    assert entry.startswith(KIND)
    assert (folder / entry).stat().st_size < 10_000
    with monkeypatch.context() as patch:
        forbid(patch)
        assert ask(path, "proc", "nonesuch", "proc") == [1192, None, 1192]
        found = open_types(path, KernelIdentity("x86_64", "<", 8))
    assert ask(path, "task", "proc") == [960, 1192]
    with monkeypatch.context() as patch:
        forbid(patch)
        assert ask(path, "proc", "task", "nonesuch") == [1192, 960, None]
    assert found.source.name == "kernel.ctfdata"


def test_another_file_is_another_entry(folder, tmp_path):
    path = tmp_path / "types"
    shutil.copy(real(CTF), path)
    assert ask(str(path), "proc") == [1192]
    os.unlink(path)
    shutil.copy(real("types/x86_64-10.8.5.types.json.gz"), path)
    assert ask(str(path), "proc") == [0x460]
    assert len(os.listdir(folder)) == 2


def spoilt(content, how):
    """An entry, damaged in one of several ways."""
    if how == "cut":
        return content[:-7]
    if how == "flipped":
        return content[:-40] + bytes([content[-40] ^ 0xFF]) + content[-39:]
    return b"" if how == "empty" else b"something else entirely" * 9


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "other"])
def test_a_damaged_entry_is_made_anew(folder, how):
    path = real(CTF)
    ask(path, "proc")
    (name,) = os.listdir(folder)
    entry = folder / name
    whole = entry.read_bytes()
    entry.write_bytes(spoilt(whole, how))
    assert ask(path, "proc") == [1192]
    assert entry.read_bytes() == whole


def test_an_entry_of_another_version_is_made_anew(folder):
    """Whole and undamaged for the cache, but not in the form that is read today."""
    path = real(CTF)
    ask(path, "proc")
    (name,) = os.listdir(folder)
    key = name.removeprefix(f"{KIND}-").removesuffix(".kvmcache")
    content = cache.load(KIND, key)
    for other in (b"KVMTYPE0" + content[8:], content[:8] + b"\xff" * 300, b""):
        cache.store(KIND, key, other)
        assert recall(key) is None
        assert ask(path, "proc") == [1192]
        assert cache.load(KIND, key) == content


def test_types_of_another_kernel_are_refused_from_the_cache_too(folder, monkeypatch):
    path = real("kexts/fat-ppc-i386-zfs-102A.dSYM")
    kernel = KernelIdentity("i386", "<", 4)
    found = open_types(path, kernel)
    assert found.source.find("tag", "no such structure") is None
    found.held[0].close()
    with monkeypatch.context() as patch:
        forbid(patch)
        with pytest.raises(KvmError, match="the kernel is 00000000-"):
            open_types(path, kernel._replace(uuid=bytes(16)))


def test_without_a_cache(monkeypatch):
    monkeypatch.setenv("KVMTOOL_CACHE", "")
    assert ask(real(CTF), "proc") == [1192]
    monkeypatch.setenv("KVMTOOL_CACHE", "/proc/nonexistent")
    assert ask(real(CTF), "proc") == [1192]


def _one_process(path, names):
    assert None not in ask(path, *names)


def test_processes_at_the_same_time(folder):
    """The entry is whole at any time, and what is in it is right."""
    path = real(CTF)
    tags = ["proc", "task", "thread", "vnode", "cdevsw", "mount", "zone", "ifnet", "inpcb"]
    context = multiprocessing.get_context("spawn")
    for turn in range(2):
        others = [
            context.Process(target=_one_process, args=(path, tags[at + turn : at + turn + 3]))
            for at in range(0, 6, 2)
        ]
        for other in others:
            other.start()
        for other in others:
            other.join(60)
            assert other.exitcode == 0
    assert ask(path, "proc", "task", "thread", "vnode", "cdevsw", "mount", "zone") == [
        *(1192, 960, 1104, 240, 112, 2560, 288)
    ]
    (name,) = os.listdir(folder)
    known = recall(name.removeprefix(f"{KIND}-").removesuffix(".kvmcache"))
    assert ("tag", "proc") in known.entries()


def test_a_source_that_fails_is_asked_again(folder):
    """What raises is not remembered as absent."""

    class Broken(Made):
        def find(self, kind, name):
            raise FormatError("types", 4, "damaged")

    identity = Identity("made", "test", "<", 8)
    source = Remembered("key", identity, Broken)
    with pytest.raises(FormatError, match="damaged"):
        source.find("tag", "proc")
    source.close()
    assert recall("key") is None
    again = Remembered("key", identity, lambda: Made(proc=Compound("struct", "proc", 8, ())))
    assert again.find("tag", "proc").size == 8
    again.close()
    assert recall("key").knows("tag", "proc")


def test_an_entry_stays_small(folder, monkeypatch):
    from kvmtool.types import remembered

    monkeypatch.setattr(remembered, "_MOST", 3)
    made = Made(**{f"s{n}": Compound("struct", f"s{n}", 8, ()) for n in range(9)})
    source = Remembered("key", Identity("made", "test", "<", 8), lambda: made)
    for name in ("s0", "s1"):
        source.find("tag", name)
    source.close()
    more = Remembered("key", Identity("made", "test", "<", 8), lambda: made, recall("key"))
    for name in ("s0", "s2", "s3"):
        assert more.find("tag", name).size == 8
    more.close()
    assert recall("key").entries() == [("tag", "s0"), ("tag", "s1")]
