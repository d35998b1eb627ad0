"""Memory as another container: what a handle can read, written as a new file.

What cannot be read is left out, never filled. Regions become MH_CORE segments, ELF PT_LOADs or LiME
ranges; in a raw file they lie at their own addresses, and the rest are holes of a sparse file.

Source: EXTERNAL_HEADERS/mach-o/loader.h and osfmk/kdp/processor_core.c (xnu-8796), elf.h, LiME's
doc/README.
"""

from __future__ import annotations

import warnings
from array import array
from contextlib import contextmanager
from struct import Struct, pack
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from kvmtool import macho
from kvmtool.errors import KvmWarning, UnsupportedError
from kvmtool.new_file import new_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtool.handle import Kvm
    from kvmtool.memory import Memory

TARGETS = ("macho-core", "lime", "elf", "raw")
CHUNK = 1 << 20  # bytes held at a time
_ALIGN = 4096  # of the first region's bytes, so that a reader can map pages
_WORD = 1 << 32
_UNKNOWN = (1 << 64) - 1

# mach-o/loader.h, mach/vm_prot.h
_VM_PROT_READ = 1  # all that is known of a region is that it can be read
_KERNEL = 1  # "main bin spec" type
_VERSION_SIZE = 256  # of kdp_kernelversion_string

# elf.h
_ET_CORE, _PT_LOAD, _PF_R, _PN_XNUM = 4, 1, 4, 0xFFFF
_E_MACHINE = {
    macho.CPU_TYPE_I386: 3,
    macho.CPU_TYPE_X86_64: 62,
    macho.CPU_TYPE_POWERPC: 20,
    macho.CPU_TYPE_POWERPC64: 21,
    macho.CPU_TYPE_ARM: 40,
    macho.CPU_TYPE_ARM64: 183,
}

_LIME = Struct("<IIQQ8x")  # magic, version, first address, last address (inclusive)
_LIME_MAGIC, _LIME_VERSION = 0x4C694D45, 1


class _Form(NamedTuple):
    """Where all goes: `head` at 0, region i at `offsets[i]`, before it what `header` makes."""

    head: bytes
    offsets: array[int]
    header: Callable[[int, int], bytes] | None = None


class Conversion:
    """A new file planned: `size` bytes, of which `held` are memory in `regions` regions.

    `target` is one of `TARGETS`, `space` "kernel" or "physical". LiME and raw hold physical memory
    only, a Mach-O core the kernel's only, and ELF physical memory when `physical` says so.
    """

    def __init__(self, kvm: Kvm, target: str, *, physical: bool = False) -> None:
        """Walk the memory's regions; none of its bytes are read yet.

        Raises `UnsupportedError` for memory the handle does not have, or that the target cannot
        hold; warns (`KvmWarning`) of what a reader of the file cannot know.
        """
        self.target = target
        self._kvm = kvm
        self._memory = _memory(kvm, target, physical)
        self.space = self._memory.space
        self._starts, self._sizes = array("Q"), array("Q")
        for region in self._memory.regions():
            self._starts.append(region.start)
            self._sizes.append(region.size)
        if target == "macho-core" and kvm.arch.pointer_size == 4:
            self._keep_32_bits()
        if not self._starts:
            raise UnsupportedError(f"{_name(kvm)} does not say what {self.space} memory it has")
        self.regions, self.held = len(self._starts), sum(self._sizes)
        make = {"macho-core": self._macho, "elf": self._elf, "lime": self._lime, "raw": self._raw}
        self._form = make[target]()
        self.size = self._form.offsets[-1] + self._sizes[-1]
        if target == "macho-core" and kvm.arch.pointer_size == 4 and self.size >= _WORD:
            raise UnsupportedError(f"{self.size:#x} bytes do not fit a 32-bit Mach-O core")
        if target == "raw" and self.held < self.size:
            text = f"{self.size - self.held:#x} bytes of {self.size:#x} are absent: raw memory"
            warnings.warn(f"{text} cannot say so, they read as zeros", KvmWarning, stacklevel=2)

    def write(self, file: BinaryIO, progress: Callable[[int, int], None] | None = None) -> None:
        """Write the new, empty `file`; `progress` is told bytes done and bytes in all.

        Raises OSError, and `KvmError` when memory cannot be read after all.
        """
        at = done = 0
        for offset, data in self._pieces():
            with _naming(file):
                if offset != at:
                    file.seek(offset)
                file.write(data)
            at = offset + len(data)
            done += len(data)
            if progress is not None:
                progress(min(done, self.held), self.held)

    def _pieces(self) -> Iterator[tuple[int, bytes]]:
        """(file offset, bytes), in file order."""
        head, offsets, header = self._form
        for at in range(0, len(head), CHUNK):
            yield at, head[at : at + CHUNK]
        for start, size, offset in zip(self._starts, self._sizes, offsets, strict=True):
            if header is not None:
                data = header(start, size)
                yield offset - len(data), data
            for at in range(0, size, CHUNK):
                yield offset + at, self._memory.read(start + at, min(CHUNK, size - at))

    def _keep_32_bits(self) -> None:
        """Leave out what LC_SEGMENT has no numbers for: 32-bit kernels may run on 64-bit tables."""
        kept = [
            (start, min(size, _WORD - start, _WORD - 1))
            for start, size in zip(self._starts, self._sizes, strict=True)
            if start < _WORD
        ]
        lost = sum(self._sizes) - sum(size for _, size in kept)
        if lost:
            text = f"{lost:#x} bytes past 4 GiB are left out, a 32-bit core has no room for them"
            warnings.warn(text, KvmWarning, stacklevel=3)
        self._starts = array("Q", [start for start, _ in kept])
        self._sizes = array("Q", [size for _, size in kept])

    def _packed(self, first: int, between: int = 0) -> array[int]:
        """File offsets of the regions one behind the other."""
        offsets = array("Q")
        for size in self._sizes:
            offsets.append(first + between)
            first += between + size
        return offsets

    # the forms

    def _raw(self) -> _Form:
        return _Form(b"", self._starts)

    def _lime(self) -> _Form:
        def header(start: int, size: int) -> bytes:
            return _LIME.pack(_LIME_MAGIC, _LIME_VERSION, start, start + size - 1)

        return _Form(b"", self._packed(0, _LIME.size), header)

    def _macho(self) -> _Form:
        arch = self._kvm.arch
        order, wide = arch.byteorder, arch.pointer_size == 8
        cputype, cpusubtype = _machine(self._kvm)
        segment = Struct(order + ("II16s4Q4I" if wide else "II16s4I4I"))
        thread, notes = _thread(self._kvm), list(_notes(self._kvm))
        if len(thread) == 8:
            text = f"{_name(self._kvm)} has no registers: lldb will show zeros for them"
            warnings.warn(text, KvmWarning, stacklevel=3)
        header_size = 32 if wide else 28
        sizeofcmds = segment.size * len(self._starts) + len(thread) + 40 * len(notes)
        if sizeofcmds >= _WORD:
            raise UnsupportedError(f"{len(self._starts):#x} regions do not fit a Mach-O core")
        payload = header_size + sizeofcmds
        offsets = self._packed(_up(payload + sum(len(data) for _, data in notes)))
        magic = 0xFEEDFACF if wide else 0xFEEDFACE
        ncmds = len(self._starts) + 1 + len(notes)
        head = bytearray(
            pack(order + "7I", magic, cputype, cpusubtype, macho.MH_CORE, ncmds, sizeofcmds, 0)
        )
        head += bytes(header_size - len(head))
        cmd, prot = macho.LC_SEGMENT_64 if wide else macho.LC_SEGMENT, _VM_PROT_READ
        for start, size, offset in zip(self._starts, self._sizes, offsets, strict=True):
            head += segment.pack(
                cmd, segment.size, b"", start, size, offset, size, prot, prot, 0, 0
            )
        head += thread
        for owner, data in notes:
            head += pack(order + "II16sQQ", macho.LC_NOTE, 40, owner, payload, len(data))
            payload += len(data)
        return _Form(bytes(head) + b"".join(data for _, data in notes), offsets)

    def _elf(self) -> _Form:
        count, order = len(self._starts), self._kvm.arch.byteorder
        end = max(self._starts[-1] + self._sizes[-1], self.held + count * 32 + 2 * _ALIGN)
        wide = self._kvm.arch.pointer_size == 8 or end >= _WORD  # QEMU, too, asks for the end
        ehsize, phentsize, shentsize = (64, 56, 64) if wide else (52, 32, 40)
        many = count >= _PN_XNUM
        sections = ehsize + count * phentsize
        offsets = self._packed(_up(sections + many * shentsize))
        head = bytearray(b"\x7fELF" + bytes((2 if wide else 1, 1 if order == "<" else 2, 1)))
        head += bytes(16 - len(head))
        head += pack(
            order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH"),
            *(_ET_CORE, _E_MACHINE[_machine(self._kvm)[0]], 1),
            *(0, ehsize, sections if many else 0),
            *(0, ehsize, phentsize, min(count, _PN_XNUM), shentsize, int(many), 0),
        )
        nowhere = _UNKNOWN if wide else _WORD - 1  # as in /proc/kcore: no physical address is known
        load = Struct(order + ("IIQQQQQQ" if wide else "8I"))
        for start, size, offset in zip(self._starts, self._sizes, offsets, strict=True):
            places = (0, start) if self.space == "physical" else (start, nowhere)
            if wide:
                head += load.pack(_PT_LOAD, _PF_R, offset, *places, size, size, 0)
            else:
                head += load.pack(_PT_LOAD, offset, *places, size, size, _PF_R, 0)
        if many:  # section 0 has the number in its sh_info
            head += pack(order + ("IIQQQQIIQQ" if wide else "10I"), *(0,) * 7, count, 0, 0)
        return _Form(bytes(head), offsets)


def convert(
    kvm: Kvm,
    out: str,
    target: str,
    *,
    physical: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write what `kvm` can read to the file `out`, which is there when all of it is, or not at all.

    Raises FileExistsError unless `overwrite`, OSError, and what `Conversion` does.
    """
    conversion = Conversion(kvm, target, physical=physical)
    with new_file(out, overwrite) as file:
        conversion.write(file, progress)
    return conversion


@contextmanager
def _naming(file: BinaryIO) -> Iterator[None]:
    """OSErrors are about `file`, not about what is read."""
    try:
        yield
    except OSError as error:
        error.filename = getattr(file, "name", None)
        raise


def _memory(kvm: Kvm, target: str, physical: bool) -> Memory:
    """What `target` holds."""
    if kvm.dump is None:
        raise UnsupportedError(
            f"{_name(kvm)} is a kernel file, its memory is not in it: name a core with -M"
        )
    if target == "macho-core" and physical:
        raise UnsupportedError("macho-core holds the kernel's memory, not physical memory")
    if target not in ("lime", "raw") and not physical:
        return kvm.memory
    if kvm.physical is None:
        raise UnsupportedError(
            f"{_name(kvm)} holds the kernel's memory, not physical memory, which {target} would "
            "have to: macho-core and elf can hold the kernel's"
        )
    return kvm.physical


def _name(kvm: Kvm) -> str:
    if kvm.dump is not None:
        return kvm.dump.source.name
    return kvm.kernel.source.name if kvm.kernel is not None else "the kernel"


def _up(value: int) -> int:
    return -(-value // _ALIGN) * _ALIGN


# what a core says of its kernel


def _machine(kvm: Kvm) -> tuple[int, int]:
    """cputype and cpusubtype of the kernel: that of the processor may be another."""
    facts, kernel = kvm.facts, kvm.kernel
    assert facts is not None
    cputype = facts.cputype if kvm.way is None else kvm.way.cputype
    if kernel is not None and facts.cputype != cputype == kernel.cputype:
        return cputype, kernel.cpusubtype
    return cputype, facts.cpusubtype


def _thread(kvm: Kvm) -> bytes:
    """LC_THREAD of the first thread: without registers where the dump has none.

    lldb (14) opens no core without an LC_THREAD; of one without registers it shows zeros.
    """
    order = kvm.arch.byteorder
    data = b""
    for flavor, state in kvm.facts.threads[0].states if kvm.facts and kvm.facts.threads else ():
        state += bytes(-len(state) % 4)
        data += pack(order + "II", flavor, len(state) // 4) + state
    return pack(order + "II", macho.LC_THREAD, 8 + len(data)) + data


def _notes(kvm: Kvm) -> Iterator[tuple[bytes, bytes]]:
    """(owner, payload) of each LC_NOTE there is something to say in."""
    order, boot, facts = kvm.arch.byteorder, kvm.boot, kvm.facts
    assert facts is not None
    uuid = (boot.uuid if boot is not None else facts.uuid) or bytes(16)
    page = kvm.arch.page_size.bit_length() - 1
    if boot is not None:
        record = pack(order + "IIQ16sII", 1, _KERNEL, boot.kernel_address, uuid, page, 0)
        yield b"main bin spec", record
    elif facts.slide is not None:  # version 2 alone has room for a slide
        slide = facts.slide & _UNKNOWN
        record = pack(order + "IIQQ16sII", 2, _KERNEL, _UNKNOWN, slide, uuid, page, 0)
        yield b"main bin spec", record
    if kvm.version is not None:
        text = f"{kvm.version}"
        if any(uuid):
            text += f"; UUID={macho.uuid_text(uuid)}"
        if boot is not None and boot.slide:
            text += f"; stext={boot.kernel_address:#x}"
        raw = text.encode("utf-8", "backslashreplace")
        yield b"kern ver str", pack(order + "I", 1) + raw + bytes(max(_VERSION_SIZE - len(raw), 1))
    if facts.va_bits is not None:
        yield b"addrable bits", pack(order + "IIQ", 3, facts.va_bits, 0)
