"""extract: a kernel, a kext or a core as a file by itself."""

from __future__ import annotations

import os
import stat
from contextlib import closing
from typing import TYPE_CHECKING

import click

from kvmtool import progress
from kvmtool.cli import PARTIAL, say
from kvmtool.cli.command import Sectioned
from kvmtool.cli.opening import opened
from kvmtool.cli.params import Where, core_argument, kernel_options
from kvmtool.errors import FormatError, KvmError, NotFoundError, TruncatedError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from kvmtool.kvm import Kvm
    from kvmtool.macho import MachO
    from kvmtool.source import Source

_CHUNK = 1 << 20  # bytes held at a time


@click.group()
def extract() -> None:
    """Take a kernel, a kext or a core out of the file it is in, as a file by itself.

    OUT is there when all of it is, or not at all; nothing is overwritten without --overwrite.

    \b
    Example:
      kvmtool extract kernel mach_kernel -N kernelcache
    """


_out_argument = click.argument("out", metavar="OUT", type=click.Path())
_overwrite_option = click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
_decode_option = click.option(
    "--decode-pointers",
    "decode",
    is_flag=True,
    help="Write pointers that the file has packed as they will be in memory, without a slide.",
)


@extract.command(cls=Sectioned)
@_out_argument
@click.option("--whole", is_flag=True, help="All of a kernel collection, its kexts too.")
@_decode_option
@_overwrite_option
@kernel_options
def kernel(out: str, whole: bool, decode: bool, overwrite: bool, where: Where) -> None:
    """Write the kernel in a kernel's file to OUT.

    Out of a fat file, an IM4P or a compressed kernelcache it comes byte for byte; out of a kernel
    collection with offsets, symbols and names of its own. The pointers of a collection are packed,
    and nothing in OUT says which words they are: --decode-pointers makes them addresses.

    \b
    Example:
      kvmtool extract kernel mach_kernel -N kernelcache
    """
    from kvmtool.fileset import EntrySource

    check_out(out, overwrite, where)
    if whole:
        _write_file(out, overwrite, _whole(where, decode))
        return
    kvm = opened(where)
    image = _kernel_of(kvm)
    if decode or isinstance(image.source, EntrySource):
        _write_image(out, overwrite, image, kvm, decode)
    else:
        _write_file(out, overwrite, image.source)


def _whole(where: Where, decode: bool) -> Source:
    """The outermost Mach-O of the kernel's file."""
    from kvmtool.kernel_file import open_kernel

    if where.kernel is None:
        raise click.UsageError("--whole needs a kernel's file (-N)")
    if decode:
        raise click.UsageError("--whole writes the file as it is: leave --decode-pointers out")
    source = open_kernel(where.kernel, where.arch).image.source
    return click.get_current_context().with_resource(closing(source))


def _kernel_of(kvm: Kvm) -> MachO:
    from kvmtool.image import LoadedImage

    image = kvm.kernel
    if image is None:
        raise KvmError(kvm.symbols.hint)
    if isinstance(image.source, LoadedImage):
        # its header may be slid when its symbols are not, and its data is not what it was
        raise UnsupportedError(
            f"{image.source.name}: the kernel in a core is no file: name its file with -N"
        )
    return image


@extract.command(cls=Sectioned)
@click.argument("identifier", metavar="IDENTIFIER")
@_out_argument
@_decode_option
@_overwrite_option
@kernel_options
def kext(identifier: str, out: str, decode: bool, overwrite: bool, where: Where) -> None:
    """Write the executable of the kext IDENTIFIER in a kernel's file to OUT.

    The last part of an identifier will do where no other kext has it; `kexts` lists them. Pointers
    are as in the file, which in a kernel collection has them packed.

    \b
    Example:
      kvmtool extract kext com.apple.driver.IOUSBHIDDriver OUT -N kernelcache
    """
    check_out(out, overwrite, where)
    kvm = opened(where)
    found = kvm.kexts.find(identifier)
    if found.image is None:
        raise UnsupportedError(f"kext {found.identifier} has nothing to write: {found.origin}")
    _write_image(out, overwrite, found.image, kvm, decode)


@extract.command(cls=Sectioned)
@_out_argument
@click.option("--member", metavar="NAME", help="Of a corefile, this file instead of the kernel's.")
@click.option("--partial", is_flag=True, help="Write what a damaged file still yields; status 3.")
@_overwrite_option
@kernel_options
@core_argument
def core(out: str, member: str | None, partial: bool, overwrite: bool, where: Where) -> None:
    """Write the core in a corefile or a gzip file to OUT.

    A corefile is what a panicking kernel writes to its own disk: a log, and one core or more, each
    of them compressed.

    \b
    Example:
      kvmtool extract core core.macho corefile
    """
    if where.core is None:
        raise click.UsageError("no core: name the file it is in")
    check_out(out, overwrite, where)
    stream = Stream(_inside(where.core, member), partial)
    write_out(out, overwrite, stream.pieces(), stream.source.size)
    if stream.damage:
        say(f"{out} is not whole: {stream.damage}")
        click.get_current_context().exit(PARTIAL)


def _inside(path: str, member: str | None) -> Source:
    """The core in the file at `path`, decoded; closed when the command ends."""
    from kvmtool.formats.corefile import Corefile
    from kvmtool.source import FileSource, open_source

    ctx = click.get_current_context()
    source = ctx.with_resource(closing(open_source(path)))
    if not Corefile.probe(source.read_at(0, min(8, source.size))):
        if member is not None or isinstance(source, FileSource):
            what = "a corefile" if member is not None else "a corefile or a gzip file"
            raise FormatError(path, 0, f"expected {what}")
        return source
    container = Corefile(source)
    if member is None:
        return ctx.with_resource(closing(container.open_member(container.kernel_member())))
    for found in container.members:
        if found.name == member:
            return ctx.with_resource(closing(container.open_member(found)))
    raise NotFoundError("member", member, [found.name for found in container.members])


class Stream:
    """The bytes of a source that may be damaged; `damage` says how, when it is known."""

    def __init__(self, source: Source, partial: bool) -> None:
        """Damage is an error unless `partial`, which ends the stream there."""
        self.source, self.partial = source, partial
        self.damage = _damage(source)

    def pieces(self) -> Iterator[bytes]:
        """All that can be read, in order. Raises `KvmError` for damage."""
        if self.damage and not self.partial:
            raise KvmError(f"{self.damage}; --partial writes what can be decoded")
        at, step = 0, _CHUNK
        while at < self.source.size and step:
            try:
                data = self.source.read_at(at, min(step, self.source.size - at))
            except FormatError as error:
                if not self.partial:
                    raise
                self.damage, step = str(error), step // 2
                continue
            yield data
            at += len(data)


def _damage(source: Source) -> str:
    """What is wrong with a compressed stream, as far as its size tells; "" for nothing."""
    from kvmtool.gzip_source import GzipSource
    from kvmtool.lz4_source import Lz4Source

    if isinstance(source, GzipSource):
        return "; ".join(source.problems)
    if isinstance(source, Lz4Source):
        try:
            source.read_at(source.size, 1)  # beyond the end: raises what ended the frame
        except TruncatedError as end:
            return str(end) if source.truncated else ""
        except FormatError as error:
            return str(error)
    return ""


# writing


def _write_image(out: str, overwrite: bool, image: MachO, kvm: Kvm, decode: bool) -> None:
    from kvmtool.macho_writer import Standalone

    if decode and kvm.dump is not None:
        raise click.UsageError("--decode-pointers is for a kernel's file alone, without a core")
    new = Standalone(image, kvm.memory if decode else None)
    write_out(out, overwrite, new.pieces(), new.size)


def _write_file(out: str, overwrite: bool, source: Source) -> None:
    write_out(out, overwrite, Stream(source, False).pieces(), source.size)


def check_out(out: str, overwrite: bool, where: Where) -> None:
    """Raises `KvmError` when a file at `out` is in the way."""
    try:
        status = os.lstat(out)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise KvmError(f"{out} is there already, and no regular file")
    for path in (where.kernel, where.core):
        if path is not None and os.path.exists(path) and os.path.samestat(status, os.stat(path)):
            raise KvmError(f"{out} is the file that is read")
    if not overwrite:
        raise KvmError(f"{out} is there already: --overwrite replaces it")


def write_out(out: str, overwrite: bool, pieces: Iterable[bytes], size: int) -> None:
    """Write `pieces`, `size` bytes unless they end early, to a new file and give it the name `out`.

    Whatever goes wrong (Ctrl-C, too), no part of it stays.
    """
    from kvmtool.new_file import new_file

    try:
        with new_file(out, overwrite) as file, closing(_watched(pieces, size)) as watched:
            written = sum(map(file.write, watched))
    except OSError as error:
        error.filename = error.filename or out
        raise
    click.echo(f"wrote {click.format_filename(out)}: {written:#x} bytes")


def _watched(pieces: Iterable[bytes], size: int) -> Generator[bytes]:
    """`pieces`, telling how far they are."""
    done = 0
    for piece in pieces:
        yield piece
        done += len(piece)
        progress.step("writing", done, size)
    progress.end("writing")
