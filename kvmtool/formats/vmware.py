"""VMware's machine state (.vmss of a suspended machine, .vmsn of a snapshot) and its memory.

The state is groups of tagged values. Memory is one of them, or a file of the same name that ends in
.vmem; where it has regions it is no image from address 0 on: what lies above the hole for devices
follows directly what lies below. VMware writes bigger values as blocks, aligned by a padding.

Source: vmware_vmss.h and vmware_vmss.c of crash (contributed by VMware), Volatility 2's
addrspaces/vmware.py for checkpoints with 32-bit sizes.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, TruncatedError, UnsupportedError
from kvmtool.formats import UNSAID, Facts
from kvmtool.formats.run_table import RunTable
from kvmtool.source import FileSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmtool.source import Source

# Magic to bytes of a block's sizes: 4 in the checkpoints of old versions
_MAGICS = {
    0xBED0BED0: 4,
    0xBED2BED0: 4,
    0xBED2BED2: 8,
    0xBED3BED3: 8,
    0xBAD1BAD1: 8,
    0xBAD2BAD2: 8,
}
_HEADER = Struct("<3I")  # magic, version, number of groups
_GROUP = Struct("<64s2Q")  # name, offset of its first tag, size
_INDEX = Struct("<I")
_GROUPS_LIMIT, _TAGS_LIMIT = 4096, 1 << 20
_COMPRESSED, _BLOCK = 62, 63  # instead of the size of a value
_VALUE_LIMIT = 8  # bytes of a number
_PAGE = 4096
_REGIONS_LIMIT = 1 << 16
_CPUS_LIMIT = 4096
_STATES, _MEMORY = (".vmss", ".vmsn"), ".vmem"
_CR_NAMES = ("cr0", "cr1", "cr2", "cr3", "cr4")


class Tag(NamedTuple):
    """A value: `size` bytes at file offset `offset`."""

    name: str
    indices: tuple[int, ...]
    offset: int
    size: int
    compressed: bool


class Vmware(RunTable):
    """A machine's state, and the memory in it or beside it.

    Run offsets are those in `memory_source`: the state's file, or the .vmem.
    """

    name = "vmware"
    piece = "region"

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`."""
        return len(head) >= _HEADER.size and _HEADER.unpack_from(head)[0] in _MAGICS

    def __init__(self, source: Source, memory: Source | None = None) -> None:
        """Read the groups; `memory` is the .vmem, else it is looked for beside `source`.

        Raises OSError, `FormatError`, or `UnsupportedError` where there is no memory.
        """
        super().__init__(source)
        self._groups = self._read_groups()
        found: dict[tuple[str, tuple[int, ...]], int] = {}
        inside: Tag | None = None
        for tag in self._tags("memory"):
            if tag.name == "Memory" and tag.size > _VALUE_LIMIT:
                inside = inside or tag
            elif tag.size <= _VALUE_LIMIT:
                found[tag.name, tag.indices] = self._number(tag)
        self.memory_source, base, size = self._find_memory(inside, memory)
        self._take_regions(found, base, size)
        self.facts = Facts(UNSAID, 0, control=tuple(self._control()))

    def _read_groups(self) -> dict[str, int]:
        source = self.source
        if source.size < _HEADER.size:
            raise TruncatedError(source.name, 0, _HEADER.size, source.size, "VMware header")
        magic, _, count = _HEADER.unpack(source.read_at(0, _HEADER.size))
        if magic not in _MAGICS:
            raise FormatError(source.name, 0, f"{magic:#x} is no magic of a VMware state")
        self._word = Struct("<I" if _MAGICS[magic] == 4 else "<Q")
        size = count * _GROUP.size
        if count > _GROUPS_LIMIT or _HEADER.size + size > source.size:
            raise FormatError(source.name, 8, f"{count:#x} groups, the file has {source.size:#x}")
        groups: dict[str, int] = {}
        for name, offset, _ in _GROUP.iter_unpack(source.read_at(_HEADER.size, size)):
            groups.setdefault(name.partition(b"\0")[0].decode("latin-1"), offset)
        if "memory" not in groups:
            raise FormatError(source.name, 8, "none of the groups is memory")
        return groups

    def _tags(self, group: str) -> Iterator[Tag]:
        """The tags of a group. Raises `FormatError` where they lead out of the file."""
        at = self._groups.get(group)
        count = 0
        while at is not None:
            flags, name_size = self.source.read_at(at, 2)
            if flags == 0 and name_size == 0:
                return
            if (count := count + 1) > _TAGS_LIMIT:
                raise FormatError(
                    self.source.name, at, f"more than {_TAGS_LIMIT:#x} tags in group {group}"
                )
            indices = flags >> 6
            head = self.source.read_at(at + 2, name_size + indices * _INDEX.size)
            tag = self._value(
                head[:name_size].decode("latin-1"),
                tuple(n for (n,) in _INDEX.iter_unpack(head[name_size:])),
                at + 2 + len(head),
                flags & 0x3F,
            )
            yield tag
            at = tag.offset + tag.size

    def _value(self, name: str, indices: tuple[int, ...], at: int, size: int) -> Tag:
        """The tag whose value, or the head of whose block, is at `at`."""
        if size not in (_COMPRESSED, _BLOCK):
            return Tag(name, indices, at, size, False)
        word = self._word
        head = self.source.read_at(at, 2 * word.size + 2)
        stored = int(word.unpack_from(head)[0])
        padding = int.from_bytes(head[-2:], "little")
        return Tag(name, indices, at + len(head) + padding, stored, size == _COMPRESSED)

    def _number(self, tag: Tag) -> int:
        return int.from_bytes(self.source.read_at(tag.offset, tag.size), "little")

    def _find_memory(self, inside: Tag | None, memory: Source | None) -> tuple[Source, int, int]:
        """Where memory is: its source, its offset and size there."""
        if inside is not None:
            if inside.compressed:
                raise UnsupportedError(
                    f"{self.source.name}: at offset {inside.offset:#x}: the memory is compressed "
                    "by VMware, in a form that is not published"
                )
            held = min(inside.size, max(0, self.source.size - inside.offset))
            return self.source, inside.offset, held
        if memory is None:
            memory = self._open_beside()
        return memory, 0, memory.size

    def _open_beside(self) -> Source:
        base, ending = os.path.splitext(self.source.name)
        if ending.lower() not in _STATES:
            raise UnsupportedError(
                f"{self.source.name}: the memory is not in this file, and without the ending "
                f"{_STATES[0]} or {_STATES[1]} nothing says which {_MEMORY} goes with it"
            )
        path = base + _MEMORY
        if not os.path.exists(path):
            raise UnsupportedError(
                f"{self.source.name}: the memory is not in this file, and there is no {path}"
            )
        return FileSource(path)

    def _take_regions(
        self, found: Mapping[tuple[str, tuple[int, ...]], int], base: int, size: int
    ) -> None:
        count = found.get(("regionsCount", ()), 0)
        if not count:
            self.add(0, size, base)
            return
        if count > _REGIONS_LIMIT:
            raise FormatError(self.source.name, None, f"regionsCount {count:#x} is too many")
        for index in range(count):
            values = []
            for name in ("regionPPN", "regionPageNum", "regionSize"):
                value = found.get((name, (index,)))
                if value is None:
                    raise FormatError(
                        self.source.name, None, f"region {index} of {count} has no {name}"
                    )
                if value >> 40:  # 52 bits of address, in pages
                    raise FormatError(self.source.name, None, f"{name}[{index}] is {value:#x}")
                values.append(value * _PAGE)
            start, place, length = values
            self.add(start, length, base + place, end=base + size)

    def _control(self) -> Iterator[Mapping[str, int]]:
        """The control registers of each CPU: CR64 where the processor has it, else CR."""
        found: dict[str, dict[int, dict[str, int]]] = {"CR": {}, "CR64": {}}
        try:
            for tag in self._tags("cpu"):
                if tag.name not in found or not tag.indices or tag.indices[0] >= _CPUS_LIMIT:
                    continue
                width = 8 if tag.name == "CR64" else 4
                cpu = found[tag.name].setdefault(tag.indices[0], {})
                if len(tag.indices) == 2 and tag.indices[1] < len(_CR_NAMES):
                    if tag.size <= _VALUE_LIMIT:
                        cpu[_CR_NAMES[tag.indices[1]]] = self._number(tag)
                elif len(tag.indices) == 1 and tag.size == width * len(_CR_NAMES):
                    data = self.source.read_at(tag.offset, tag.size)
                    for n, name in enumerate(_CR_NAMES):
                        cpu[name] = int.from_bytes(data[n * width : (n + 1) * width], "little")
        except FormatError as error:  # memory is there without them
            self.warnings.append(f"the registers cannot be read: {error}")
        narrow, wide = found["CR"], found["CR64"]
        for number in sorted(narrow.keys() | wide.keys()):
            yield {**narrow.get(number, {}), **wide.get(number, {})}


def state_beside(path: str) -> str | None:
    """The state's file that goes with the .vmem at `path`: the same name, .vmss before .vmsn."""
    base, ending = os.path.splitext(path)
    if ending.lower() != _MEMORY:
        return None
    return next((base + state for state in _STATES if os.path.exists(base + state)), None)
