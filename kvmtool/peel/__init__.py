"""Whatever a person calls "the kernel", peeled down to a thin Mach-O.

Kernels come in fat files, IM4P and IMG4 payloads, `comp` images, LZFSE streams, or packed with
gzip, xz or zstd, one around the other. The layers are recognised by their bytes, never by the name
of the file; `unwrap` has the list of them. Nothing of all that is loaded for a file that already is
a thin Mach-O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.macho import MAGICS
from kvmtool.peel.layer import Layer, Peeled

if TYPE_CHECKING:
    from kvmtool.peel.fat import Slice
    from kvmtool.source import Source

__all__ = ["Layer", "Peeled", "peel", "slices"]


def peel(source: Source, arch: str | None = None) -> Peeled:
    """The innermost bytes of `source`, and the layers taken off on the way, outermost first.

    `arch` (a name as `macho.arch_name` gives it) picks the slice of a fat file; one that holds a
    single slice needs none. Bytes that no layer recognises end the peeling and are returned as they
    are: whoever expects a Mach-O there says what is wrong. Closing the result closes `source`; when
    an error is raised `source` stays the caller's.

    At most `layer.MAX_LAYERS` layers deep, and `layer.LIMIT` decoded bytes in all; what a header
    claims is checked before it is believed, and never exceeded. Decoded bytes are kept in the
    user's cache.

    Raises `FormatError` for damage (file, offset, expected, found; the layers already taken off
    stand behind the file's name), `UnsupportedError` for encrypted payloads and codecs that are not
    installed, `NotFoundError` for an architecture that is not there, `KvmError` when there are
    several and none is named; OSError when there is no room for what is decoded.
    """
    if source.read_at(0, min(4, source.size)) in MAGICS:
        return Peeled(source, ())
    from kvmtool.peel.unwrap import unwrap

    return unwrap(source, arch)


def slices(source: Source) -> list[Slice]:
    """The slices of a fat or fat64 file, in file order. Raises `FormatError` if it is none."""
    from kvmtool.peel import fat

    return fat.slices(source)
