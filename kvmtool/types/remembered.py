"""Types that were asked for once, kept in the user's cache.

Reading a file of types begins with work that has nothing to do with the one structure that is
wanted: JSON is parsed, CTF inflated. What was asked for is therefore kept in packed form, what lies
in it included; the file is read again only for what was never asked for. A damaged entry, or one of
another version, is as good as none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool import cache
from kvmtool.errors import FormatError, KvmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmtool.types.ctype import CType
    from kvmtool.types.model import TypeSource
    from kvmtool.types.packed import Identity, PackedTypes

KIND = "types-1"  # of cache entries; another number when a reader gives other types
_MOST = 4096  # names in one entry
_LARGEST = 8 << 20  # bytes of one entry


class Remembered:
    """A `TypeSource` that asks `original` for what the entry `key` does not know.

    `close` stores what was new. `original` is called once, and not before it is needed.
    """

    def __init__(
        self,
        key: str,
        identity: Identity,
        original: Callable[[], TypeSource],
        known: PackedTypes | None = None,
    ) -> None:
        """`known` is what `recall(key)` gave."""
        self.name, self.origin = identity.name, identity.origin
        self.byteorder, self.pointer_size = identity.byteorder, identity.pointer_size
        self._key, self._identity, self._known = key, identity, known
        self._open = original
        self._original: TypeSource | None = None
        self._new: dict[tuple[str, str], None] = {}
        if known is not None:
            known.behind = self._ask

    def __repr__(self) -> str:
        return f"<Remembered {self.origin}>"

    @property
    def original(self) -> TypeSource:
        """The source itself, read now if it was not yet. Raises what its reader raises."""
        if self._original is None:
            self._original = self._open()
        return self._original

    def find(self, kind: str, name: str) -> CType | None:
        """See `TypeSource.find`."""
        if self._known is not None and self._known.knows(kind, name):
            return self._known.find(kind, name)
        return self._ask(kind, name)

    def names(self, kind: str) -> Iterable[str]:
        """See `TypeSource.names`."""
        return self.original.names(kind)

    def variable(self, name: str) -> CType | None:
        """See `TypeSource.variable`."""
        return self.find("variable", name)

    def _ask(self, kind: str, name: str) -> CType | None:
        source = self.original
        found = source.variable(name) if kind == "variable" else source.find(kind, name)
        self._new[kind, name] = None
        return found

    def close(self) -> None:
        """Store what was asked for and not known yet, with what others stored meanwhile."""
        if not self._new:
            return
        new, self._new = [*self._new], {}
        latest = recall(self._key)
        if latest is not None:
            latest.behind = self._ask
            self._known = latest
        roots = dict.fromkeys([*(self._known.entries() if self._known else ()), *new])
        if len(roots) > _MOST:
            return
        from kvmtool.types.packer import pack

        try:
            content = pack(self, roots, self._identity)
        except KvmError:
            return  # it will be asked for again
        finally:
            self._new.clear()
        if len(content) <= _LARGEST:
            cache.store(KIND, self._key, content)


def recall(key: str) -> PackedTypes | None:
    """The entry `key`; None if there is none, or it is damaged."""
    content = cache.load(KIND, key)
    if content is None:
        return None
    from kvmtool.types.packed import PackedTypes

    try:
        return PackedTypes(content)
    except FormatError:
        return None
