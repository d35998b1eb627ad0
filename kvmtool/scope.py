"""A kernel's names as an expression sees them: variables with their types, names of types."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from kvmtool.errors import MismatchError, NotFoundError
from kvmtool.object import Object, Untyped
from kvmtool.target import Target

if TYPE_CHECKING:
    from kvmtool.handle import Kvm


class Scope:
    """The variables, functions and types of `kvm`; types are looked for when they are needed."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self._why = ""

    @cached_property
    def target(self) -> Target:
        """The kernel with its types, those that fit; with none where none are known or fit.

        Raises what `Kvm.types` raises for a file of types that the user named.
        """
        from kvmtool.types.fixed import FixedTypes
        from kvmtool.types.model import TypeTable

        kvm = self.kvm
        try:
            types = kvm.types
        except (NotFoundError, MismatchError) as error:
            if kvm.types_file is not None or kvm.layout_name is not None:
                raise
            self._why = str(error)
            types = TypeTable(FixedTypes(kvm.arch.pointer_size))
        facts, text = kvm.facts, kvm.kernel.segment("__TEXT") if kvm.kernel else None
        linked = text.vmaddr if text is not None else 0
        address = kvm.boot.kernel_address if kvm.boot else linked
        bits = facts.va_bits if facts else None
        return Target(kvm.arch, kvm.memory, kvm.symbols, types, bits, address)

    def variable(self, name: str) -> Object:
        """The variable or function `name`, or `kext:symbol`. Raises `NotFoundError`."""
        address = self.kvm.address(name)
        target = self.target
        ctype = target.types.variable(name) if ":" not in name else None
        why = self._why or f"{target.types.name} do not tell"
        return Object(target, ctype or Untyped(name, why), address)
