"""What memory comes from: one file per container, and the visible list of them.

A format is recognised by its bytes, never by its name, and loaded only when its magic fits.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvmtool.errors import UnknownFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmtool.memory import Memory
    from kvmtool.source import Source

PROBE_SIZE = 65536
PLUGINS = "kvmtool.formats"  # entry-point group by which others add a format
UNSAID = 0  # cputype (no processor has it) where a container of bare memory does not say one


class Run(NamedTuple):
    """`size` bytes of memory at `address` in `space`, stored at file offset `offset`."""

    space: str
    address: int
    size: int
    offset: int


class Thread(NamedTuple):
    """The register sets of one CPU or thread: (flavor number, raw bytes)."""

    states: tuple[tuple[int, bytes], ...]


class Facts(NamedTuple):
    """What a container says of the kernel it holds; None is not said, never a guess.

    `kernel_address` is where the kernel's Mach-O header (its __TEXT) lies in kernel memory, `slide`
    bytes added to link addresses; `va_bits` how many bits of a kernel pointer are address; `said`
    maps each fact to the record that gave it. `control` are the control registers of each CPU by
    their usual names (cr3, idtr, TTBR1_EL1, ...).
    """

    cputype: int
    cpusubtype: int
    uuid: bytes | None = None
    version: str | None = None
    kernel_address: int | None = None
    slide: int | None = None
    va_bits: int | None = None
    threads: tuple[Thread, ...] = ()
    said: Mapping[str, str] = {}
    control: tuple[Mapping[str, int], ...] = ()


class Note(NamedTuple):
    """A note in a container: `size` bytes at file offset `offset`, `owner` says what they are."""

    owner: str
    offset: int
    size: int


class Format(Protocol):
    """A container of memory."""

    name: str
    live: bool
    source: Source
    facts: Facts
    notes: tuple[Note, ...]
    warnings: list[str]
    container: Any  # what this was taken out of: a Corefile, or None

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """Whether `head` (the first bytes, at most 64 KiB) begins such a file."""
        ...

    def __init__(self, source: Source) -> None:
        """Read the container's tables; reports everything that is wrong with them."""
        ...

    def runs(self) -> Iterator[Run]:
        """What memory there is, in file order."""
        ...

    def virtual(self) -> Memory | None:
        """The kernel's address space, where the container holds it directly."""
        ...

    def physical(self) -> Memory | None:
        """The machine's memory, where the container holds that."""
        ...


class FormatEntry(NamedTuple):
    """A format's name, its module and class, and the magics one of which its file begins with."""

    name: str
    module: str
    attribute: str
    magics: tuple[bytes, ...]


FORMATS = (
    FormatEntry(  # before macho-core: its files may say MH_CORE, too
        "mac-memory-reader",
        "kvmtool.formats.mac_memory_reader",
        "MacMemoryReader",
        (b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe"),
    ),
    FormatEntry(
        "macho-core",
        "kvmtool.formats.macho_core",
        "MachOCore",
        (b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe", b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf"),
    ),
    FormatEntry(
        "corefile",
        "kvmtool.formats.corefile",
        "Corefile",
        (b"Sad Mac\0", b"Rad Mac\0", b"Boss Mac"),
    ),
    FormatEntry("lime", "kvmtool.formats.lime", "Lime", (b"EMiL",)),
    FormatEntry("elf-core", "kvmtool.formats.elf_core", "ElfCore", (b"\x7fELF",)),
    FormatEntry("kdump", "kvmtool.formats.kdump", "Kdump", (b"KDUMP   ",)),
    FormatEntry("flattened", "kvmtool.formats.flattened", "Flattened", (b"makedumpfile\0",)),
    FormatEntry(
        "vmware",
        "kvmtool.formats.vmware",
        "Vmware",
        (
            *(b"\xd0\xbe\xd0\xbe", b"\xd0\xbe\xd2\xbe", b"\xd2\xbe\xd2\xbe"),
            *(b"\xd3\xbe\xd3\xbe", b"\xd1\xba\xd1\xba", b"\xd2\xba\xd2\xba"),
        ),
    ),
    FormatEntry("aff4", "kvmtool.formats.aff4", "Aff4", (b"PK\x03\x04",)),
    FormatEntry(  # its signature stands inside the header, behind sizes
        "sleepimage", "kvmtool.formats.sleepimage", "SleepImage", (b"",)
    ),
    FormatEntry("raw", "kvmtool.formats.raw", "Raw", ()),  # only by name: it has no magic
)
_PACKED = (  # gzip alone is read as it is: only it has an index to read from the middle
    (b"\xfd7zXZ\0", "xz -d"),
    (b"\x28\xb5\x2f\xfd", "zstd -d"),
    (b"BZh", "bzip2 -d"),
)


def identify(source: Source) -> FormatEntry:
    """The format whose probe accepts the bytes. Raises `UnknownFormatError`."""
    head = source.read_at(0, min(source.size, PROBE_SIZE))
    if not head:
        raise UnknownFormatError(source.name, 0, "the file is empty")
    tried = []
    for entry in _every():
        if head.startswith(entry.magics) and load(entry).probe(head):
            return entry
        tried.append(entry.name)
    packed = next((f"; {tool} unpacks it" for magic, tool in _PACKED if head.startswith(magic)), "")
    raise UnknownFormatError(
        source.name,
        0,
        f"no known format begins with {head[:8].hex(' ')} (tried {', '.join(tried)}){packed}",
    )


def by_name(name: str) -> FormatEntry:
    """The format called `name`. Raises `UnknownFormatError`."""
    known = []
    for entry in _every():
        if entry.name == name:
            return entry
        known.append(entry.name)
    raise UnknownFormatError(
        name, None, f"is no format kvmtool knows (expected one of {', '.join(known)})"
    )


def _every() -> Iterator[FormatEntry]:
    """The built-in formats, then those of the entry-point group, which cost more to look up."""
    yield from FORMATS
    from importlib.metadata import entry_points

    for point in entry_points(group=PLUGINS):
        yield FormatEntry(point.name, point.module, point.attr, (b"",))


def load(entry: FormatEntry) -> type[Format]:
    """The class of a format."""
    loaded: type[Format] = getattr(import_module(entry.module), entry.attribute)
    return loaded
