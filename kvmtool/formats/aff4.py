"""AFF4 volumes, as pmem writes them: recognised, and refused with what to do instead.

The library for them, pyaff4 0.34, pins rdflib 4.2.2 and PyYAML 5.4 and did not install on Python
3.11; a reader of our own was never held against its output, so there is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.errors import UnsupportedError

if TYPE_CHECKING:
    from kvmtool.source import Source

_ZIP = b"PK\x03\x04"
# Members of a volume by the AFF4 standard 1.0: its URN, its metadata, and streams by their URNs
_MEMBERS = (b"container.description", b"information.turtle", b"aff4:", b"aff4%3A")


class Aff4:
    """A zip file that is an AFF4 volume."""

    name = "aff4"
    live = False

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`."""
        return head.startswith(_ZIP) and any(member in head for member in _MEMBERS)

    def __init__(self, source: Source) -> None:
        """Raises `UnsupportedError`, always."""
        raise UnsupportedError(
            f"{source.name}: is an AFF4 volume, which kvmtool cannot read: export the memory in it "
            "as raw or ELF with the tool that wrote it"
        )
