"""Types out of DWARF, held against llvm-dwarfdump, pyelftools and clang's own record layouts."""

from __future__ import annotations

import pytest

from kvmtool.macho import MachO
from kvmtool.source import FileSource
from kvmtool.types.dwarf import DwarfTypes, open_dwarf
from kvmtool.types.model import TypeTable
from tests import inputs

PPC = "objects/ppc-xnu-792.25.20-kern_proc.o"
X86_64 = "objects/x86_64-xnu-2422.115.4-kern_proc.o"


def opened(path: str) -> DwarfTypes:
    found = open_dwarf(MachO(FileSource(path)))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "struct", "size"),
    [
        # data/README.md, which has them from the research's own readers
        (PPC, "proc", 0x1F4),
        (PPC, "pgrp", 0x18),
        (PPC, "session", 0x114),
        (X86_64, "proc", 0x4A8),
    ],
)
def test_sizes_of_real_structures(name: str, struct: str, size: int) -> None:
    types = opened(inputs.real(name))
    assert TypeTable(types).size(struct) == size
    assert struct in types.names("tag")


def test_a_file_without_dwarf_has_no_types() -> None:
    image = MachO(FileSource(inputs.real("kexts/i386-KernelMemoryAccess")))
    if any(section.sectname == "__debug_info" for section in image.sections):
        pytest.skip("it has DWARF")
    assert open_dwarf(image) is None
