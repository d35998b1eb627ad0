"""From what the user named as the memory to an opened container: a file, a stub, a device."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import UnknownFormatError
from kvmtool.source import open_source, see_through

if TYPE_CHECKING:
    from kvmtool.formats import Format
    from kvmtool.source import Source

GDB = "gdb://"
_DEVICES = ("kmem", "mem")
_RAW_AT = "raw@"


class Container(NamedTuple):
    """An opened `dump`, and the `sources` to close behind it, the innermost first.

    `unknown` is set for bytes that no format recognises: they are raw memory if a kernel is found
    in them, and else the error to raise.
    """

    dump: Format
    sources: tuple[Source, ...]
    unknown: UnknownFormatError | None = None


def open_container(name: str, format: str | None = None, mapped: bool = True) -> Container:
    """The memory called `name`: a path, a device, or gdb://host:port.

    `format` names the container when its bytes do not ("raw", or "raw@0x800000000" for memory from
    that address on); `mapped` off is for a file that may shrink
    while it is open, where a mapped one would end the process. Raises OSError, `FormatError`,
    `KvmError`.
    """
    if name.startswith(GDB):
        from kvmtool.formats.gdb import open_gdb

        stub: Any = open_gdb(name)
        return Container(stub, (stub.source,))
    if _is_device(name):
        from kvmtool.formats.kmem import open_kmem

        device: Any = open_kmem(name)
        return Container(device, (device.source,))
    if mapped:
        return _open_file(open_source(name), format)
    from kvmtool.pread_source import PreadSource

    source: Source = PreadSource(name)
    return _open_file(see_through(source), format)


def _is_device(name: str) -> bool:
    """Whether this is /dev/kmem or /dev/mem: named so, and no regular file."""
    if os.path.basename(name) not in _DEVICES:
        return False
    try:
        return not stat.S_ISREG(os.stat(name).st_mode)
    except OSError:
        return os.path.dirname(name) == "/dev"  # the device says better what is missing


def _open_file(source: Source, format: str | None) -> Container:
    from kvmtool import formats

    if format is not None and format.startswith(_RAW_AT):
        return Container(_raw_at(source, format), (source,))
    try:
        entry = formats.by_name(format) if format is not None else formats.identify(source)
    except UnknownFormatError as error:
        if format is not None or not source.size:
            raise
        if (beside := _vmware_beside(source)) is not None:
            return beside
        raw: Any = formats.load(formats.by_name("raw"))(source)
        return Container(raw, (source,), error)
    dump: Any = formats.load(entry)(source)
    if entry.name != "corefile":
        return Container(dump, (source,))
    inner = _open_file(dump.open_member(dump.kernel_member()), None)
    inner.dump.container = dump
    return Container(inner.dump, (*inner.sources, source), inner.unknown)


def _raw_at(source: Source, format: str) -> Format:
    """Raw memory whose first byte is at the address in `format`."""
    from kvmtool.formats.raw import Raw

    text = format.removeprefix(_RAW_AT)
    try:
        base = int(text, 0)
    except ValueError:
        base = -1
    if base < 0:
        raise UnknownFormatError(format, None, f"{text!r} is no address: expected raw@0x800000000")
    return Raw(source, base)


def _vmware_beside(memory: Source) -> Container | None:
    """A .vmem with the state's file of the same name beside it, which says where its runs lie."""
    from kvmtool.formats.vmware import Vmware, state_beside

    path = state_beside(memory.name)
    if path is None:
        return None
    state = open_source(path)
    return Container(Vmware(state, memory), (state, memory))
