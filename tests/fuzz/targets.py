"""The parsers, each with what is asked of it. `TARGETS` is the list; `seeds` has their corpus."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
import zlib
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import kvmtool
from kvmtool import cache, formats, kernel_index, way_memo
from kvmtool.errors import KvmError
from kvmtool.evaluate import address_of, evaluate
from kvmtool.formats import gdb, gdb_packets, gdb_session, gdb_target, wkdm
from kvmtool.formats.flattened import FlattenedSource
from kvmtool.gzip_source import GzipSource
from kvmtool.kext_file import load_kext
from kvmtool.kext_search import with_files
from kvmtool.lz4_source import Lz4Source
from kvmtool.macho import MachO
from kvmtool.memory import RunMemory
from kvmtool.paging import PagedMemory
from kvmtool.peel import peel
from kvmtool.prelink_info import parse_plist, parse_prelink_info
from kvmtool.segment_table import segment_table
from kvmtool.source import BytesSource
from kvmtool.types import dsymutil
from kvmtool.types.ctf import ctf_of, open_ctf
from kvmtool.types.dwarf import open_dwarf
from kvmtool.types.isf import open_isf
from kvmtool.types.packed import PackedTypes
from kvmtool.types.type_names import parse_type
from kvmtool.types.vtypes import open_profile
from kvmtool.way_roots import walker
from tests.builders import profile
from tests.builders.pagetable import MODES
from tests.fuzz import looks
from tests.fuzz.scopes import scope
from tests.test_ctf import SORTED

if TYPE_CHECKING:
    from collections.abc import Callable

assert with_files  # loaded, so that it is traced


class Target(NamedTuple):
    """`run` gives the bytes to a parser; `seeds` names the function of `seeds` with its corpus."""

    run: Callable[[bytes], None]
    seeds: str


@functools.cache
def scratch() -> str:
    """A folder of this process for parsers that want a path."""
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = tempfile.mkdtemp(prefix="kvmtool-fuzz-", dir=shared)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _file(data: bytes, name: str = "input") -> str:
    path = os.path.join(scratch(), name)
    with open(path, "wb") as out:
        out.write(data)
    return path


def kernel(data: bytes) -> None:
    """A kernel's file in any wrapping: symbols, kexts, memory with its fixups."""
    with kvmtool.open(_file(data), arch="x86_64") as kvm:
        kvm.nlist(["_version", "_one", "_nothing"])
        addresses = [symbol.address for symbol in islice(kvm.symbols, 64)]
        for kext in islice(kvm.kexts, 16):
            addresses += [symbol.address for symbol in islice(kext.symbols, 8)]
        for address in [*addresses[:16], *looks.ENDS]:
            kvm.symbol_at(address)
            list(islice(kvm.memory.read_pieces(address, 64), 8))
        looks.memory(kvm.memory)


def macho(data: bytes) -> None:
    """A Mach-O by itself: every table, then as a kext at an address."""
    image = MachO(BytesSource(data, "image"))
    list(islice(image.commands(), 256))
    repr((image.segments, image.sections, image.uuid, image.notes[:16], image.warnings))
    segment_table(image)
    if image.symtab is not None:
        image.symtab.find("_version")
        list(islice(image.symtab, 256))
    kext = load_kext(image, 0xFFFFFF7F80001000 if image.is64 else 0x3BD01000)
    repr((kext.identifier, kext.version, kext.unresolved, kext.notes))
    looks.memory(kext.memory)


def container(module: str, attribute: str) -> Callable[[bytes], None]:
    """A container by its own class, and by its bytes."""

    def run(data: bytes) -> None:
        entry = formats.FormatEntry(attribute, f"kvmtool.formats.{module}", attribute, ())
        loaded: Any = formats.load(entry)
        loaded.probe(data[: formats.PROBE_SIZE])
        looks.dump(loaded(BytesSource(data, "dump")))

    return run


def corefile(data: bytes) -> None:
    """An on-disk corefile: its log, its members, the core inside."""
    from kvmtool.formats.corefile import Corefile

    core = Corefile(BytesSource(data, "corefile"))
    core.log()
    for member in core.members[:8]:
        with suppress(KvmError):
            looks.source(core.open_member(member))
    looks.source(core.open_member(core.kernel_member()))


def vmware(data: bytes) -> None:
    """Machine state with the memory inside, then with one beside it."""
    from kvmtool.formats.vmware import Vmware

    with suppress(KvmError):
        looks.dump(Vmware(BytesSource(data, "dump.vmss")))
    looks.dump(Vmware(BytesSource(data, "dump.vmss"), BytesSource(bytes(0x6000), "dump.vmem")))


def flattened(data: bytes) -> None:
    """The source that puts records in order, and what is in it."""
    looks.source(FlattenedSource(BytesSource(data, "dump")))
    container("flattened", "Flattened")(data)


def unwrap(data: bytes) -> None:
    """Every layer around a kernel: fat, IM4P, comp, LZSS, LZVN, LZFSE, gzip, xz, zstd."""
    peeled = peel(BytesSource(data, "packed"), "x86_64")
    looks.source(peeled.source)
    peeled.source.close()


def pages(data: bytes) -> None:
    """WKdm in each of its forms."""
    for form in (wkdm.FIRST, wkdm.SECOND):
        wkdm.fits(data[:16], len(data), form)
        with suppress(KvmError, ValueError):
            wkdm.unpack(data, form)


def packed(data: bytes) -> None:
    """gzip and LZ4 as cores are kept in."""
    source = BytesSource(data, "packed")
    opened: Any = GzipSource(source) if data[:1] == b"\x1f" else Lz4Source(source)
    looks.source(opened)
    repr(opened.truncated)


def dwarf(data: bytes) -> None:
    """DWARF in a Mach-O."""
    looks.types(open_dwarf(MachO(BytesSource(data, "made.dSYM"))))


def ctf(data: bytes) -> None:
    """CTF bare or in a Mach-O."""
    source = BytesSource(data, "types")
    if data[:2] in (b"\xcf\xfa", b"\xce\xfa", b"\xfe\xed"):
        looks.types(ctf_of(MachO(source)))
    else:
        looks.types(open_ctf(source, symbols=lambda: list(SORTED)))


def isf(data: bytes) -> None:
    """Volatility 3's types."""
    looks.types(open_isf(_file(data, "types.json")))


def vtypes(data: bytes) -> None:
    """A Volatility 2 profile: the zip file, or the text in it."""
    if data[:2] != b"PK":
        data = profile.archive({"a.vtypes": data.decode("latin-1")})
    looks.types(open_profile(_file(data, "types.zip")))


def listing(data: bytes) -> None:
    """dsymutil's listing of symbols."""
    text = data.decode("latin-1")
    list(dsymutil.entries(text))
    dsymutil.addresses(text)
    dsymutil.architecture(text)


def plist(data: bytes) -> None:
    """IOKit's dialect of property lists, and what kexts say in it."""
    parse_plist(data, "file", 0x1000)
    parse_prelink_info(data, "file", 0x1000, "x86_64")


def packets(data: bytes) -> None:
    """gdb packets from a stream, every reply read in every way."""
    at = 0
    for _ in range(4096):
        event, at = gdb_packets.next_event(data, at)
        if event is None:
            break
        for name in ("stop", "has_exited", "text", "late", "okay", "is_error", "memory", "binary"):
            getattr(gdb_packets, name)(event.payload)
        gdb_packets.part(event.payload)
        gdb_packets.output(event.payload)
        gdb_packets.expand(event.payload)
    text = data.decode("latin-1")
    found = gdb_target.describe(lambda _name: text)
    gdb_target.wanted_registers(found)
    gdb_target.ram(text)


class _Line:
    """A connection whose peer says `data`, a few bytes at a time, and then hangs up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def recv(self, size: int) -> bytes:
        """The next bytes."""
        part = self._data[self._at : self._at + min(size, 1500)]
        self._at += len(part)
        return part

    def sendall(self, _data: bytes) -> None:
        """Whatever we say, the peer goes on as it will."""

    setsockopt = close = lambda *_: None


def stub(data: bytes) -> None:
    """A whole session with a stub that says whatever it likes."""
    connect = gdb_session.socket.create_connection
    gdb_session.socket.create_connection = lambda *_: _Line(data)  # type: ignore[assignment]
    try:
        target = gdb.open_gdb("gdb://127.0.0.1:1")
        looks.dump(target)
        with suppress(KvmError):
            target.close()
    finally:
        gdb_session.socket.create_connection = connect


def page_tables(data: bytes) -> None:
    """The first byte chooses the mode, four more the root; the rest is physical memory."""
    if len(data) < 5:
        return
    names = sorted(MODES)
    root = int.from_bytes(data[1:5], "little")
    source = BytesSource(data[5:], "physical")
    physical = RunMemory.one(source) if hasattr(RunMemory, "one") else _whole(source)
    memory = PagedMemory(physical, walker(physical, names[data[0] % len(names)], root))
    for address in looks.ENDS:
        memory.walker.walk(address)
    for mapping in memory.mappings():
        repr(mapping)
    looks.memory(memory)


def _whole(source: BytesSource) -> RunMemory:
    from array import array

    ends = array("Q", [source.size])
    return RunMemory(source, array("Q", [0]), ends, array("Q", [0]), space="physical")


def expression(data: bytes) -> None:
    """A C expression, its address, and as the name of a type."""
    text = data.decode("utf-8", "surrogateescape")
    names = scope()
    for ask in (evaluate, address_of):
        with suppress(KvmError):
            repr(ask(text, names))
    parse_type(text, names.target.types.source)


def type_cache(data: bytes) -> None:
    """An entry of the cache of types."""

    class Behind:
        def __call__(self, kind: str, name: str) -> None:
            return None

    table = PackedTypes(data, Behind())
    looks.types(table)
    list(table.entries())


def cached(data: bytes) -> None:
    """Entries of the other caches: where the page tables are, which kernels there are."""
    previous = os.environ.get("KVMTOOL_CACHE")
    os.environ["KVMTOOL_CACHE"] = scratch()
    try:
        cache.store(way_memo._KIND, "x", data)
        way_memo.load("x")
        key, begin = kernel_index._key("/", ())
        cache.store(kernel_index._CACHE, key, begin + data)
        kernel_index._recall("/", ())
    finally:
        if previous is None:
            del os.environ["KVMTOOL_CACHE"]
        else:
            os.environ["KVMTOOL_CACHE"] = previous


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("procs",),
    ("procs", "--format", "json"),
    ("threads",),
    ("kexts",),
    ("mounts",),
    ("dmesg",),
    ("devsw",),
    ("syscalls",),
    ("sysctl",),
    ("info",),
    ("regions",),
    ("args",),
    ("backtrace",),
    ("check",),
    ("cpus",),
    ("files",),
    ("host",),
    ("load",),
    ("net",),
    ("panic",),
    ("vm",),
    ("vmmap", "kernel"),
    ("vmmap", "1"),
    ("zones",),
    ("symbols",),
    ("search", "kern"),
    ("print", "*allproc.lh_first"),
    ("walk", "allproc", "--next", "p_list", "-o", "p_pid,p_comm"),
    ("read", "_version", "64"),
)


def commands(data: bytes) -> None:
    """A dump that the commands read, one of them for each input."""
    from click.testing import CliRunner

    from kvmtool.cli import cli

    arguments = COMMANDS[zlib.crc32(data) % len(COMMANDS)]
    result = CliRunner().invoke(cli, ["-M", _file(data), *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output, "an escape reached the terminal"
    if "json" in arguments and result.exit_code in (0, 3):
        json.loads(result.stdout)


TARGETS: dict[str, Target] = {
    "aff4": Target(container("aff4", "Aff4"), "aff4"),
    "cached": Target(cached, "cached"),
    "codecs": Target(packed, "codecs"),
    "commands": Target(commands, "cores"),
    "corefile": Target(corefile, "corefile"),
    "ctf": Target(ctf, "ctf"),
    "dwarf": Target(dwarf, "dwarf"),
    "elf-core": Target(container("elf_core", "ElfCore"), "elf_core"),
    "expression": Target(expression, "expression"),
    "flattened": Target(flattened, "flattened"),
    "gdb-packets": Target(packets, "gdb_packets"),
    "gdb-stub": Target(stub, "gdb_stub"),
    "isf": Target(isf, "isf"),
    "kdump": Target(container("kdump", "Kdump"), "kdump"),
    "kernel": Target(kernel, "kernel"),
    "lime": Target(container("lime", "Lime"), "lime"),
    "listing": Target(listing, "listing"),
    "mac-memory-reader": Target(
        container("mac_memory_reader", "MacMemoryReader"), "mac_memory_reader"
    ),
    "macho": Target(macho, "macho"),
    "macho-core": Target(container("macho_core", "MachOCore"), "macho_core"),
    "page-tables": Target(page_tables, "page_tables"),
    "peel": Target(unwrap, "peel"),
    "plist": Target(plist, "plist"),
    "sleepimage": Target(container("sleepimage", "SleepImage"), "sleepimage"),
    "type-cache": Target(type_cache, "type_cache"),
    "vmware": Target(vmware, "vmware"),
    "vtypes": Target(vtypes, "vtypes"),
    "wkdm": Target(pages, "wkdm"),
}
