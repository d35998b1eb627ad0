"""pyaff4 as a writer and a reader of AFF4 memory, run by the Python of `make peers`' virtualenv.

`write VOLUME METHOD` takes ranges from standard input, each `<QQ` (address, bytes) and its content;
`read VOLUME pmem2|standard` prints a JSON array of [address, bytes, SHA-256] for each range found.

pyaff4 0.34 is installed without what it pins. What of that has no wheel is stood in for: snappy
by cramjam's, and packages for encryption and deduplication, which are imported and not used, by
nothing.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import types
import warnings
from typing import Any

import cramjam

_HEADER = struct.Struct("<QQ")


def _stand_in(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    return module


_stand_in(
    "snappy",
    compress=lambda data: bytes(cramjam.snappy.compress_raw(data)),
    decompress=lambda data: bytes(cramjam.snappy.decompress_raw(data)),
)
_stand_in("CryptoPlus").Cipher = _stand_in("CryptoPlus.Cipher", python_AES=None)
_stand_in("fastchunking")
warnings.simplefilter("ignore")

from pyaff4 import aff4_map, data_store, lexicon, plugins, rdfvalue, version  # noqa: E402
from pyaff4 import zip as volumes  # noqa: E402

assert plugins  # it registers the types of streams
METHODS = {
    "zlib": lexicon.AFF4_IMAGE_COMPRESSION_ZLIB,
    "snappy": lexicon.AFF4_IMAGE_COMPRESSION_SNAPPY,
    "lz4": lexicon.AFF4_IMAGE_COMPRESSION_LZ4,
    "stored": lexicon.AFF4_IMAGE_COMPRESSION_STORED,
}


def write(path: str, method: str) -> None:
    """A volume with a map of the ranges on standard input."""
    urn = rdfvalue.URN.FromFileName(path)
    with data_store.MemoryDataStore() as resolver:
        mode = rdfvalue.XSDString("truncate")
        resolver.Set(lexicon.transient_graph, urn, lexicon.AFF4_STREAM_WRITE_MODE, mode)
        standard = version.Version(1, 0, "pyaff4")
        with volumes.ZipFile.NewZipFile(resolver, standard, urn) as volume:
            image = volume.urn.Append("PhysicalMemory")
            category = rdfvalue.URN(lexicon.AFF4_MEMORY_PHYSICAL)
            resolver.Set(volume.urn, image, lexicon.AFF4_CATEGORY, category)
            compression = rdfvalue.URN(METHODS[method])
            data = image.Append("data")
            resolver.Set(volume.urn, data, lexicon.AFF4_IMAGE_COMPRESSION, compression)
            with aff4_map.AFF4Map.NewAFF4Map(resolver, image, volume.urn) as memory:
                while head := sys.stdin.buffer.read(_HEADER.size):
                    address, size = _HEADER.unpack(head)
                    memory.SeekWrite(address)
                    memory.Write(sys.stdin.buffer.read(size))


def read(path: str, words: str) -> None:
    """What the first image of physical memory holds."""
    urn = rdfvalue.URN.FromFileName(path)
    known = {"pmem2": lexicon.scudette, "standard": lexicon.standard}[words]
    found = []
    with data_store.MemoryDataStore(known) as resolver:
        standard = version.Version(1, 0, "pyaff4")
        with volumes.ZipFile.NewZipFile(resolver, standard, urn) as volume:
            assert volume
            image = next(
                resolver.QueryPredicateObject(
                    volume.urn, lexicon.AFF4_CATEGORY, rdfvalue.URN(lexicon.AFF4_MEMORY_PHYSICAL)
                )
            )
            with resolver.AFF4FactoryOpen(image, version=standard) as memory:
                for run in memory.GetRanges():
                    memory.SeekRead(run.map_offset)
                    digest = hashlib.sha256(memory.Read(run.length)).hexdigest()
                    found.append([run.map_offset, run.length, digest])
    print(json.dumps(found))


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](*sys.argv[2:])
