"""Prelinked kernels and kernel collections, made of a kernel and kexts.

Sources: <mach-o/loader.h>, libkern/libkern/prelink.h, libkern/c++/OSUnserializeXML.y. The kernel
and the kexts are thin 64-bit little-endian Mach-O files with __LINKEDIT last.
"""

from __future__ import annotations

import base64
import struct
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.sax.saxutils import escape

from tests.builders import chains
from tests.builders.chains import LC_SEGMENT_64, Place, commands, segment, segments
from tests.builders.macho import MH_KEXT_BUNDLE, MachO, Section, Sym, up

if TYPE_CHECKING:
    from collections.abc import Sequence

MH_FILESET = 12
LC_SYMTAB, LC_DYSYMTAB, LC_UUID, LC_FILESET_ENTRY = 2, 0xB, 0x1B, 0x80000035
_DYLD_INFO = (0x22, 0x80000022)  # commands with five pairs of offset and size
_LINKEDIT_DATA = (0x1D, 0x1E, 0x26, 0x29, 0x2B, 0x80000033)  # commands with dataoff, datasize
CODELESS = 0x7FFFFFFFFFFFFFFF  # kOSKextCodelessKextLoadAddr
PAGE = 0x4000


class Kext(NamedTuple):
    """A kext to put in: `data` is its Mach-O, linked where it will be loaded; None: codeless."""

    identifier: str
    version: str
    data: bytes | None = None
    dependencies: tuple[str, ...] = ()
    path: str = "/System/Library/Extensions/Test.kext"
    interface_uuid: bytes | None = None


class Shared:
    """A value that the property list gives an ID, and an IDREF wherever it comes again."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Hex(int):
    """An integer written as IOKit writes addresses: 0x…, with its size in bits."""


def plist(root: Any) -> bytes:
    """`root` in the dialect of OSUnserializeXML."""
    ids: dict[int, int] = {}
    return _element(root, ids).encode()


def _element(value: Any, ids: dict[int, int]) -> str:
    mark = ""
    if isinstance(value, Shared):
        known, number = id(value) in ids, ids.setdefault(id(value), len(ids))
        value = value.value
        if known:
            return f'<{_tag(value)} IDREF="{number}"/>'
        mark = f' ID="{number}"'
    tag = _tag(value)
    if isinstance(value, bool):
        return f"<{tag}/>"
    if isinstance(value, dict):
        pairs = (f"<key>{escape(k)}</key>{_element(v, ids)}" for k, v in value.items())
        inside = "".join(pairs)
    elif isinstance(value, list):
        inside = "".join(_element(item, ids) for item in value)
    elif isinstance(value, bytes):
        inside = base64.b64encode(value).decode()
    elif isinstance(value, Hex):
        inside, mark = f"{int(value):#x}", mark + ' size="64"'
    else:
        inside = escape(str(value))
    return f"<{tag}{mark}>{inside}</{tag}>"


def _tag(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {dict: "dict", list: "array", bytes: "data", str: "string"}
    return names.get(type(value), "integer")


def kext_dictionary(kext: Kext, load: int, source: int, size: int) -> dict[str, Any]:
    """The entry of a kext; the identifiers it depends on carry one shared version."""
    entry: dict[str, Any] = {
        "CFBundleIdentifier": kext.identifier,
        "CFBundleVersion": kext.version,
        "_PrelinkBundlePath": kext.path,
        "OSBundleLibraries": dict.fromkeys(kext.dependencies, "1.0"),
    }
    if kext.interface_uuid is not None:
        entry["_PrelinkInterfaceUUID"] = kext.interface_uuid
    if kext.data is None:
        return entry | {"_PrelinkExecutableLoadAddr": Hex(CODELESS)}
    return entry | {
        "CFBundleExecutable": "Test",
        "OSBundleRequired": "Root",
        "_PrelinkExecutableRelativePath": "Contents/MacOS/Test",
        "_PrelinkExecutableLoadAddr": Hex(load),
        "_PrelinkExecutableSourceAddr": Hex(source),
        "_PrelinkExecutableSize": Hex(size),
        "_PrelinkKmodInfo": Hex(load + 0x80),
        "_PrelinkLinkState": Hex(source + 0x100),
        "_PrelinkLinkStateSize": Hex(0x20),
    }


def prelinked_kernel(
    kernel: bytes,
    kexts: Sequence[Kext],
    *,
    source: int | None = None,
    bare: bool = False,
    info: bytes | None = None,
) -> bytes:
    """`kernel`, whose prelink segments are empty, with `kexts` in them, at the end of the file.

    They lie at the address `source` (else where each is linked); `bare` makes an array the root
    of the property list, as in 10.6; `info` is that list instead of the one of the kexts.
    """
    data = bytearray(kernel)
    images = [kext.data for kext in kexts if kext.data is not None]
    low = source if source is not None else min(segment(i, "__TEXT").vmaddr for i in images)
    content, entries, sizes = bytearray(), [], Shared(Hex(up(len(images[0]), PAGE)))
    for kext in kexts:
        if kext.data is None:
            entries.append(kext_dictionary(kext, 0, 0, 0))
            continue
        load = segment(kext.data, "__TEXT").vmaddr
        at = len(content) if source is not None else load - low
        content += bytes(at - len(content)) + kext.data
        content += bytes(up(len(content), PAGE) - len(content))
        entry = kext_dictionary(kext, load, low + at, len(kext.data))
        if up(len(kext.data), PAGE) == int(sizes.value):
            entry["_PrelinkExecutableSize"] = sizes
        entries.append(entry)
    top: Any = entries if bare else {"_PrelinkInfoDictionary": entries, "_PrelinkKCID": b"K" * 16}
    text = (plist(top) if info is None else info) + b"\0" * 9
    fill_segment(data, "__PRELINK_TEXT", low, bytes(content))
    after = up(max(seg.vmaddr + seg.vmsize for seg in segments(data)), PAGE)
    fill_segment(data, "__PRELINK_INFO", after, text)
    return bytes(data)


def fill_segment(data: bytearray, name: str, vmaddr: int, content: bytes) -> None:
    """Give the empty segment `name`, and its one section, `content` at the end of the file."""
    seg = segment(data, name)
    assert (seg.filesize, seg.nsects) == (0, 1)
    at = up(len(data), PAGE)
    data += bytes(at - len(data)) + content
    size = len(content)
    struct.pack_into("<4Q", data, seg.at + 24, vmaddr, up(size, PAGE), at, size)
    struct.pack_into("<2QI", data, seg.at + 72 + 32, vmaddr, size, at)


def move(data: bytes, *, slide: int = 0, file: int = 0, pointers: Sequence[Place] = ()) -> bytes:
    """A kext linked `slide` bytes higher, its file offsets `file` bytes higher."""
    out = bytearray(data)
    for place in pointers:
        struct.pack_into("<Q", out, place.offset, place.value + slide)
    for at, cmd, _ in commands(data):
        if cmd == LC_SEGMENT_64:
            _move_segment(out, at, slide, file)
        elif cmd == LC_SYMTAB:
            symoff, nsyms, stroff, _ = struct.unpack_from("<4I", out, at + 8)
            struct.pack_into("<I", out, at + 8, symoff + file)
            struct.pack_into("<I", out, at + 16, stroff + file)
            for entry in range(symoff, symoff + 16 * nsyms, 16):
                if out[entry + 4] & 0xEE == 0xE:  # N_SECT, no stab
                    (value,) = struct.unpack_from("<Q", out, entry + 8)
                    struct.pack_into("<Q", out, entry + 8, value + slide)
        elif cmd in _LINKEDIT_DATA:
            (dataoff,) = struct.unpack_from("<I", out, at + 8)
            struct.pack_into("<I", out, at + 8, dataoff + file)
        elif cmd == LC_DYSYMTAB:
            struct.pack_into("<6I", out, at + 56, *(0,) * 6)  # relocations become fixups
    return bytes(out)


def _move_segment(out: bytearray, at: int, slide: int, file: int) -> None:
    vmaddr, vmsize, fileoff, filesize = struct.unpack_from("<4Q", out, at + 24)
    if filesize or vmsize < 1 << 40:  # not __PAGEZERO
        struct.pack_into("<4Q", out, at + 24, vmaddr + slide, vmsize, fileoff + file, filesize)
    for index in range(struct.unpack_from("<I", out, at + 64)[0]):
        section = at + 72 + 80 * index
        addr, size, offset = struct.unpack_from("<2QI", out, section + 32)
        struct.pack_into("<2QI", out, section + 32, addr + slide, size, offset and offset + file)


class Collection(NamedTuple):
    """A built collection: its bytes, and where in the file each entry begins."""

    data: bytes
    fileoffs: dict[str, int]


def collection(
    machine: str,
    base: int,
    entries: Sequence[Kext],
    pointers: dict[str, Sequence[int]],
    *,
    pointer_format: int,
    page_size: int,
    low: int | None = None,
    hib: bytes | None = None,
    hib_pointers: Sequence[int] = (),
    codeless: Sequence[Kext] = (),
    top: dict[str, Any] | None = None,
    uuid: bytes = b"C" * 16,
) -> Collection:
    """An MH_FILESET whose header lies at `base`; entries keep their link addresses.

    `pointers` has, for each identifier, the addresses of its pointers; `low` is what they are
    counted from (the header if None). `hib` becomes a segment at `low`. `top` goes into the
    property list beside the kexts.
    """
    return _Collection(machine, base, pointer_format, page_size, low, hib, hib_pointers).build(
        entries, pointers, codeless, top or {}, uuid
    )


class _Collection:
    def __init__(
        self,
        machine: str,
        base: int,
        pointer_format: int,
        page_size: int,
        low: int | None,
        hib: bytes | None,
        hib_pointers: Sequence[int],
    ) -> None:
        self.outer = MachO(machine, MH_FILESET, 0)
        self.base, self.format, self.page_size = base, pointer_format, page_size
        self.low = base if low is None else low
        self.hib, self.hib_pointers = hib, hib_pointers
        self.out = bytearray(PAGE)  # room for the header and commands
        self.spans: list[tuple[str, int, int, int, int]] = []  # name, vmaddr, vmsize, off, size
        self.fileoffs: dict[str, int] = {}
        self.tables: list[tuple[int, bytes, int]] = []  # LC_SYMTAB's offset, entries, strings' base
        self.pool = b"\0"

    def build(self, entries, pointers, codeless, top, uuid) -> Collection:
        self.spans.append(("__TEXT", self.base, PAGE, 0, PAGE))
        for kext in entries:
            self._entry(kext)
        if self.hib is not None:
            self._span("__HIB", self.low, self.hib)
        self._prelink_info([*entries, *codeless], top)
        places = [place for kext in entries for place in self._places(pointers[kext.identifier])]
        places += self._places(self.hib_pointers)
        stride = 1 if self.format == 11 else 4
        word = chains.kernel_cache_word(self.low, signed=self.format == 8)
        sizes = [(vmaddr, size) for _, vmaddr, _, _, size in self.spans]
        starts = chains.chain_pages(
            self.out, sizes, sorted(places), self.base, word, self.page_size, stride
        )
        payload = chains.chained_payload(starts, self.page_size, self.format)
        self._linkedit(payload)
        self._header(len(payload), uuid)
        return Collection(bytes(self.out), self.fileoffs)

    def _entry(self, kext: Kext) -> None:
        """Put in an entry's segments; its __LINKEDIT only as symbols, for the shared one."""
        assert kext.data is not None
        file = self.fileoffs[kext.identifier] = len(self.out)
        moved = move(kext.data, file=file)
        linkedit = segment(moved, "__LINKEDIT")
        content = moved[: linkedit.fileoff - file]
        self.out += content + bytes(up(len(content), PAGE) - len(content))
        for seg in segments(moved):
            if seg.name != "__LINKEDIT" and 0 < seg.vmsize < 1 << 40:
                name = f"__REGION{len(self.spans)}"
                self.spans.append((name, *seg[2:6]))
        for at, cmd, _ in commands(kext.data):
            if cmd == LC_SYMTAB:
                symoff, nsyms, stroff, strsize = struct.unpack_from("<4I", kext.data, at + 8)
                symbols = bytearray(kext.data[symoff : symoff + 16 * nsyms])
                for entry in range(0, len(symbols), 16):
                    (strx,) = struct.unpack_from("<I", symbols, entry)
                    struct.pack_into("<I", symbols, entry, strx and strx + len(self.pool))
                self.pool += kext.data[stroff : stroff + strsize] + b"\0"
                self.tables.append((file, bytes(symbols), nsyms))

    def _span(self, name: str, vmaddr: int, content: bytes) -> None:
        self.spans.append((name, vmaddr, up(len(content), PAGE), len(self.out), len(content)))
        self.out += content + bytes(up(len(content), PAGE) - len(content))

    def _end(self) -> int:
        return up(max(vmaddr + vmsize for _, vmaddr, vmsize, _, _ in self.spans), PAGE)

    def _prelink_info(self, kexts: Sequence[Kext], top: dict[str, Any]) -> None:
        listed = []
        for kext in kexts:
            if kext.identifier == "com.apple.kernel":
                continue
            text = None if kext.data is None else segment(kext.data, "__TEXT")
            load, size = (0, 0) if text is None else (text.vmaddr, text.vmsize)
            listed.append(kext_dictionary(kext, load, load, size))
        text = plist({"_PrelinkInfoDictionary": listed, "_PrelinkKCID": b"C" * 16, **top})
        self._span("__PRELINK_INFO", self._end(), text + b"\0\0\0")

    def _places(self, addresses: Sequence[int]) -> list[Place]:
        found: list[Place] = []
        for address in sorted(addresses):
            for _, vmaddr, _, off, size in self.spans:
                if vmaddr <= address < vmaddr + size:
                    (value,) = struct.unpack_from("<Q", self.out, off + address - vmaddr)
                    if 0 <= value - self.low < 1 << 30:
                        found.append(Place(address, off + address - vmaddr, value))
        return found

    def _linkedit(self, payload: bytes) -> None:
        vmaddr, start = self._end(), len(self.out)
        tables = b"".join(symbols for _, symbols, _ in self.tables)
        content = tables + self.pool.ljust(up(len(self.pool), 8), b"\0")
        self.fixups = start + len(content)
        content += payload
        self._span("__LINKEDIT", vmaddr, content)
        symoff = start
        for file, symbols, nsyms in self.tables:
            for at, cmd, _ in commands(self.out, file):
                if cmd == LC_SYMTAB:
                    fields = (symoff, nsyms, start + len(tables), len(self.pool))
                    struct.pack_into("<4I", self.out, at + 8, *fields)
                elif cmd == LC_SEGMENT_64 and self.out[at + 8 :].startswith(b"__LINKEDIT\0"):
                    fields = (vmaddr, up(len(content), PAGE), start, len(content))
                    struct.pack_into("<4Q", self.out, at + 24, *fields)
                elif cmd in _LINKEDIT_DATA:
                    struct.pack_into("<2I", self.out, at + 8, start, 0)
                elif cmd in _DYLD_INFO:
                    struct.pack_into("<10I", self.out, at + 8, *(0,) * 10)
            symoff += len(symbols)

    def _header(self, payload: int, uuid: bytes) -> None:
        outer = self.outer
        for name, vmaddr, vmsize, off, size in self.spans:
            sections = ()
            if name == "__PRELINK_INFO":
                sections = (Section("__info", name, vmaddr, size),)
            outer.segment(
                name,
                vmaddr,
                bytes(size) if off == 0 else b"",
                vmsize=vmsize,
                fileoff=off,
                filesize=size,
                sections=sections,
            )
        outer.uuid(uuid)
        outer.command(chains.LC_DYLD_CHAINED_FIXUPS, struct.pack("<2I", self.fixups, payload))
        for identifier, off in self.fileoffs.items():
            text = next(seg for seg in segments(self.out, off) if seg.name == "__TEXT")
            body = struct.pack("<2Q2I", text.vmaddr, off, 32, 0) + identifier.encode() + b"\0"
            outer.command(LC_FILESET_ENTRY, body)
        head = outer.head()
        assert len(head) <= PAGE
        self.out[: len(head)] = head


def small_kext(
    machine: str, vmaddr: int, names: Sequence[str], uuid: bytes, pointers: Sequence[int] = ()
) -> bytes:
    """A kext with one function for each name, and `pointers` in its __DATA, linked at `vmaddr`."""
    macho = MachO(machine, MH_KEXT_BUNDLE, 0)
    page = macho.machine.page
    symbols = [Sym(name, vmaddr + 0x800 + 16 * index) for index, name in enumerate(names)]
    symbols.append(Sym("_static", vmaddr + page, n_type=0xE, n_sect=2))
    text = Section("__text", "__TEXT", vmaddr + 0x800, 0x400)
    macho.segment("__TEXT", vmaddr, bytes(page), fileoff=0, sections=[text])
    data = struct.pack(f"<{len(pointers)}Q", *pointers).ljust(64, b"\0")
    section = Section("__data", "__DATA", vmaddr + page, len(data))
    macho.segment("__DATA", vmaddr + page, data, sections=[section])
    macho.symtab(symbols, linkedit=vmaddr + 2 * page)
    macho.uuid(uuid)
    return macho.build()


def small_kernel(machine: str, vmaddr: int, pointers: Sequence[int], *, room: int = 64) -> bytes:
    """A kernel of a few pages: `pointers` in __DATA, empty prelink segments, two symbols."""
    macho = MachO(machine, 2, 1)
    page = macho.machine.page
    sections = [
        Section("__const", "__TEXT", vmaddr + 0xC00, 0x100),
        Section("__thread_starts", "__TEXT", vmaddr + 0xD00, 0),
    ]
    macho.segment("__TEXT", vmaddr, bytes(page), fileoff=0, sections=sections)
    data = struct.pack(f"<{len(pointers)}Q", *pointers).ljust(room, b"\0")
    at = vmaddr + page
    end = at + up(len(data), page)
    macho.segment("__DATA", at, data, sections=[Section("__data", "__DATA", at, len(data))])
    for name, section in (("__PRELINK_TEXT", "__text"), ("__PRELINK_INFO", "__info")):
        macho.segment(name, end, vmsize=0, sections=[Section(section, name, end, 0)])
    macho.uuid(b"k" * 16)
    macho.symtab([Sym("_one", at), Sym("_two", at + 8)], linkedit=end)
    return macho.build(align=page)
