"""The kernel as a Mach-O file and as it lies in memory: functions, constants, tables, variables.

Addresses handed out are those in memory (slid); `symbols` and the file have them unslid. What the
linker would have initialised stands in the file too; what the running kernel fills in is zero
there and lies in the zero-fill section __common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tests.builders import macho
from tests.builders.macho import N_ABS, N_EXT, N_SECT, Section, Sym, up

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tests.builders.heap import Memory, Region, Signer

# A function that returns at once, 16 bytes long.
_RETURN = {
    "i386": bytes.fromhex("5589e55dc3").ljust(16, b"\x90"),
    "x86_64": bytes.fromhex("554889e55dc3").ljust(16, b"\x90"),
    "arm64": bytes.fromhex("7f2303d5ff0f5fd6").ljust(16, b"\0"),
}
_CONST_SIZE = 0x1000
_INSTRUCTIONS = 0x80000400  # S_ATTR_PURE_INSTRUCTIONS, S_ATTR_SOME_INSTRUCTIONS
_STEP = 0x40000  # between segments whose place nobody asked for


class Places(NamedTuple):
    """Unslid addresses; `full` fills __TEXT up to __DATA, as a real kernel's is."""

    text: int
    data: int
    common: int
    full: bool = False


def default_places(arch: str, text: int) -> Places:
    """Segments 256 KiB apart from `text` on; on arm64 three more lie between __TEXT and __DATA."""
    data = text + (4 if arch == "arm64" else 1) * _STEP
    return Places(text, data, data + _STEP // 2)


class KernelImage:
    """A kernel under construction."""

    def __init__(self, arch: str, memory: Memory, places: Places, slide: int, sign: Signer) -> None:
        self.arch = arch
        self.memory = memory
        self.places = places
        self.slide = slide
        self.sign = sign
        self.symbols: dict[str, int] = {}
        self.entries: list[Sym] = []
        self._initial: list[tuple[int, bytes]] = []  # unslid address, bytes of the file's __DATA
        page = memory.page
        self._text = self._region("__TEXT", places.text)
        self._text.alloc(page)  # the Mach-O header, written by `finish`
        self._consts = self._text.alloc(_CONST_SIZE, page)
        self._consts_used = 0
        if arch == "arm64":
            self._data_const = self._region("__DATA_CONST", places.text + _STEP)
            self._data_const.alloc(page)
            self._code = self._region("__TEXT_EXEC", places.text + 2 * _STEP)
        else:
            self._code = self._text
        self._code_base = self._code.alloc(0, page)
        if arch == "x86_64":
            self._hib = self._region("__HIB", places.text - 0x100000)
            self._hib.alloc(page)
        self._data = self._region("__DATA", places.data)
        self._common = self._region("__common", places.common)
        self._sections = self._section_numbers()

    def _region(self, name: str, base: int) -> Region:
        return self.memory.region(name, base + self.slide)

    def _section_numbers(self) -> dict[str, int]:
        """Section names → n_sect, in the order `finish` writes the sections."""
        order = {"arm64": ["const", "dconst", "text"], "x86_64": ["const", "text"]}
        names = [*order.get(self.arch, ["const", "text"]), "data", "common"]
        return {name: number for number, name in enumerate(names, 1)}

    def symbol(self, name: str, address: int, section: str, *, local: bool = False) -> int:
        """Name `address` (slid); gives it back."""
        n_type = N_SECT if local else N_SECT | N_EXT
        self.symbols[name] = address - self.slide
        self.entries.append(Sym(name, address - self.slide, n_type, self._sections[section]))
        return address

    def function(self, name: str) -> int:
        """The address of the function of that name, made when first asked for."""
        if name in self.symbols:
            return self.symbols[name] + self.slide
        address = self._code.alloc(16)
        self._code.write(address, _RETURN[self.arch])
        return self.symbol(name, address, "text")

    def const(self, name: str, content: bytes) -> int:
        """A read-only object in __TEXT,__const."""
        address = self._consts + self._consts_used
        self._consts_used = up(self._consts_used + len(content), 16)
        if self._consts_used > _CONST_SIZE:
            raise ValueError("too many constants")
        self._text.write(address, content)
        return self.symbol(name, address, "const")

    def table(self, name: str, size: int, *, align: int = 16, pinned: int | None = None) -> int:
        """An initialised object of __DATA,__data; `pinned` is the (unslid) address it must have.

        Pinned ones must be asked for before the others.
        """
        if pinned is None:
            return self.symbol(name, self._data.alloc(size, align), "data")
        return self.symbol(name, self._data.pin(pinned + self.slide, size), "data")

    def unnamed(self, size: int, *, align: int = 16) -> int:
        """As `table`, for an object whose symbol is stripped."""
        return self._data.alloc(size, align)

    def variable(self, name: str, size: int, *, align: int = 8, local: bool = False) -> int:
        """A zero-filled object of __DATA,__common, for the running kernel to fill in."""
        return self.symbol(name, self._common.alloc(size, align), "common", local=local)

    @property
    def common(self) -> Region:
        """The region of `variable`, for records that lie in the kernel itself."""
        return self._common

    def init(self, address: int, content: bytes) -> None:
        """Initialise part of a table, alike in file and memory."""
        self.memory.write(address, content)
        self._initial.append((address - self.slide, content))

    def init_pointer(self, address: int, target: int, *, code: bool = False) -> None:
        """A pointer in a table: slid (and signed, if to code) in memory, link address on file."""
        stored = self.sign(target, address) if code else target
        self.memory.write(address, self.memory.pointer(stored))
        linked = target - self.slide if target else 0
        self._initial.append((address - self.slide, self.memory.pointer(linked)))

    def finish(
        self,
        uuid: bytes | None,
        more: Iterable[Sym] = (),
        *,
        absolute_header: bool = False,
        keep_linkedit: bool = False,
        source_version: Iterable[int] = (),
        registers: Mapping[str, int] | None = None,
    ) -> bytes:
        """The kernel file; its header, slid, is put into memory as the booter does."""
        places = self.places
        header = Sym("__mh_execute_header", places.text, (N_ABS if absolute_header else N_SECT) | 1)
        header = header._replace(n_sect=0 if absolute_header else 1)
        self.symbols[header.name] = places.text
        flags = macho.MH_NOUNDEFS | (0 if absolute_header else macho.MH_PIE)
        file = macho.MachO(self.arch, macho.MH_EXECUTE, flags)
        linkedit = self._segments(file)
        tables = file.symtab([header, *self.entries, *more], linkedit=linkedit)
        if keep_linkedit:
            region = self._region("__LINKEDIT", linkedit)
            region.write(region.alloc(len(tables)), tables)
        if uuid is not None:
            file.uuid(uuid)
        if source_version:
            file.source_version(*source_version)
        file.thread(macho.thread_state(self.arch, **(registers or {})), unix=True)
        if file.head_size() > self.memory.page:
            raise ValueError("the load commands do not fit before the kernel's constants")
        self._text.write(places.text + self.slide, file.head(self.slide))
        return file.build()

    def _segments(self, file: macho.MachO) -> int:
        """All segments but __LINKEDIT, whose address is given back."""
        page = self.memory.page
        if self._data.end - self.slide > self.places.common:
            raise ValueError("__data runs into __common")
        self._data.alloc(self.places.common - (self._data.end - self.slide), 1)
        code_size = self._code.end - self._code_base
        text_end = up(self._text.end, page) - self.slide
        if self.places.full:
            self._text.alloc(self.places.data - text_end, 1)
            text_end = self.places.data
        const = Section("__const", "__TEXT", self._consts - self.slide, _CONST_SIZE)
        code_base = self._code_base - self.slide
        code = Section("__text", self._code.name, code_base, code_size, _INSTRUCTIONS)
        in_text = [const] if self.arch == "arm64" else [const, code]
        content = bytes(self._text.data).ljust(text_end - self.places.text, b"\0")
        file.segment("__TEXT", self.places.text, content, fileoff=0, prot=5, sections=in_text)
        if self.arch == "arm64":
            for region, section in ((self._data_const, None), (self._code, code)):
                address = region.base - self.slide
                section = section or Section("__const", region.name, address, page)
                padded = bytes(region.data).ljust(up(len(region.data), page), b"\0")
                file.segment(region.name, address, padded, prot=5, sections=[section])
        kld = self._data_segment(file)
        file.segment("__KLD", kld, bytes(page), prot=5)
        if self.arch == "x86_64":
            file.segment("__HIB", self._hib.base - self.slide, bytes(self._hib.data), prot=5)
        return kld + page

    def _data_segment(self, file: macho.MachO) -> int:
        """__DATA: __data on file, __common after it in memory only; gives its end."""
        base, common = self.places.data, self.places.common
        content = bytearray(common - base)
        for address, piece in self._initial:
            content[address - base : address - base + len(piece)] = piece
        end = up(self._common.end - self.slide, self.memory.page)
        sections = [
            Section("__data", "__DATA", base, common - base),
            Section("__common", "__DATA", common, end - common, macho.S_ZEROFILL),
        ]
        file.segment("__DATA", base, bytes(content), vmsize=end - base, prot=3, sections=sections)
        return end
