"""Raw images of physical memory with a kernel in them, of any size, and pages mapped anywhere."""

from __future__ import annotations

import math
import mmap
import os
import random
from typing import Any, NamedTuple

MIB = 1 << 20
PAGE, LARGE = 4096, 2 * MIB
STATIC = 0xFFFFFF8000000000  # the virtual minus the physical address of a static kernel
LINK = STATIC + 0x200000
DATA = 0xFFFFFF8400000000  # where the pages to be read are mapped


class Run(NamedTuple):
    """`size` bytes at DATA + `offset` that lie at `physical`."""

    offset: int
    physical: int
    size: int


class Image(NamedTuple):
    """A raw image of physical memory with a kernel in it, and its kernel's file."""

    path: str
    kernel: str
    root: int
    at: int  # the kernel's header in physical memory
    runs: list[Run]


def fragments(size: int, page: int = PAGE, mean: int = 16) -> list[Run]:
    """[0, size) shuffled in pieces of a geometric distribution, `mean` pages on average."""
    rand = random.Random(4)
    pieces, at = [], 0
    while at < size // page:
        count = 1
        if mean > 1:
            count += int(math.log(1 - rand.random()) / math.log(1 - 1 / mean))
        count = min(count, size // page - at)
        pieces.append((at * page, count * page))
        at += count
    rand.shuffle(pieces)
    runs, offset = [], 0
    for physical, length in pieces:
        runs.append(Run(offset, physical, length))
        offset += length
    return runs


def write_image(
    path: str,
    size: int,
    data: int,
    *,
    page: int = PAGE,
    mean: int = 16,
    skew: int = 0x23000,
) -> Image:
    """`data` random bytes, mapped in fragments; 4 MiB before the end a kernel; else holes.

    It begins `skew` bytes behind a 2 MiB boundary: on one, it is found without a scan. Without a
    `page` size nothing but the kernel is mapped.
    """
    from builders import tiny_kernel
    from builders.pagetable import Tables

    at = size - 4 * MIB + skew
    with open(path, "wb+") as file:
        for _ in range(0, data, 16 * MIB):
            file.write(os.urandom(16 * MIB))
        file.truncate(size)
        memory: Any = mmap.mmap(file.fileno(), size)
        tables = Tables("4-level", 0, memory)
        slide = at + STATIC - LINK
        pointers = {"_IdlePML4": tables.root + STATIC}
        kernel = tiny_kernel.build("x86_64", LINK, slide, variables=pointers)
        memory[at : at + len(kernel.image)] = kernel.image
        for offset in range(0, tiny_kernel.END, PAGE):
            tables.map(kernel.address + offset, at + offset)
        runs = fragments(data, page, mean) if page else []
        for run in runs:
            for inside in range(0, run.size, page):
                tables.map(DATA + run.offset + inside, run.physical + inside, size=page)
        memory.close()
    with open(path + ".mach_kernel", "wb") as out:
        out.write(kernel.file)
    return Image(path, path + ".mach_kernel", tables.root, at, runs)
