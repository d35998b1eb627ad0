"""Compare with pyaff4, in a virtualenv of its own: each reads the AFF4 volumes the other writes.

pyaff4 0.34 pins releases that no longer build, so it is installed without them, and with what it
imports for reading and writing. `--fixtures` writes the volumes in tests/data anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import venv

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

PEERS = os.path.join(ROOT, "build", "peers-aff4")
PYAFF4 = "pyaff4==0.34"
IMPORTED = (
    *("rdflib", "future", "cramjam", "lz4", "intervaltree", "tzlocal", "python-dateutil", "six"),
    *("pynacl", "pycryptodome", "passlib", "cryptography", "expiringdict", "hexdump", "pyyaml"),
    *("aes-keywrap", "html5lib", "pytz"),
)
JUDGE = os.path.join(ROOT, "tools", "pyaff4_judge.py")
WRITES = ("zlib", "snappy", "lz4", "stored")
READS = (
    *(("pmem2", method) for method in ("zlib", "snappy-pmem2", "stored-pmem2")),
    *(("pmem3", method) for method in ("zlib", "snappy", "lz4", "stored")),
)
DUMP = "x86_64-10.8.5"
_LENGTH = 4 << 20

Found = list[list[int | str]]  # address, bytes, SHA-256


def install() -> str:
    """pyaff4 in build/peers-aff4; the path of its Python."""
    python = os.path.join(PEERS, "bin", "python")
    done = os.path.join(PEERS, ".installed")
    if not os.path.exists(done):
        venv.create(PEERS, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *IMPORTED], check=True)
        subprocess.run([*pip, "--no-deps", PYAFF4], check=True)
        with open(done, "w", encoding="utf-8"):
            pass
    return python


def ranges() -> list[tuple[int, bytes]]:
    """The beginnings of a real dump's ranges where it is here, else what tests/data has."""
    from kvmtool.formats.lime import Lime
    from kvmtool.source import FileSource
    from tests.test_aff4 import RANGES

    if not os.path.isdir(os.path.join(ROOT, "..", "shared", "data", "dumps")):
        return list(RANGES)
    import inputs

    memory = Lime(FileSource(inputs.real(f"dumps/{DUMP}/mem.lime"))).physical()
    # pyaff4 takes minutes for a whole one
    return [(r.start, memory.read(r.start, min(r.size, _LENGTH))) for r in memory.regions()]


def ours(path: str) -> Found:
    """What kvmtool finds in a volume."""
    from kvmtool.formats.aff4 import Aff4
    from kvmtool.source import FileSource

    memory = Aff4(FileSource(path)).physical()
    assert memory is not None
    return digests([(r.start, memory.read(r.start, r.size)) for r in memory.regions()])


def digests(content: list[tuple[int, bytes]]) -> Found:
    """Ranges as the judge prints them."""
    return [[at, len(data), hashlib.sha256(data).hexdigest()] for at, data in content]


def judge(python: str, *arguments: str, given: bytes = b"") -> bytes:
    """Run the judge."""
    done = subprocess.run([python, JUDGE, *arguments], input=given, capture_output=True)
    if done.returncode:
        raise SystemExit(f"pyaff4 failed on {arguments}:\n{done.stderr.decode()[-2000:]}")
    return done.stdout


def packed(content: list[tuple[int, bytes]]) -> bytes:
    """Ranges as the judge takes them."""
    return b"".join(struct.pack("<QQ", at, len(data)) + data for at, data in content)


def say(what: str, same: bool) -> bool:
    print(f"pyaff4 {what}: {'agree' if same else 'DIFFER'}")
    return same


def compare(python: str, folder: str) -> bool:
    """Both ways, in every form and compression that pyaff4 has."""
    from builders import aff4

    content, path = ranges(), os.path.join(folder, "volume.aff4")
    expected, same = digests(content), True
    for method in WRITES:
        judge(python, "write", path, method, given=packed(content))
        same &= say(f"wrote {method}", ours(path) == expected)
    for style, method in READS:
        with open(path, "wb") as out:
            out.write(aff4.aff4(*content, style=style, method=method))
        words = "pmem2" if style == "pmem2" else "standard"
        found = json.loads(judge(python, "read", path, words))
        same &= say(f"read {style} {method}", found == expected)
    return same


def main() -> int:
    python = install()
    if "--fixtures" in sys.argv[1:]:
        from tests.test_aff4 import FIXTURES, RANGES, fixture

        for method in FIXTURES:
            judge(python, "write", fixture(method), method, given=packed(list(RANGES)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return 0 if compare(python, folder) else 1


if __name__ == "__main__":
    sys.exit(main())
