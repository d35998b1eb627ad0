"""Page tables out of cores that hold only the kernel's address space: physmap.py, vtop and info."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from inputs import DUMPS, oracle, plain_core, real, truth

import kvmtool
from kvmtool.arch import arch_for
from kvmtool.errors import FaultError, NotFoundError
from kvmtool.macho import CPU_TYPE_POWERPC
from kvmtool.physmap import Linear, PhysicalPages, kernel_walker, linear_ranges, physical_address
from kvmtool.way_places import ARM64, X86_64
from tests.test_cli import run

if TYPE_CHECKING:
    from kvmtool.symbols import SymbolTable

KERNELS = {
    "armc": ("arm64-xnu-4903.221.2-bcm2837.mach_kernel", "armc.corefile", ARM64),
    "crash": ("x86_64-xnu-2422.115.4.mach_kernel", "crash.kdp-core", X86_64),
}
MODES = {"armc": "arm64 4K T1SZ 26", "crash": "4-level"}
LEVELS = {"armc": ["L1", "L2", "L3"], "crash": ["PML4", "PDPT", "PD", "PT"]}


def where(name: str, with_kernel: bool = True) -> list[str]:
    kernel, core, _ = KERNELS[name]
    found = ["-M", real(f"machine/{core}")]
    return [*found, "-N", real(f"machine/{kernel}")] if with_kernel else found


def opened(name: str) -> kvmtool.Kvm:
    kernel, core, _ = KERNELS[name]
    return kvmtool.open(real(f"machine/{kernel}"), real(f"machine/{core}"))


def root(name: str) -> int:
    """TTBR1; of the crash kernel_task's CR3 (the oracle's `cr3` is that of the process it ran)."""
    said = oracle(name)
    return int(said["ttbr1_cpu_ttep"] if name == "armc" else said["tasks"][0]["pm_cr3"], 16)


def pairs(name: str) -> list[tuple[int, int]]:
    """(address, physical address) of all that the oracle tells."""
    said = oracle(name)
    told = [(symbol["addr"], symbol["pa"]) for symbol in said["symbols"].values()]
    told += said.get("page_table_samples", {}).values()
    assert len(told) == {"armc": 38, "crash": 121}[name]
    return [(int(address, 16), int(physical, 16)) for address, physical in told]


@pytest.mark.parametrize("name", KERNELS)
def test_every_symbol_of_the_oracle(name: str) -> None:
    with opened(name) as kvm:
        tables = kernel_walker(kvm.arch, kvm.memory, kvm.symbols)
        assert tables is not None
        assert (tables.mode, tables.root) == (MODES[name], root(name))
        for address, physical in pairs(name):
            assert tables.lookup(address)[0] == physical


@pytest.mark.parametrize("name", KERNELS)
def test_all_of_the_core_is_mapped_and_arithmetic_agrees_with_the_tables(name: str) -> None:
    """The tables map each page a core was written from; where a rule gives a page, they do too."""
    with opened(name) as kvm:
        tables = kernel_walker(kvm.arch, kvm.memory, kvm.symbols)
        assert tables is not None
        linear = list(linear_ranges(KERNELS[name][2], kvm.memory, kvm.symbols))
        agreed = 0
        for region in kvm.memory.regions():
            for address in range(region.start, region.start + region.size, 4096):
                found = tables.lookup(address)[0]
                assert found is not None
                said = physical_address(linear, address)
                if said is not None:
                    assert found == said
                    agreed += 1
        assert agreed == {"armc": 16368, "crash": 4182}[name]


@pytest.mark.parametrize("with_kernel", [True, False], ids=["-N", "no -N"])
@pytest.mark.parametrize("name", KERNELS)
def test_vtop_and_info_of_a_core(name: str, with_kernel: bool) -> None:
    files = where(name, with_kernel)
    facts = json.loads(run("info", *files, "--format", "json").stdout)
    assert (facts["slide"]["page_tables"], facts["slide"]["root"]) == (MODES[name], hex(root(name)))
    for symbol in ("_nprocs", "_desiredvnodes", "_maxproc"):
        answer = json.loads(run("vtop", symbol, *files, "--format", "json").stdout)
        assert answer["physical"] == oracle(name)["symbols"][symbol]["pa"]
        assert (answer["mode"], answer["root"]) == (MODES[name], hex(root(name)))
        levels = [step["level"] for step in answer["steps"]]
        assert levels == LEVELS[name][: len(levels)]
        assert answer["steps"][0]["table"] == hex(root(name))


@pytest.mark.parametrize("dump", DUMPS)
def test_the_root_of_other_releases(dump: str) -> None:
    """10.5 with PAE, 10.8 and 10.13 slid: the same table as the dumps of physical memory have."""
    with kvmtool.open(real(f"dumps/{dump}/mach_kernel"), plain_core(dump)) as kvm:
        tables = kernel_walker(kvm.arch, kvm.memory, kvm.symbols)
        assert tables is not None
        assert tables.root == truth(dump)["memory"]["kernel_page_table_root"]
        assert tables.mode == truth(dump)["memory"]["paging"]


class Hidden:
    """A kernel's symbols without some of them."""

    hint = ""

    def __init__(self, symbols: SymbolTable, *names: str) -> None:
        self.symbols, self.names = symbols, names

    def __len__(self) -> int:
        return len(self.symbols)

    def get(self, name: str):
        return None if name in self.names else self.symbols.get(name)


@pytest.mark.parametrize(
    ("name", "gone", "told"),
    [
        ("armc", ("_cpu_ttep", "_kernel_pmap_store"), "no symbol names one"),
        ("armc", ("_gVirtBase", "_ptov_table", "_cpu_tte"), "_gVirtBase, _gPhysBase, _gPhysSize"),
        ("crash", ("_IdlePML4", "_kernel_pmap_store"), "no symbol names one"),
        ("crash", ("_first_avail", "_avail_start", "_physmap_base"), "_first_avail or _avail"),
    ],
)
def test_a_missing_piece_is_named(name: str, gone: tuple[str, ...], told: str) -> None:
    with opened(name) as kvm, pytest.raises(NotFoundError, match=told):
        kernel_walker(kvm.arch, kvm.memory, Hidden(kvm.symbols, *gone))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("armc", ("_ptov_table",)),  # the root's page by _cpu_tte, but not the next level's
        ("crash", ("_kernel_pmap", "_kernel_pmap_store", "_version", "_lowGlo")),
    ],
)
def test_what_cannot_be_verified_is_no_answer(name: str, gone: tuple[str, ...]) -> None:
    with opened(name) as kvm, pytest.raises(NotFoundError, match=r"expected at|to verify it by"):
        kernel_walker(kvm.arch, kvm.memory, Hidden(kvm.symbols, *gone))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["_cpu_ttep", "_kernel_pmap_store"])
def test_one_way_to_the_root_is_enough(name: str) -> None:
    with opened("armc") as kvm:
        tables = kernel_walker(kvm.arch, kvm.memory, Hidden(kvm.symbols, name))  # type: ignore[arg-type]
        assert tables is not None
        assert tables.root == root("armc")


def test_physical_pages_hold_nothing_else() -> None:
    with opened("crash") as kvm:
        start = 0xFFFFFF8000200000
        pages = PhysicalPages(kvm.memory, [Linear(start, 0x3000, 0x200000, "test")])
        assert [(r.start, r.size) for r in pages.regions()] == [(0x200000, 0x3000)]
        assert pages.read(0x201000, 64) == kvm.memory.read(start + 0x1000, 64)
        assert next(pages.find(b"\xcf\xfa\xed\xfe")) == 0x200000
        with pytest.raises(FaultError, match="physical address 0x203000 is absent"):
            pages.read(0x202FF8, 16)


def test_no_tables_of_powerpc_are_known() -> None:
    with opened("crash") as kvm:
        assert kernel_walker(arch_for(CPU_TYPE_POWERPC), kvm.memory, kvm.symbols) is None


def test_one_line_where_there_are_no_tables() -> None:
    files = where("crash")
    result = run("vtop", "_version", *files[2:], status=1)
    assert "a kernel's file alone has no page tables" in result.stderr
    assert result.stderr.count("\n") == 1
