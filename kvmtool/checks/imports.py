"""The tables by which kexts, and the kernel itself, reach what lies in other images.

Source: mach-o/loader.h (S_NON_LAZY_SYMBOL_POINTERS, S_LAZY_SYMBOL_POINTERS), libkern/kxld, and
ld64 for the names of sections whose pointers are signed (__auth_got, __auth_ptr).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.checks.code import KERNEL
from kvmtool.checks.finding import DIFFERS, HIGH, HOOK, MEDIUM, OUTSIDE
from kvmtool.image import LoadedImage
from kvmtool.macho import SECTION_TYPE
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case
    from kvmtool.kexts import Kext
    from kvmtool.macho import MachO, Section
    from kvmtool.xnu.kext import KextInfo

S_NON_LAZY_SYMBOL_POINTERS, S_LAZY_SYMBOL_POINTERS = 6, 7
_NAMES = ("__got", "__auth_got", "__auth_ptr", "__la_symbol_ptr", "__nl_symbol_ptr")
_LIMIT = 1 << 16  # pointers in one table
_MOST = 1 << 20  # in all of them


def imports(case: Case, outcome: Outcome) -> None:
    """Each pointer of such a table is as linked, and leads to an image its owner is linked with."""
    kernel = case.kvm.kernel
    if kernel is not None:
        of_file = not isinstance(kernel.source, LoadedImage)
        for section in _tables(kernel):
            _kernels(case, outcome, section, of_file)
    loaded = {kext.name: kext for kext in case.kvm.loaded_kexts()}
    linked = _linked(loaded)
    for kext in case.kvm.kexts:
        image, _ = case.code.image_of(kext)
        if image is None:
            continue
        base = image.segment("__TEXT")
        shift = kext.address - (base.vmaddr if base is not None else kext.address)
        for section in _tables(image):
            if sum(outcome.looked.values()) > _MOST:
                outcome.failed.append(f"more than {_MOST} imported pointers")
                return
            _kexts(case, outcome, kext, section, shift, linked.get(kext.identifier))
    if not outcome.looked and not outcome.unreadable:
        outcome.absent.append("no image has a table of imports that can be read")


def _tables(image: MachO) -> Iterator[Section]:
    kinds = (S_NON_LAZY_SYMBOL_POINTERS, S_LAZY_SYMBOL_POINTERS)
    for section in image.sections:
        kind = section.flags & SECTION_TYPE
        if not section.zerofill and (kind in kinds or section.sectname in _NAMES):
            yield section


def _slots(case: Case, section: Section, shift: int) -> Iterator[tuple[int, Any]]:
    size = case.target.arch.pointer_size
    for number in range(min(section.size // size, _LIMIT)):
        at = section.addr + shift + number * size
        yield at, case.read_pointer(at)


def _kernels(case: Case, outcome: Outcome, section: Section, of_file: bool) -> None:
    """The kernel's own: what its file has, or at least a place in some image."""
    name = f"{section.segname},{section.sectname}"
    what = f"pointers in {name}"
    for at, pointer in _slots(case, section, case.code.shift):
        if isinstance(pointer, Unreadable):
            outcome.cannot_read(what, pointer.reason)
            continue
        outcome.count(what)
        linked = case.linked(at) if of_file else None
        if pointer == linked or (linked is None and (not pointer or case.code.owner(pointer))):
            continue
        where = f"{name}+{at - section.addr - case.code.shift:#x}"
        expected = "a place in an image" if linked is None else str(case.kvm.code_at(linked))
        evidence = f"{pointer:#x} is not what the kernel's file has"
        if linked is None:
            evidence = f"{pointer:#x} lies in no image"
        found = case.kvm.code_at(pointer)
        outcome.add(DIFFERS if linked else OUTSIDE, HIGH, where, at, found, expected, evidence)


def _kexts(
    case: Case,
    outcome: Outcome,
    kext: Kext,
    section: Section,
    shift: int,
    linked: frozenset[str] | None,
) -> None:
    """A kext's: a place in the kernel, in itself, or in a kext it is linked against."""
    lazy = section.flags & SECTION_TYPE == S_LAZY_SYMBOL_POINTERS
    what = "pointers that kexts import"
    for at, pointer in _slots(case, section, shift):
        if isinstance(pointer, Unreadable):
            outcome.cannot_read(what, pointer.reason)
            continue
        if not pointer:
            continue
        outcome.count(what)
        owner = case.code.code_owner(pointer) if lazy else case.code.owner(pointer)
        if owner in (KERNEL, kext.identifier) or (owner and (linked is None or owner in linked)):
            continue
        where = f"{kext.identifier}: {section.sectname}+{at - section.addr - shift:#x}"
        expected = "a place in the kernel, or in a kext it is linked against"
        found = case.kvm.code_at(pointer)
        if owner is None:
            outcome.add(
                OUTSIDE, case.severity(pointer), where, at, found, expected, case.nowhere(pointer)
            )
        else:
            evidence = f"{pointer:#x} points into kext {owner}, which it is not linked against"
            outcome.add(HOOK, MEDIUM, where, at, found, expected, evidence)


def _linked(loaded: Mapping[Any, KextInfo]) -> dict[str, frozenset[str]]:
    """Kext → the kexts it is linked against, by themselves or through another.

    A kext whose list cannot be read is left out, and so is one without any: it may not be kept.
    """
    names = {kext.index: name for name, kext in loaded.items() if isinstance(name, str)}
    direct = {
        name: {names[index] for index in kext.linked if index in names}
        for name, kext in loaded.items()
        if isinstance(name, str) and isinstance(kext.linked, list) and kext.linked
    }
    found = {}
    for name in direct:
        reached: set[str] = set()
        waiting = [name]
        while waiting:
            for other in direct.get(waiting.pop(), ()):
                if other not in reached:
                    reached.add(other)
                    waiting.append(other)
        found[name] = frozenset(reached)
    return found
