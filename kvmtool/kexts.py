"""Kexts as citizens: their symbols by `kext:symbol` and by address, beside the kernel's.

A kext comes from the image the kernel is in (a prelinked kernel, a kernel collection) or from a
file of its own, loaded at an address the user names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FaultError, FormatError, NotFoundError
from kvmtool.image import LoadedImage
from kvmtool.macho import MachO
from kvmtool.symbols import Symbol, SymbolTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtool.kernelcache import KextImage
    from kvmtool.kext_file import LoadedKext
    from kvmtool.memory import Memory
    from kvmtool.nlist import NlistTable


class Code(NamedTuple):
    """What a code pointer leads to: `offset` bytes into `symbol`, of `kext` (None: the kernel).

    `symbol` is None where its owner's symbols are not known: the offset is then from the start of
    the kext. `inside` is whether any known text holds the address at all.
    """

    address: int
    symbol: str | None
    offset: int
    kext: str | None
    inside: bool

    def __str__(self) -> str:
        if not self.inside:
            return f"{self.address:#x} (outside any text)" if self.address else "0"
        place = f"+{self.offset:#x}" if self.offset else ""
        if self.symbol is None:
            return f"{self.kext or hex(self.address)}{place}"
        return f"{self.kext}:{self.symbol}{place}" if self.kext else f"{self.symbol}{place}"


class Kext(NamedTuple):
    """One kext. `address` is where its Mach-O header lies in the running kernel, `size` bytes.

    `origin` says where its symbols come from; `image` is None for a kext without an executable.
    """

    identifier: str
    version: str | None
    uuid: bytes | None
    address: int
    size: int
    dependencies: tuple[str, ...]
    path: str | None
    origin: str
    image: MachO | None
    symbols: SymbolTable


class Located(NamedTuple):
    """What lies at an address: `symbol`, `offset` bytes into it, of `kext` (None: the kernel)."""

    symbol: Symbol
    offset: int
    kext: str | None

    @property
    def expression(self) -> str:
        """As an expression has it: "_symbol", "kext:_symbol+0x10"."""
        owner = f"{self.kext}:" if self.kext else ""
        return f"{owner}{self.symbol.name}" + (f"+{self.offset:#x}" if self.offset else "")

    def __str__(self) -> str:
        place = f"+{self.offset:#x}" if self.offset else ""
        owner = f" [{self.kext}]" if self.kext else ""
        return f"{self.symbol.name}{place}{owner}"


def from_image(found: KextImage, slide: int) -> Kext:
    """A kext inside the kernel's image, moved with it by `slide` bytes."""
    table = found.image.symtab if found.image is not None else None
    return Kext(
        found.identifier,
        found.version,
        found.uuid,
        found.address + slide if found.size else found.address,
        found.size,
        found.dependencies,
        found.path,
        found.origin,
        found.image,
        SymbolTable(table, slide, f"{found.identifier}: {found.origin}"),
    )


def from_file(loaded: LoadedKext) -> Kext:
    """A kext's own file, at the address the user named."""
    return Kext(
        loaded.identifier,
        loaded.version,
        loaded.uuid,
        loaded.address,
        loaded.size,
        (),
        loaded.image.source.name,
        "own symbol table" if len(loaded.symbols) else "none: stripped",
        loaded.image,
        loaded.symbols,
    )


def from_memory(
    memory: Memory, identifier: str, version: str | None, address: int, size: int
) -> Kext:
    """A kext that lies in memory, its Mach-O header at `address`.

    Its symbols are there as long as the kernel kept its __LINKEDIT; `origin` says so if not.
    """
    image, table, uuid, moved = None, None, None, 0
    try:
        image = MachO(LoadedImage(memory, address, identifier))
        uuid = image.uuid
    except (FormatError, FaultError) as error:
        origin = f"none: {error}"
    else:
        table, origin = _table_in_memory(image)
        moved = _moved(table, address, size)
    symbols = SymbolTable(table, moved, f"{identifier}: {origin}")
    return Kext(identifier, version, uuid, address, size, (), None, origin, image, symbols)


def _table_in_memory(image: MachO) -> tuple[NlistTable | None, str]:
    """The symbol table if all of it is there, and where it comes from."""
    try:
        table = image.symtab
        if table is None or not len(table):
            return None, "none: stripped"
        image.source.read_at(table.symoff, table.table_size)
        image.source.read_at(table.stroff, table.strsize)
    except (FormatError, FaultError):
        return None, "none: its symbol table is not in memory"
    return table, "own symbol table, in memory"


def _moved(table: NlistTable | None, address: int, size: int) -> int:
    """How far the symbols are from where they run: kxld relocates a table, not every loader does.

    `_kmod_info`, which every kext has, tells: it is in the kext, or counted from its start.
    """
    found = table.find("_kmod_info") if table is not None else []
    value = next((entry.n_value for entry in found if entry.defined), address)
    return address if not address <= value < address + size and value < size else 0


def with_loaded(known: list[Kext], loaded: Iterable[Kext]) -> list[Kext]:
    """The `known` kexts of files and images, and of those in memory the ones not among them.

    A file that was said to lie where a kext is loaded is that kext, and is called as it is.
    """
    merged = {kext.address or kext.identifier: kext for kext in known}
    names = {kext.identifier for kext in known}
    for kext in loaded:
        there = merged.get(kext.address)
        if there is not None:
            merged[kext.address] = there._replace(identifier=kext.identifier, version=kext.version)
        elif kext.identifier not in names:
            merged[kext.address] = kext
    return list(merged.values())


class Kexts:
    """The kexts of one kernel, in the order they were found."""

    def __init__(self, kexts: list[Kext]) -> None:
        self._kexts = kexts
        self._sorted = sorted((k for k in kexts if k.size), key=lambda kext: kext.address)

    def __iter__(self) -> Iterator[Kext]:
        return iter(self._kexts)

    def __len__(self) -> int:
        return len(self._kexts)

    def find(self, name: str) -> Kext:
        """The kext called `name`: its identifier, or the end of one that no other has.

        Raises `NotFoundError` with near misses.
        """
        exact = [kext for kext in self._kexts if kext.identifier == name]
        found = exact or [k for k in self._kexts if k.identifier.endswith("." + name)]
        if len(found) == 1:
            return found[0]
        near = [kext.identifier for kext in found]
        if not near:
            from difflib import get_close_matches

            near = get_close_matches(name, [kext.identifier for kext in self._kexts])
        raise NotFoundError("kext", name, near[:3])

    def lookup(self, name: str) -> Symbol:
        """The symbol `kext:symbol`. Raises `NotFoundError` for the one or the other."""
        owner, _, symbol = name.partition(":")
        return self.find(owner).symbols.lookup(symbol)

    def having(self, symbol: str) -> list[str]:
        """`kext:symbol` for every kext that has a symbol of this very name."""
        return [
            f"{kext.identifier}:{found.name}"
            for kext in self._kexts
            if (found := kext.symbols.get(symbol)) is not None
        ]

    def owner(self, address: int) -> Kext | None:
        """The kext whose memory holds `address`."""
        inside = (k for k in self._sorted if k.address <= address < k.address + k.size)
        return next(inside, None)

    def at(self, address: int) -> Located | None:
        """The symbol at or below `address` in the kext that holds it."""
        kext = self.owner(address)
        found = kext.symbols.at(address) if kext is not None else None
        if kext is None or found is None or found[0].address < kext.address:
            return None
        return Located(found[0], found[1], kext.identifier)
