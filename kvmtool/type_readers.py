"""A file of types, known by its bytes, and the reader that is for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, NotFoundError, UnknownFormatError
from kvmtool.macho import MAGICS, MachO

if TYPE_CHECKING:
    from kvmtool.source import Source
    from kvmtool.types.model import TypeSource

_ZIP = b"PK\x03\x04"


class Read(NamedTuple):
    """Types, and what their file says of the kernel they are of: LC_UUID, or its banner."""

    source: TypeSource
    uuid: bytes | None = None
    banner: str | None = None


def read_types(held: list[Source], arch: str | None, pointer_size: int | None) -> Read:
    """The types in the open file `held`, to which other sources that are opened are added.

    `arch` is the slice of a fat file, `pointer_size` what bare CTF is read with. Raises
    `UnknownFormatError`, `FormatError`, or NotFoundError("types") for a Mach-O without types.
    """
    source = held[0]
    head = source.read_at(0, min(16, source.size))
    if head.startswith(_ZIP):
        from kvmtool.types.vtypes import open_profile

        return Read(open_profile(source.name))
    if head[:4] in MAGICS:
        return _in_macho(MachO(source))
    from kvmtool.types.ctf import is_ctf

    if is_ctf(head):
        from kvmtool.types.ctf import open_ctf

        return Read(open_ctf(source, pointer_size=pointer_size))
    from kvmtool.types.isf import is_isf

    return _in_isf(source) if is_isf(source) else _in_wrapping(held, arch)


def dwarf_in(image: MachO) -> TypeSource | None:
    """The DWARF that a Mach-O carries, if any. Raises `FormatError`."""
    if not any(section.segname == "__DWARF" for section in image.sections):
        return None
    from kvmtool.types.dwarf import open_dwarf

    return open_dwarf(image)


def ctf_in(image: MachO) -> TypeSource | None:
    """The CTF that a Mach-O carries, if any. Raises `FormatError`."""
    if not image.warnings and not any(section.segname == "__CTF" for section in image.sections):
        return None
    from kvmtool.types.ctf import ctf_of

    return ctf_of(image)


def _in_wrapping(held: list[Source], arch: str | None) -> Read:
    """A Mach-O in a fat file, or in whatever else `peel` sees through."""
    from kvmtool.kernel_file import open_kernel

    source = held[0]
    try:
        image = open_kernel(source.name, arch).kernel
    except FormatError as error:
        if isinstance(error, UnknownFormatError) or (error.source, error.offset) != (
            source.name,
            0,
        ):
            raise
        head = source.read_at(0, min(4, source.size)).hex() or "nothing"
        what = f"expected a Mach-O, CTF, ISF or a Volatility 2 profile, got {head}"
        raise UnknownFormatError(source.name, 0, what) from error
    held.append(image.source)
    return _in_macho(image)


def _in_macho(image: MachO) -> Read:
    found = dwarf_in(image) or ctf_in(image)
    if found is None:
        hint = "it has neither DWARF nor CTF"
        raise NotFoundError("types", f"in {image.source.name}", hint=hint)
    return Read(found, image.uuid)


def _in_isf(source: Source) -> Read:
    from kvmtool.types.isf import open_isf

    found = open_isf(source.name)
    raw = (found.constant("version") or b"").partition(b"\0")[0]
    return Read(found, None, raw.decode("utf-8", "replace").strip() or None)
