"""Thousands of damaged files of types through their readers: one-line errors, bounded costs.

`KVMTOOL_MUTATIONS` says how many, as in test_mutations; the seed of a case is its number.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import time
import warnings
import zipfile
from typing import TYPE_CHECKING

import pytest

from kvmtool.errors import KvmError, KvmWarning
from kvmtool.macho import MachO, is_macho
from kvmtool.source import FileSource
from kvmtool.types.ctf import ctf_of, is_ctf, open_ctf
from kvmtool.types.ctype import Array, Compound, Enum, Function, Pointer
from kvmtool.types.declare import declare
from kvmtool.types.isf import open_isf
from kvmtool.types.model import TypeTable
from kvmtool.types.vtypes import is_profile, open_profile
from tests.builders import ctf as build
from tests.builders import macho as images
from tests.builders import profile
from tests.test_ctf import SORTED, some_of_each
from tests.test_isf import content
from tests.test_mutations import BYTES, CASES, SECONDS, mutated
from tests.test_vtypes import PROC, SYMBOLS, UNCOUNTED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.types.ctype import CType
    from kvmtool.types.model import TypeSource


def _files() -> Iterator[bytes]:
    """One small file of every kind."""
    for version, order in ((2, "<"), (3, ">"), (4, "<"), (4, ">")):
        yield some_of_each(version, order).build()
    yield some_of_each(2, "<").build(compress=True)
    yield _kernel(some_of_each(2, "<").build())
    isf = content()
    yield json.dumps(isf).encode()
    yield json.dumps(isf, indent=1).encode()
    files = {"a.symbol.dsymutil": SYMBOLS, "a.vtypes": profile.vtypes(PROC)}
    yield profile.archive(files, zipfile.ZIP_STORED)
    yield profile.archive(files)
    yield profile.vtypes(PROC).encode()
    yield profile.vtypes(UNCOUNTED).encode()


def _file(data: bytes, case: int | None = None) -> bytes:
    """`data`, damaged; vtypes are put into their zip after that, whose checksum would tell."""
    damaged = bytearray(data if case is None else mutated(data, case))
    if case is not None and data[:1] in b"m{" and damaged:
        chance = random.Random(case)
        for _ in range(chance.choice((0, 1, 2, 8))):
            damaged[chance.randrange(len(damaged))] = chance.choice(b"[]{}'\"0x,: L")
    if data.startswith(b"mac_types"):
        return profile.archive({"a.vtypes": damaged.decode("latin-1")})
    return bytes(damaged)


def _kernel(ctf: bytes) -> bytes:
    image = images.MachO("x86_64", 2, 1)
    at = 0xFFFFFF8000200000
    image.segment("__CTF", at, ctf, sections=[images.Section("__ctf", "__CTF", at, len(ctf))])
    image.symtab([images.Sym(symbol.name, at, n_sect=1) for symbol in SORTED])
    return image.build()


def _open(path: str) -> TypeSource | None:
    source = FileSource(path)
    head = source.read_at(0, min(16, source.size))
    if is_macho(head[:4]):
        return ctf_of(MachO(source))
    if is_ctf(head):
        symbols = list(SORTED)
        return open_ctf(source, symbols=lambda: symbols)
    return open_profile(path) if is_profile(source) else open_isf(path)


def _look_at(path: str) -> None:
    """Everything a user may ask of a file of types."""
    types = _open(path)
    if types is None:
        return
    table = TypeTable(types)
    for kind in ("tag", "typedef", "base"):
        for name in list(types.names(kind))[:64]:
            _walk(types.find(kind, name))
    for tag in table.structs()[:64]:
        table.find_struct(tag)
    for name in ("nprocs", "version", "bread", "allproc"):
        found = types.variable(name)
        if found is not None:
            declare(found, name)
    for extra in ("addresses", "entries"):
        list(getattr(types, extra, list)())


def _walk(found: CType | None, depth: int = 0) -> None:
    if found is None or depth > 3:
        return
    declare(found, "x")
    if isinstance(found, Compound):
        for field in found.fields:
            _walk(field.type, depth + 1)
    elif isinstance(found, Enum):
        list(found.values)
    elif isinstance(found, Function):
        _walk(found.result, depth + 1)
    elif isinstance(found, (Pointer, Array)):
        _walk(found.target, depth + 1)


def _refusal(path: str) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KvmWarning)
        try:
            _look_at(path)
        except KvmError as error:
            return str(error)
    return None


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return list(_files())


def test_every_file_opens_before_it_is_damaged(files: list[bytes], tmp_path) -> None:
    path = str(tmp_path / "types")
    for number, data in enumerate(files):
        with open(path, "wb") as file:
            file.write(_file(data))
        assert _refusal(path) is None, number


def test_only_one_line_errors(files: list[bytes], tmp_path) -> None:
    path = str(tmp_path / "types")
    refused = 0
    for case in range(CASES):
        with open(path, "wb") as file:
            file.write(_file(files[case % len(files)], case))
        began = time.process_time()
        message = _refusal(path)
        refused += message is not None
        assert "\n" not in (message or ""), f"case {case}"
        took = time.process_time() - began
        assert took < SECONDS, f"case {case} took {took:.1f} s"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert refused > CASES / 10
    assert peak < BYTES or CASES < 2000, f"peak memory {peak >> 20} MiB"


def test_names_of_several_lines(tmp_path) -> None:
    """Names go into messages: a new line in one must not."""
    ctf = build.Ctf()
    ctf.compound(build.STRUCT, "new\nline", 8, [("m\nn", 0, 99)])
    path = str(tmp_path / "types")
    with open(path, "wb") as file:
        file.write(ctf.build())
    assert "\n" not in (_refusal(path) or "\n")


ODD = (None, True, -1, 0, 1 << 70, 1.5, "", "x\ny", [], {}, {"kind": "struct", "name": "proc"})


def test_isf_with_any_value_anywhere(tmp_path) -> None:
    """JSON that is well-formed and means nothing."""
    path = str(tmp_path / "types")
    refused = 0
    for case in range(CASES):
        chance = random.Random(case)
        parts = content()
        for _ in range(chance.choice((1, 1, 3))):
            _put(parts, copy.deepcopy(chance.choice(ODD)), chance)
        with open(path, "w") as file:
            json.dump(parts, file)
        message = _refusal(path)
        refused += message is not None
        assert "\n" not in (message or ""), f"case {case}"
    assert refused > CASES / 10


def _put(parts: object, value: object, chance: random.Random) -> None:
    """`value` in the place of something in `parts`, at any depth."""
    while isinstance(parts, dict) and parts:
        key = chance.choice(list(parts))
        if not isinstance(parts[key], dict) or chance.random() < 0.2:
            parts[key] = value
            return
        parts = parts[key]
