"""Symbols by name and by address. The slide is applied here and nowhere else."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import NotFoundError
from kvmtool.nlist import N_ABS, N_EXT, N_SECT, N_TYPE, N_UNDF

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.nlist import Nlist, NlistTable

_MANY = 24  # names looked for one by one before all are put in order
_NEAR = 3
_NEAR_POOL = 2000


class Symbol(NamedTuple):
    """A defined symbol: `address` in the running kernel, `n_value` as the linker wrote it."""

    name: str
    address: int
    n_type: int
    n_sect: int
    n_desc: int
    n_value: int


class SymbolTable:
    """The symbols of one Mach-O, `slide` bytes from where they were linked."""

    def __init__(self, table: NlistTable | None, slide: int, hint: str = "") -> None:
        """`table` is None where there is none: every lookup misses, and `hint` says why."""
        self.hint = hint
        self._table = table
        self.slide = slide
        self._found: dict[str, Symbol | None] = {}
        self._best: dict[bytes, int] | None = None
        self._by_address: tuple[array[int], array[int]] | None = None

    def __len__(self) -> int:
        return 0 if self._table is None else len(self._table)

    def __iter__(self) -> Iterator[Symbol]:
        """Every defined symbol in table order."""
        for entry in self._table or ():
            if entry.defined:
                yield self._slid(entry)

    def entries(self) -> Iterator[Nlist]:
        """Every entry in table order, stabs and undefined ones too, as linked."""
        return iter(self._table or ())

    def address_of(self, entry: Nlist) -> int:
        """Where the entry lies in the running kernel.

        An N_ABS value is a number and an undefined one a size (mach-o/nlist.h): neither moves.
        """
        if entry.n_type & N_TYPE in (N_ABS, N_UNDF):
            return entry.n_value
        return (entry.n_value + self.slide) & 0xFFFFFFFFFFFFFFFF

    def _slid(self, entry: Nlist) -> Symbol:
        address = self.address_of(entry)
        return Symbol(entry.name, address, entry.n_type, entry.n_sect, entry.n_desc, entry.n_value)

    def get(self, name: str) -> Symbol | None:
        """The symbol `name`: exactly, else with one leading underscore, else without it."""
        found = self._exact(name)
        if found is None and name:
            found = self._exact("_" + name)
            if found is None and name[0] == "_":
                found = self._exact(name[1:])
        return found

    def expect(self, count: int) -> None:
        """That many names will be asked for: many are found sooner with all of them in order."""
        if self._table is not None and self._best is None and count > _MANY:
            self._best = self._table.best_by_name()

    def _exact(self, name: str) -> Symbol | None:
        if name in self._found:
            return self._found[name]
        if self._best is None:
            self.expect(len(self._found))
        if self._best is not None and self._table is not None:
            index = self._best.get(name.encode("utf-8", "surrogateescape"))
            found = None if index is None else self._slid(self._table.at(index, name))
            self._found[name] = found
        else:
            entries = [] if self._table is None else self._table.find(name)
            defined = [entry for entry in entries if entry.defined]
            # Statics may share a name with each other and with the one the world sees.
            seen = next((entry for entry in defined if entry.n_type & N_EXT), None)
            best = seen or (defined[0] if defined else None)
            self._found[name] = None if best is None else self._slid(best)
        return self._found[name]

    def lookup(self, name: str) -> Symbol:
        """As `get`, but raises `NotFoundError` with near misses."""
        found = self.get(name)
        if found is None:
            raise NotFoundError("symbol", name, self.near(name), self._hint())
        return found

    def address(self, name: str) -> int:
        """The address of `name`; raises `NotFoundError`."""
        return self.lookup(name).address

    def _hint(self) -> str:
        if len(self):
            return ""
        return self.hint or "the kernel has no symbol table (is it stripped?)"

    def near(self, name: str) -> list[str]:
        """Up to three defined names that look like `name`."""
        stem = name.lstrip("_").lower()
        if not stem or self._table is None:
            return []
        import difflib

        pool = {s.name for s in self if abs(len(s.name) - len(name)) < 4}
        close = sorted(pool, key=lambda other: (stem[:4] not in other.lower(), other))
        return difflib.get_close_matches(name, close[:_NEAR_POOL], _NEAR, 0.75)

    def at(self, address: int) -> tuple[Symbol, int] | None:
        """The last symbol at or below `address`, and the distance in bytes; None below all."""
        addresses, indices = self._sorted()
        at = bisect_right(addresses, address) - 1
        if at < 0 or self._table is None:
            return None
        symbol = self._slid(self._table.entry(indices[at]))
        return symbol, address - symbol.address

    def extent(self, symbol: Symbol) -> int | None:
        """The bytes from a symbol to the next one of another address; None for the last.

        What a variable without padding takes. nlist knows no sizes.
        """
        addresses, _ = self._sorted()
        at = bisect_right(addresses, symbol.address)
        return addresses[at] - symbol.address if at < len(addresses) else None

    def _sorted(self) -> tuple[array[int], array[int]]:
        if self._by_address is None:
            pairs = [
                # of several names for one place the one the world sees comes last, and wins
                ((value + self.slide) & 0xFFFFFFFFFFFFFFFF, n_type & N_EXT, index)
                for index, n_type, value in (self._table.values() if self._table else ())
                if n_type & N_TYPE == N_SECT
            ]
            pairs.sort()
            self._by_address = (
                array("Q", [pair[0] for pair in pairs]),
                array("Q", [pair[2] for pair in pairs]),
            )
        return self._by_address
