"""All segments of a Mach-O as columns: what a core with a million of them needs.

Source: EXTERNAL_HEADERS/mach-o/loader.h (segment_command, segment_command_64), xnu-11417.121.6.
"""

from __future__ import annotations

import sys
from array import array
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError
from kvmtool.macho import BULK, LC_SEGMENT, LC_SEGMENT_64

if TYPE_CHECKING:
    from kvmtool.macho import CommandRun, MachO

# vmaddr, vmsize, fileoff, filesize, and behind maxprot initprot
_SEGMENT = {
    (order, wide): Struct(order + ("24x4Q4xI8x" if wide else "24x4I4xI8x"))
    for order in "<>"
    for wide in (False, True)
}
_VMADDR, _INITPROT = 3, 15  # where they stand in a 64-bit command, counted in their own size


class SegmentTable(NamedTuple):
    """Columns of all segments, in file order."""

    vmaddr: array[int]
    vmsize: array[int]
    fileoff: array[int]
    filesize: array[int]
    initprot: array[int]


def segment_table(image: MachO) -> SegmentTable:
    """The segments of `image`, without an object for each. Raises `FormatError`."""
    columns = SegmentTable(array("Q"), array("Q"), array("Q"), array("Q"), array("I"))
    for run in image.command_runs:
        if run.cmd not in (LC_SEGMENT, LC_SEGMENT_64):
            continue
        size = _SEGMENT[image.byteorder, run.cmd == LC_SEGMENT_64].size
        if run.cmdsize < size:
            what = f"segment: cmdsize {run.cmdsize:#x}, expected {size:#x}"
            raise FormatError(image.source.name, run.offset, what)
        if run.cmd == LC_SEGMENT_64 and run.repeats >= BULK and run.cmdsize % 8 == 0:
            _append_bulk(columns, image, run)
        else:
            _append_each(columns, image, run)
    return columns


def _append_bulk(columns: SegmentTable, image: MachO, run: CommandRun) -> None:
    start = run.offset - image.header_size
    data = memoryview(image.command_bytes())[start : start + run.repeats * run.cmdsize]
    swap = (image.byteorder == "<") != (sys.byteorder == "little")
    words, halves = data.cast("Q"), data.cast("I")
    for number, column in enumerate(columns):
        if number < 4:
            every = words[_VMADDR + number :: run.cmdsize // 8]
        else:
            every = halves[_INITPROT :: run.cmdsize // 4]
        added = array(column.typecode)
        added.frombytes(every.tobytes())
        if swap:
            added.byteswap()
        column.extend(added)


def _append_each(columns: SegmentTable, image: MachO, run: CommandRun) -> None:
    layout = _SEGMENT[image.byteorder, run.cmd == LC_SEGMENT_64]
    data, start = image.command_bytes(), run.offset - image.header_size
    for at in range(start, start + run.repeats * run.cmdsize, run.cmdsize):
        for column, value in zip(columns, layout.unpack_from(data, at), strict=True):
            column.append(value)
