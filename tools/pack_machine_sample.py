"""Pack the second embedded sample: python tools/pack_machine_sample.py

`make machine` leaves a small dump of one run in build/machine/sample: physical memory of our own
kernel (tests/machine) as LiME, the mapped pages only, with the kernel's file and what it said of
itself on the serial line. This packs it into kvmtool/data/machine.zip.
"""

from __future__ import annotations

import lzma
import os
import sys
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from kvmtool.sample import MACHINE_README, RESOURCES  # noqa: E402

SAMPLE = os.path.join(ROOT, "build", "machine", "sample")
LIMIT = 250_000  # bytes
DATE = (2026, 11, 22, 0, 0, 0)  # so that the same run packs to the same bytes


def main() -> int:
    with lzma.open(os.path.join(SAMPLE, "x86_64.lime.xz")) as packed:
        contents = {"memory.lime": packed.read()}
    for name in ("mach_kernel", "serial.jsonl"):
        with open(os.path.join(SAMPLE, name), "rb") as file:
            contents[name] = file.read()
    contents["README.txt"] = MACHINE_README.encode()
    path = RESOURCES["machine"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name, DATE)
            entry.compress_type = zipfile.ZIP_LZMA
            archive.writestr(entry, content)
    size = os.path.getsize(path)
    print(f"{path}: {size} bytes")
    return 0 if size <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
