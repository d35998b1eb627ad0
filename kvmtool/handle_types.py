"""What a handle has of a kernel's types: which fit it, objects and expressions on them."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import TYPE_CHECKING

from kvmtool.errors import (
    KvmWarning,
    MismatchError,
    NotFoundError,
    UnsupportedError,
)
from kvmtool.handle_memory import MemoryHandle

if TYPE_CHECKING:
    from kvmtool.object import Object
    from kvmtool.scope import Scope
    from kvmtool.target import Target
    from kvmtool.type_files import Found
    from kvmtool.types.layouts import Choice
    from kvmtool.types.model import TypeTable
    from kvmtool.xnu.layout_check import Verdict


class TypedHandle(MemoryHandle):
    """A kernel's types over its memory."""

    @cached_property
    def exact_types(self) -> Found | None:
        """This very kernel's types: from the file the user named, else wherever they were found.

        Raises what `type_files.open_types` raises for the file the user named.
        """
        from kvmtool.macho import arch_name
        from kvmtool.type_files import KernelIdentity, find_types, open_types

        image, file = self.kernel, self._parts.file
        said = (image.uuid if image else None, self.boot.uuid if self.boot else None)
        kernel = KernelIdentity(
            arch_name(image.cputype, image.cpusubtype) if image else self.arch.name,
            self.arch.byteorder,
            self.arch.pointer_size,
            next((uuid for uuid in said if uuid), None),
            self.version,
        )
        if self.types_file is not None:
            found: Found | None = open_types(self.types_file, kernel, self.force)
        else:
            path = file.path if file else None
            found = find_types(image, path, kernel, self.kernel_path)
        if found is not None:
            self._held = found.held
        return found

    @cached_property
    def layouts(self) -> list[Choice]:
        """The types that may fit this kernel, the likeliest first, and why these.

        Exact ones come first. Raises `NotFoundError` when there are none, and the database has
        none for this kernel's machine.
        """
        from kvmtool.type_choice import choices

        named = self.types_file is not None
        exact = self.exact_types if self.layout_name is None or named else None
        return choices(self.arch, self.version, self.layout_name, exact, named)

    @property
    def type_choice(self) -> Choice:
        """The types that are used, and in one sentence which these are and why.

        Of a dump those that fit its memory. Raises as `layouts`, and `MismatchError` when none of
        them fits.
        """
        return self.layouts[0] if self.dump is None else self._fitting()[0]

    @property
    def types(self) -> TypeTable:
        """The kernel's types: exact ones where they were found, else the built-in layout.

        Raises as `type_choice`.
        """
        return self.type_choice.table

    @cached_property
    def tried(self) -> list[tuple[Choice, Target, Verdict]]:
        """The layouts held against the kernel's memory, until one fits: it is the last."""
        from kvmtool.target import Target
        from kvmtool.xnu.layout_check import check

        address = self.boot.kernel_address if self.boot else 0
        bits = self.facts.va_bits if self.facts else None
        tried = []
        for choice in self.layouts:
            target = Target(self.arch, self.memory, self.symbols, choice.table, bits, address)
            tried.append((choice, target, check(target)))
            if tried[-1][2].fits is not False:
                break
        return tried

    def _need_memory(self) -> None:
        if self.dump is None:
            raise UnsupportedError(
                f"{self.kernel.source.name if self.kernel else 'the kernel'} is a kernel file, "
                "its memory is not in it: name a core with -M"
            )
        if not len(self.symbols) and self.symbols.hint:
            raise NotFoundError("symbol", "_allproc", hint=self.symbols.hint)

    def verified_target(self) -> Target:
        """The kernel with types that fit it.

        Raises `MismatchError` when they do not; warns when the memory that would tell is missing.
        """
        self._need_memory()
        return self._fitting()[1]

    def _fitting(self) -> tuple[Choice, Target]:
        """The types that fit; raises and warns as `verified_target`."""
        choice, target, verdict = self.tried[-1]
        if verdict.fits is False:
            reasons = "; ".join(f"{choice.how}: {verdict.why}" for choice, _, verdict in self.tried)
            raise MismatchError(
                f"no structure layout fits this kernel ({self.version or 'no banner'}): {reasons}"
            )
        if not self._told:
            self._told = True
            if verdict.fits is None:
                text = f"layout {choice.table.name} is not verified: {verdict.why}"
                warnings.warn(text, KvmWarning, stacklevel=3)
            exact = self.exact_types if len(self.tried) > 1 else None
            if exact is not None and not choice.how.startswith(exact.how):
                text = f"{exact.how}, do not fit: {self.tried[0][2].why}; {choice.how}"
                warnings.warn(text, KvmWarning, stacklevel=3)
        return choice, target

    @cached_property
    def scope(self) -> Scope:
        """The kernel's variables and types as an expression sees them."""
        from kvmtool.scope import Scope

        return Scope(self)

    def __getitem__(self, name: str) -> Object:
        """The kernel's variable or function `name`, or `kext:symbol`: a reference, nothing is read.

        Of one whose type is not known only the address is: cast it. Raises `NotFoundError` with
        near misses.
        """
        return self.scope.variable(name)

    def __contains__(self, name: str) -> bool:
        return self.nlist([name]) != [None]

    def evaluate(self, expression: str) -> Object:
        """What the C expression means: "cdevsw[11].d_read". Raises as `kvmtool.evaluate` says."""
        from kvmtool.evaluate import evaluate

        return evaluate(expression, self.scope)

    def nearest_target(self) -> Target:
        """The kernel with the types likeliest to fit, held against nothing.

        For structures that hardly ever changed and whose readers check what they find. Raises as
        `verified_target`, but for the mismatch.
        """
        self._need_memory()
        fitting = [target for _, target, verdict in self.tried if verdict.fits is not False]
        return fitting[0] if fitting else self.tried[0][1]

    def built_target(self) -> Target:
        """As `nearest_target`; of a kernel's file what was built into it, before it ever ran.

        For tables the linker made. Raises as `nearest_target`, but for a file alone.
        """
        from kvmtool.target import Target

        if self.dump is not None or self.kernel is None:
            return self.nearest_target()
        text = self.kernel.segment("__TEXT")
        address = text.vmaddr if text is not None else 0
        return Target(
            self.arch, self.memory, self.symbols, lambda: self.types, kernel_address=address
        )
