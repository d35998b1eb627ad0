"""The code of kexts in memory, held against their files.

A kext's file is the image that the kernel was linked into with its kexts, or one beside the
kernel's that has the kext's UUID, or is named with --kext. One that the kernel linked itself when
it was loaded is relocated as that linker does (libkern/kxld); what refers to a symbol that neither
the kernel nor another kext has is left out. Code is what a section of instructions holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.checks.changes import MOST, PAGE, Change, Teller, joined, runs
from kvmtool.checks.code import S_ATTR_PURE_INSTRUCTIONS, S_ATTR_SOME_INSTRUCTIONS
from kvmtool.checks.finding import DIFFERS, HIGH
from kvmtool.errors import (
    FaultError,
    FormatError,
    MismatchError,
    UnsupportedError,
)
from kvmtool.image import LoadedImage
from kvmtool.kext_file import load_kext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case
    from kvmtool.kext_file import LoadedKext
    from kvmtool.kext_search import KextFile
    from kvmtool.kexts import Kext
    from kvmtool.macho import MachO

_CODE = S_ATTR_PURE_INSTRUCTIONS | S_ATTR_SOME_INSTRUCTIONS
_LOOKED = "pages of kexts' code"


class _Filed(NamedTuple):
    """A kext as its file has it: `parts` are the names of sections of code and where they lie.

    `read` gives bytes by their address in memory, `unsure` what of a range the file leaves open.
    """

    name: str
    parts: tuple[tuple[str, int, int], ...]
    read: Callable[[int, int], bytes]
    unsure: Callable[[int, int], list[range]]


def kextcode(case: Case, outcome: Outcome) -> None:
    """Each page of a kext's code is as in its file, but for what is known to change it."""
    loaded = {kext.address for kext in case.kvm.loaded_kexts()}
    # of those linked with the kernel, what was not needed at start-up was given back
    kexts = [k for k in case.kvm.kexts if k.size and (k.address in loaded or _own_file(k))]
    files = _Files(case)
    lost = []
    try:
        for kext in kexts:
            try:
                filed = files.of(kext)
                if filed is None:
                    lost.append(kext.identifier)
                else:
                    _compare(case, outcome, kext, filed)
            except (FormatError, UnsupportedError, MismatchError) as error:
                outcome.failed.append(f"{kext.identifier}: {error}")
    finally:
        files.close()
    if lost:
        what = "a file" if len(lost) == 1 else f"files of {len(lost)} kexts"
        outcome.absent.append(f"{what} to compare with: {lost[0]}" + (" …" if lost[1:] else ""))
    if not kexts:
        outcome.absent.append("no kext is loaded")


def _compare(case: Case, outcome: Outcome, kext: Kext, filed: _Filed) -> None:
    teller = Teller(case, outcome, filed.name, filed.read)
    for section, start, end in filed.parts:
        place = f"{kext.identifier} {section}"
        found: list[Change] = []
        looked = 0
        for piece in case.kvm.memory.read_pieces(start, end - start):
            if piece.data is None:
                outcome.cannot_read(_LOOKED, f"{piece.reason} at {piece.address:#x}")
                continue
            looked += piece.size
            found += _changes(filed, piece.address, piece.data)
        outcome.count(_LOOKED, -(-looked // PAGE))
        if len(found) > MOST:
            evidence = f"{len(found)} changes, the first at {found[0].address:#x}"
            outcome.add(DIFFERS, HIGH, place, start, None, f"as in {filed.name}", evidence)
            continue
        for change in joined(found):
            teller.judge(change, _place(case, change.address, place))


def _place(case: Case, address: int, place: str) -> str:
    found = case.kvm.symbol_at(address)
    return place if found is None else str(found)


def _changes(filed: _Filed, address: int, data: bytes) -> list[Change]:
    """What of the `data` at `address` the file has otherwise."""
    was = bytearray(filed.read(address, len(data)))
    if was == data:
        return []
    for open_ in filed.unsure(address, len(data)):
        at = open_.start - address
        was[max(at, 0) : at + len(open_)] = data[max(at, 0) : at + len(open_)]
    return runs(address, bytes(was), data, len(data))


def _own_file(kext: Kext) -> bool:
    return kext.image is not None and kext.path == kext.image.source.name


class _Files:
    """The files of kexts; those beside the kernel's are opened when the first is asked for."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._beside: list[KextFile] | None = None

    def close(self) -> None:
        for file in self._beside or ():
            file.image.source.close()

    def of(self, kext: Kext) -> _Filed | None:
        """The kext as its file has it; None without a file. Raises what `load_kext` raises."""
        image = kext.image
        if image is not None and _own_file(kext):
            return self._loaded(image, kext)
        if image is not None and not isinstance(image.source, LoadedImage):
            return _linked_in(image, kext)
        if self._beside is None:
            self._beside = list(self._case.kvm.kexts_beside())
        found = next((file for file in self._beside if file.is_of(kext)), None)
        return None if found is None else self._loaded(found.image, kext)

    def _loaded(self, image: MachO, kext: Kext) -> _Filed:
        loaded = load_kext(image, kext.address, self._resolve)

        def unsure(address: int, size: int) -> list[range]:
            return list(_unsure(loaded, address, size))

        parts = tuple(_sections(image, loaded.slide))
        return _Filed(image.source.name, parts, loaded.memory.read, unsure)

    def _resolve(self, name: str) -> int | None:
        kvm = self._case.kvm
        found = kvm.symbols.get(name)
        if found is not None:
            return found.address
        for kext in kvm.kexts:
            symbol = kext.symbols.get(name)
            if symbol is not None:
                return symbol.address
        return None


def _linked_in(image: MachO, kext: Kext) -> _Filed | None:
    """A kext that was linked together with the kernel: its code is as it stands there."""
    text = image.segment("__TEXT")
    if text is None:
        return None
    shift = kext.address - text.vmaddr
    sections = [s for s in image.sections if s.flags & _CODE and s.size and not s.zerofill]

    def read(address: int, size: int) -> bytes:
        for section in sections:
            at = address - shift - section.addr
            if at >= 0 and at + size <= section.size:
                return image.source.read_at(section.offset + at, size)
        raise FaultError("kernel", address, size)

    return _Filed(image.source.name, tuple(_sections(image, shift)), read, lambda *_: [])


def _sections(image: MachO, shift: int) -> Iterator[tuple[str, int, int]]:
    for section in image.sections:
        if section.flags & _CODE and section.size and not section.zerofill:
            start = section.addr + shift
            yield f"{section.segname},{section.sectname}", start, start + section.size


def _unsure(loaded: LoadedKext, address: int, size: int) -> Iterator[range]:
    """Where the code refers to what nobody is known to define."""
    for section in loaded.image.sections:
        start = section.addr + loaded.slide
        if start <= address < start + section.size:
            shift = start - section.offset
            for place, width in loaded.relocations.unknown(address - shift, size):
                yield range(place + shift, place + shift + width)
