"""Kernels, kexts and dSYMs in the user's directories, whatever they are wrapped in."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from kvmtool import kernel_index
from kvmtool.macho import is_macho
from kvmtool.peel import fat, peel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmtool.kernel_index import KnownFile, Survey
    from kvmtool.source import Source

# First bytes of what `peel` sees through: fat, comp, LZFSE and LZVN, gzip, xz, zstd, DER.
_KERNELS = (fat.FAT_MAGIC, fat.FAT_MAGIC_64, b"comp", b"bvx", b"\x30")
_ARCHIVES = (b"\x1f\x8b", b"\xfd7zX", b"\x28\xb5\x2f\xfd")
_XZ_MEMORY = 1 << 27
_PEEK = 1 << 16  # bytes that are decoded of an archive to see whether a kernel may be in it


class PeelOpener:
    """Sees through whatever `peel` does, into every slice of a fat file."""

    name = "peel"

    def wants(self, head: bytes) -> bool:
        """See `kernel_index.Opener.wants`."""
        return head.startswith((*_KERNELS, *_ARCHIVES))

    def images(self, source: Source) -> Iterator[Source]:
        """See `kernel_index.Opener.images`."""
        head = source.read_at(0, min(8, source.size))
        if head.startswith(_ARCHIVES) and not _begins_like_a_kernel(source):
            return
        names = [piece.name for piece in fat.slices(source)] if fat.probe(head) else [None]
        for arch in names:
            inside = peel(source, arch).source
            if is_macho(inside.read_at(0, min(4, inside.size))):
                yield inside


def _begins_like_a_kernel(source: Source) -> bool:
    """A folder full of packed logs costs a few bytes of each, not all that is in them."""
    raw = source.read_at(0, min(_PEEK, source.size))
    try:
        if raw.startswith(_ARCHIVES[0]):
            first = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(raw, 8)
        elif raw.startswith(_ARCHIVES[1]):
            from lzma import LZMADecompressor, LZMAError

            try:
                first = LZMADecompressor(memlimit=_XZ_MEMORY).decompress(raw, 8)
            except LZMAError:
                return False
        else:  # zstd has no reader in the library before 3.14: `peel` decides
            return True
    except zlib.error:
        return False
    return is_macho(first) or first.startswith(_KERNELS)


_OPENERS = (PeelOpener(),)


def find_kernel(uuid: bytes, option: Sequence[str] | None) -> KnownFile | None:
    """The kernel of that UUID in the directories of --kernel-path, else KVMTOOL_KERNEL_PATH."""
    return kernel_index.find(uuid, kernel_index.search_path(option), "kernel", _OPENERS)


def find_debug_file(uuid: bytes, option: Sequence[str] | None) -> KnownFile | None:
    """The dSYM's Mach-O of that UUID there."""
    return kernel_index.find(uuid, kernel_index.search_path(option), "dSYM", _OPENERS)


def survey(option: Sequence[str] | None) -> Survey:
    """All that lies in these directories, and what could not be read there."""
    return kernel_index.survey(kernel_index.search_path(option), _OPENERS)
