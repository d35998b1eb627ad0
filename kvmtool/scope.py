"""A kernel's names as an expression sees them: variables with their types, names of types."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from kvmtool.errors import MismatchError, NotFoundError
from kvmtool.object import Object, Untyped
from kvmtool.target import Target

if TYPE_CHECKING:
    from kvmtool.handle_types import TypedHandle
    from kvmtool.types.model import TypeTable


class Scope:
    """The variables, functions and types of `kvm`; types are looked for when they are needed."""

    def __init__(self, kvm: TypedHandle) -> None:
        self._kvm = kvm
        self._why = ""

    @cached_property
    def target(self) -> Target:
        """What objects are read through. Its types are those that fit the kernel.

        There are none where none are known or fit. Asking for them raises what `Kvm.types` raises
        for types or a layout that the user named.
        """
        kvm = self._kvm
        text = kvm.kernel.segment("__TEXT") if kvm.kernel is not None else None
        linked = text.vmaddr if text is not None else 0
        address = kvm.boot.kernel_address if kvm.boot is not None else linked
        bits = kvm.facts.va_bits if kvm.facts is not None else None
        return Target(kvm.arch, kvm.memory, kvm.symbols, self._types, bits, address)

    def _types(self) -> TypeTable:
        kvm = self._kvm
        try:
            return kvm.types
        except (NotFoundError, MismatchError) as error:
            if kvm.types_file is not None or kvm.layout_name is not None:
                raise
            from kvmtool.types.fixed import FixedTypes
            from kvmtool.types.model import TypeTable

            self._why = str(error)
            return TypeTable(FixedTypes(kvm.arch.pointer_size))

    def variable(self, name: str) -> Object:
        """The variable or function `name`, or `kext:symbol`. Raises `NotFoundError`."""
        address = self._kvm.address(name)
        types = self.target.types
        ctype = types.variable(name) if ":" not in name else None
        why = self._why or f"the types of {types.name} do not tell"
        return Object(self.target, ctype or Untyped(name, why), address)

    def is_type(self, name: str) -> bool:
        """Whether `name` alone means a type: a typedef, or a tag that is no variable's name too."""
        source = self.target.types.source
        if source.find("typedef", name) is not None or source.find("base", name) is not None:
            return True
        return source.find("tag", name) is not None and self._kvm.nlist([name]) == [None]
