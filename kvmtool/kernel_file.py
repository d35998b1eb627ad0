"""A kernel's (or kext's) file, whatever it is wrapped in."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

from kvmtool import macho
from kvmtool.errors import FormatError, KvmWarning
from kvmtool.macho import MachO
from kvmtool.source import FileSource

if TYPE_CHECKING:
    from kvmtool.peel import Layer
    from kvmtool.source import Source


class KernelFile(NamedTuple):
    """A kernel's file, peeled: the outermost Mach-O in it, and the layers taken off before.

    `path` is the file's own, as it was given.
    """

    image: MachO
    layers: tuple[Layer, ...]
    path: str

    @property
    def kernel(self) -> MachO:
        """The kernel itself, which in a kernel collection is one image of many."""
        if self.image.filetype != macho.MH_FILESET:
            return self.image
        from kvmtool.kernelcache import open_collection

        return open_collection(self.image).kernel


def open_kernel(path: str, arch: str | None = None) -> KernelFile:
    """The Mach-O in the file at `path`, whatever it is wrapped in; `arch` picks a fat slice.

    The caller closes its source. Raises OSError, or what `peel` and `MachO` raise.
    """
    source: Source = FileSource(path)
    layers: tuple[Layer, ...] = ()
    if not macho.is_macho(source.read_at(0, min(4, source.size))):
        from kvmtool.peel import peel

        source, layers = peel(source, arch)
    image = MachO(source)
    if image.command_runs and image.warnings:
        for text in image.warnings:
            warnings.warn(f"{path}: {text}", KvmWarning, stacklevel=3)
    if image.filetype == macho.MH_CORE:
        raise FormatError(path, 12, "this is a core, expected a kernel: name it with -M instead")
    return KernelFile(image, layers, path)
