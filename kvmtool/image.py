"""A Mach-O image as memory, and memory as a Mach-O image.

`image_memory` gives a file's segments at their link addresses; `LoadedImage` gives an image that
already lies in memory back as if it were the file, so that one parser reads both.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from kvmtool.errors import FaultError, FormatError, TruncatedError
from kvmtool.macho import MachO
from kvmtool.memory import ZERO_FILL, RunMemory
from kvmtool.source import find_by_chunks

if TYPE_CHECKING:
    from kvmtool.memory import Memory

_COMMANDS_LIMIT = 1 << 20  # bytes; the largest kernel collection's commands take some 40 KiB


def image_memory(image: MachO) -> RunMemory:
    """The image at its link addresses; what the file defines as zero (bss) reads as zeros.

    Raises `FormatError` when a segment's bytes do not lie in the file.
    """
    starts, ends, offsets = array("Q"), array("Q"), array("Q")
    size = image.source.size
    for segment in image.segments:
        held = min(segment.filesize, segment.vmsize)
        if held and segment.fileoff + held > size:
            raise TruncatedError(
                image.source.name,
                segment.fileoff,
                held,
                max(0, size - segment.fileoff),
                f"segment {segment.segname}",
            )
        end = segment.vmaddr + segment.vmsize
        if end > 1 << 64:
            raise FormatError(
                image.source.name,
                segment.offset,
                f"segment {segment.segname}: vmaddr {segment.vmaddr:#x} + {segment.vmsize:#x} "
                "leaves the address space",
            )
        if segment.segname == "__PAGEZERO":
            continue
        for start, stop, offset in (
            (segment.vmaddr, segment.vmaddr + held, segment.fileoff),
            (segment.vmaddr + held, end, ZERO_FILL),
        ):
            if start < stop:
                starts.append(start)
                ends.append(min(stop, (1 << 64) - 1))
                offsets.append(offset)
    return RunMemory(image.source, starts, ends, offsets)


class LoadedImage:
    """A Mach-O in memory, read by the file offsets its load commands speak of.

    Offsets inside the header and load commands are taken from `address` on; any other from the
    segment that holds it. A page that is not there is a `TruncatedError`, as in a file cut off.
    """

    def __init__(self, memory: Memory, address: int, name: str) -> None:
        """`address` is that of the mach_header. Raises `FormatError` if there is none."""
        self.name = f"{name} at {address:#x}"
        self._memory = memory
        self._address = address
        self._files: list[tuple[int, int, int]] = [(0, _COMMANDS_LIMIT, address)]
        self.size = _COMMANDS_LIMIT
        header = MachO(self)
        self._files = [
            (s.fileoff, s.fileoff + s.filesize, s.vmaddr) for s in header.segments if s.filesize
        ]
        commands_end = header.header_size + header.sizeofcmds
        self._files.append((0, commands_end, address))
        self.size = max(end for _, end, _ in self._files)

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`."""
        for start, end, address in self._files:
            if start <= off and off + size <= end:
                try:
                    return self._memory.read(address + off - start, size)
                except FaultError as fault:
                    got = max(0, fault.address - address - off + start)
                    raise TruncatedError(self.name, off, size, got, str(fault)) from fault
        raise TruncatedError(self.name, off, size, 0, "no segment holds these bytes")

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        return find_by_chunks(self, needle, start, end)

    def close(self) -> None:
        """See `Source.close`."""
