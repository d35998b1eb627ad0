"""AFF4 volumes of physical memory, as osxpmem, winpmem, linpmem and others write them.

There is no library for AFF4 that could be had (docs/decisions.md); what is inside a volume, RDF
and compressed chunks, is for the libraries of the extra `kvmtool[aff4]`.

Source: AFF4 Standard 1.0a (github.com/aff4/Standard); lexicon.inc, tools/pmem/osxpmem.cc and
pmem_imager.cc of c-aff4 (github.com/Velocidex/c-aff4).
"""

from __future__ import annotations

import re
from array import array
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from kvmtool.errors import UnsupportedError
from kvmtool.formats import UNSAID, Facts, Note, Run
from kvmtool.formats.aff4_map import MAPS, STREAMS, flat, read_map
from kvmtool.formats.aff4_volume import SCHEMA, Volume
from kvmtool.formats.elf_core import ElfCore
from kvmtool.memory import RunMemory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmtool.source import Source

_ZIP = b"PK\x03\x04"
# Members of a volume: its URN, its metadata, and streams by their URNs
_MEMBERS = (b"container.description", b"information.turtle", b"aff4:", b"aff4%3A")
_NAME_SIZE_AT, _NAME_AT = 26, 30  # of the first member, in its header
# what the first member of pmem's may be called, where it is too long for another to be seen
_FIRST = re.compile(
    rb"(?:PhysicalMemory|dev/\w+|proc/kcore)(?:/.*)?|.+/\d{8}(?:[./]index)?", re.DOTALL
)
_PHYSICAL, _IMAGE = SCHEMA + "memory/physical", SCHEMA + "MemoryImage"
_STEPS = 8  # from an image to its data
_SAID, _SAID_LIMIT = "information.yaml", 1 << 20  # what pmem says of the machine
_CR3 = re.compile(rb"^[ \t]*CR3:[ \t]*(0x[0-9a-fA-F]{1,16}|\d{1,20})[ \t\r]*$", re.MULTILINE)


class Aff4:
    """An AFF4 volume that holds an image of physical memory."""

    name = "aff4"
    live = False

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`."""
        if not head.startswith(_ZIP):
            return False
        size = int.from_bytes(head[_NAME_SIZE_AT : _NAME_SIZE_AT + 2], "little")
        first = head[_NAME_AT : _NAME_AT + size]
        return any(member in head for member in _MEMBERS) or _FIRST.fullmatch(first) is not None

    def __init__(self, source: Source) -> None:
        """Read the volume's directory, metadata and map. Raises `FormatError`.

        `UnsupportedError` for a volume without memory, for what is encrypted or compressed in an
        unknown way, and where a package of the extra `kvmtool[aff4]` is wanting.
        """
        self.source = source
        self.container: Any = None
        self.notes: tuple[Note, ...] = ()
        self._volume = Volume(source)
        self.warnings: list[str] = []
        urn = self._find_memory()
        types = self._types(urn)
        if types.isdisjoint(MAPS):
            self._runs = flat(self._volume, urn)
        else:
            self._runs = read_map(self._volume, urn, MAPS[0] not in types)
        self.warnings += self._runs.warnings
        if absent := sum(end - start for start, end in self._runs.lost):
            self.warnings.append(
                f"{absent:#x} bytes of {urn} are not in this volume, or could not be read"
            )
        self.facts = Facts(UNSAID, 0, control=tuple(self._control(urn)))
        self._elf = self._elf_inside() if types.isdisjoint(MAPS) else None

    def _types(self, urn: str) -> set[str]:
        return set(self._volume.objects.get(urn, {}).get("a", ()))

    def _find_memory(self) -> str:
        """The URN of the map or stream that is the memory."""
        objects = self._volume.objects
        found = sorted(
            {
                self._data_of(urn)
                for urn, said in objects.items()
                if _PHYSICAL in said.get("category", ()) or _IMAGE in said.get("a", ())
            }
        )
        if not found:
            kinds = {kind.removeprefix(SCHEMA) for urn in objects for kind in self._types(urn)}
            raise UnsupportedError(
                f"{self.source.name}: is an AFF4 volume without an image of physical memory (what "
                f"is in it: {', '.join(sorted(kinds))[:200] or 'nothing'})"
            )
        if found[1:]:
            others = ", ".join(found[1:])[:200]
            self.warnings.append(f"more than one image of memory: {found[0]} is read, not {others}")
        return found[0]

    def _data_of(self, urn: str) -> str:
        for _ in range(_STEPS):
            behind = self._volume.objects.get(urn, {}).get("dataStream")
            if not behind or not self._types(urn).isdisjoint((*MAPS, *STREAMS)):
                break
            urn = unquote(behind[0])
        return urn

    def _control(self, urn: str) -> Iterator[Mapping[str, int]]:
        """CR3 when pmem ran, whatever process that was."""
        said = f"{urn}/{_SAID}"
        if said in self._volume:
            match = _CR3.search(self._volume.read(said, _SAID_LIMIT))
            if match is not None:
                yield {"cr3": int(match[1], 0) & (1 << 64) - 1}

    def _elf_inside(self) -> ElfCore | None:
        """The ELF core that a stream without a map may be (pmem's --format elf)."""
        source = self._runs.source
        if self._runs.starts[:1] != array("Q", [0]):  # the volume does not hold its first bytes
            return None
        if not ElfCore.probe(source.read_at(0, min(64, source.size))):
            return None
        elf = ElfCore(source)
        self.name = f"{elf.name} ({self.name})"
        self.warnings += elf.warnings
        return elf

    def runs(self) -> Iterator[Run]:
        """See `Format.runs`; offsets are those in the streams, one after the other."""
        if self._elf is not None:
            yield from self._elf.runs()
            return
        runs = self._runs
        for start, end, at in zip(runs.starts, runs.ends, runs.offsets, strict=True):
            yield Run("physical", start, end - start, at)

    def virtual(self) -> None:
        """See `Format.virtual`: a kernel's address space has to be found in here."""

    def physical(self) -> RunMemory | None:
        """The machine's memory: where ranges overlap the first in the map wins."""
        if self._elf is not None:
            return self._elf.physical()
        runs = self._runs
        return RunMemory(
            runs.source,
            runs.starts,
            runs.ends,
            runs.offsets,
            space="physical",
            lost=runs.lost,
        )
