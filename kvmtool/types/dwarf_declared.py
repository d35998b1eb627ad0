"""A structure that one unit declares and another defines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.types.ctype import Compound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmtool.types.ctype import CType, Field


class DeclaredCompound(Compound):
    """ "struct proc;" in one unit: the definition is looked for elsewhere when it is needed."""

    __slots__ = ("_define", "_found")

    def __init__(self, kind: str, tag: str | None, define: Callable[[], CType | None]) -> None:
        super().__init__(kind, tag, None)
        self._define = define
        self._found: Compound | None = None

    def _definition(self) -> Compound:
        if self._found is None:
            found = self._define()
            if not isinstance(found, Compound) or isinstance(found, DeclaredCompound):
                found = Compound(self.kind, self.tag, None)
            self._found = found
        return self._found

    @property
    def size(self) -> int | None:
        """The definition's; None where there is none. Raises what the reader raises."""
        return self._definition().size

    @property
    def fields(self) -> Sequence[Field]:
        """The definition's members."""
        return self._definition().fields

    @property
    def complete(self) -> bool:
        """Whether there is a definition."""
        return self._definition().complete
