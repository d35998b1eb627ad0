"""Where the kernel lies in a dump: every way there, what verifies it, and what is refused."""

from __future__ import annotations

import struct
import uuid as uuids

import pytest

from kvmtool import kvm
from kvmtool.arch import arch_for
from kvmtool.boot import Boot, Finder, banner_of
from kvmtool.errors import FaultError, MismatchError, NotFoundError
from kvmtool.formats.macho_core import MachOCore
from kvmtool.image import image_memory
from kvmtool.macho import MachO, uuid_text
from kvmtool.source import BytesSource
from kvmtool.symbols import SymbolTable
from kvmtool.types import layouts
from tests import inputs
from tests.builders import macho as build_macho
from tests.builders import xnu

MAVERICKS = "machine/x86_64-xnu-2422.115.4.mach_kernel"


def kernel_of(dump):
    return inputs.real(f"dumps/{dump}/mach_kernel")


# the dumps


WAYS = {
    "i386-10.5.8": "the kernel lies at its link address",
    "x86_64-10.8.5": "scan for the kernel's header, found at 0xffffff8003400000",
    "x86_64-10.13.6": 'LC_NOTE "main bin spec"',
}


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_the_slide_of_each_dump(dump):
    truth = inputs.truth(dump)
    with kvm.open(kernel_of(dump), inputs.plain_core(dump)) as handle:
        boot = handle.boot
        assert boot.slide == handle.kerndisp == truth["slide"]
        assert boot.how == WAYS[dump]
        assert uuid_text(boot.uuid) == truth["uuid"]
        assert boot.version == handle.version == truth["banner"]
        text = handle.kernel.segment("__TEXT").vmaddr
        assert boot.kernel_address == text + truth["slide"]
        assert handle.address("_cdevsw") == truth["cdevsw"]["address"]
        slid_in_vain = [f"the kernel lies at its link address ({text:#x})"]
        expected = slid_in_vain if dump == "x86_64-10.8.5" else []
        assert [text.partition(": found ")[0] for text in boot.rejected] == expected


def test_the_slide_of_the_core_that_xnu_wrote():
    core = inputs.real("machine/crash.kdp-core")
    oracle = inputs.oracle("crash")
    with kvm.open(inputs.real(MAVERICKS), core) as handle:
        assert handle.boot.slide == int(oracle["slide"], 16) == 0
        assert uuid_text(handle.boot.uuid) == oracle["strings"]["_kernel_uuid_string"]
        assert handle.boot.version == oracle["strings"]["_version"].rstrip()


def test_the_slide_of_the_corefile_that_xnu_wrote():
    kernel = inputs.real("machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel")
    oracle = inputs.oracle("armc")["symbols"]
    with kvm.open(kernel, inputs.real("machine/armc.corefile")) as handle:
        assert handle.boot.slide == 0
        assert handle.boot.version == oracle["_version"]["value"]
        assert uuid_text(handle.boot.uuid) == oracle["_kernel_uuid_string"]["value"]


# a slide that the user gives


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_a_given_slide_is_taken_as_said(dump):
    truth = inputs.truth(dump)
    for slide, version in ((truth["slide"], truth["banner"]), (truth["slide"] + 0x1000, None)):
        with kvm.open(kernel_of(dump), inputs.plain_core(dump), slide=slide) as handle:
            assert handle.boot.how == "given with --slide"
            assert handle.boot.slide == slide
            assert handle.boot.version == version
            assert handle.address("_cdevsw") - slide == truth["cdevsw"]["address"] - truth["slide"]


def test_a_slide_needs_a_kernel_file():
    with pytest.raises(NotFoundError, match="--slide needs a kernel file: name one with -N"):
        kvm.open(None, inputs.real("machine/crash.kdp-core"), slide=0)


# kernel and dump that do not belong together


@pytest.mark.parametrize(
    ("dump", "kernel"),
    [
        ("x86_64-10.8.5", "dumps/x86_64-10.13.6/mach_kernel"),  # by the banner in memory
        ("x86_64-10.13.6", "dumps/x86_64-10.8.5/mach_kernel"),  # by the UUID in the notes
        ("x86_64-10.13.6", MAVERICKS),
    ],
)
def test_another_kernel_is_refused_and_both_are_named(dump, kernel):
    truth, path, core = inputs.truth(dump), inputs.real(kernel), inputs.plain_core(dump)
    with pytest.raises(MismatchError) as caught:
        kvm.open(path, core)
    message = str(caught.value)
    for part in (path, core, truth["uuid"], truth["banner"], "--force"):
        assert part in message
    with kvm.open(path) as other:
        assert uuid_text(other.kernel.uuid) in message
        assert other.version in message
    assert "\n" not in message


def test_another_machines_kernel_is_refused_and_both_are_named():
    path, core = inputs.real(MAVERICKS), inputs.plain_core("i386-10.5.8")
    with pytest.raises(MismatchError) as caught:
        kvm.open(path, core)
    assert f"{path} is a kernel for x86_64, {core} a dump of i386" in str(caught.value)


@pytest.mark.parametrize("dump", ["x86_64-10.8.5", "x86_64-10.13.6"])
def test_force_goes_on_all_the_same(dump):
    truth = inputs.truth(dump)
    with kvm.open(inputs.real(MAVERICKS), inputs.plain_core(dump), force=True) as handle:
        assert handle.boot.kernel_address == truth["symbols"]["_mh_execute_header"]
        assert handle.boot.how.endswith("unverified (--force)")
        assert uuid_text(handle.boot.uuid) == truth["uuid"]
        assert handle.address("_version") != truth["symbols"]["version"]


# without a kernel's file


def test_a_core_that_holds_its_kernel_needs_no_file():
    core = inputs.real("machine/crash.kdp-core")
    oracle = inputs.oracle("crash")
    with kvm.open(None, core) as handle:
        assert handle.boot.slide == 0
        assert handle.boot.how.startswith("scan for the kernel's header")
        assert handle.version == oracle["strings"]["_version"].rstrip()
        for name, entry in oracle["symbols"].items():
            assert handle.address(name) == int(entry["addr"], 16)


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_a_core_that_does_not_says_what_to_do(dump):
    truth = inputs.truth(dump)
    core = inputs.plain_core(dump)
    with kvm.open(None, core) as handle:
        assert uuid_text(handle.boot.uuid) == truth["uuid"]
        assert handle.boot.kernel_address == truth["symbols"]["_mh_execute_header"]
        with pytest.raises(NotFoundError, match=f"kernel {truth['uuid']}.*with -N") as caught:
            handle.address("_version")
        assert core in str(caught.value)
        if truth["formats"]["core.macho"]["notes"] != "none":
            assert truth["banner"] in str(caught.value)
        address = truth["symbols"]["version"]
        assert handle.read(address, 21) == b"Darwin Kernel Version"  # no name, and yet memory


# built cores: every way, one at a time

UUID = bytes(range(1, 17))
RELEASES = {
    "10.4.11 i386": "792.25.20",
    "10.6.8 x86_64": "1504.15.3",
    "10.9.5 x86_64": "2422.115.4",
    "14.6 x86_64": "10063.141.1",
    "13.5 arm64": "8796.141.3",
}
SLIDE = 0x4000000


def banner(name):
    config = f"RELEASE_{name.rpartition(' ')[2].upper()}"
    return f"Darwin Kernel Version 1.2.3: today; root:xnu-{RELEASES[name]}~1/{config}"


def crash(name="10.9.5 x86_64", slide=SLIDE, uuid=UUID, alias=False, **shape):
    """A built crash, by default slid and with nothing in it that says so."""
    arch = name.rpartition(" ")[2]
    return xnu.build(
        layouts.table(name),
        arch,
        [],
        banner=banner(name),
        slide=slide,
        uuid=uuid,
        low_globals_alias=alias,
        core=xnu.CoreShape(**shape),
    )


def find(built, *, core=None, kernel=None, force=False):
    """What a Finder says of a built crash; `kernel` False for none."""
    image = None if kernel is False else MachO(BytesSource(kernel or built.kernel, "the kernel"))
    dump = MachOCore(BytesSource(core or built.core, "the core"))
    arch = arch_for(dump.facts.cputype, dump.facts.cpusubtype)
    return Finder(dump.virtual(), dump.facts, arch, "the core", image).find(force)


def assert_found(boot, built, how):
    assert boot.kernel_address == built.address("__mh_execute_header")
    assert boot.slide == built.slide
    assert how in boot.how
    assert boot.version == built.truth["banner"]


@pytest.mark.parametrize("name", RELEASES)
def test_by_the_link_address(name):
    built = crash(name, slide=0)
    boot = find(built)
    assert_found(boot, built, "the kernel lies at its link address")
    assert boot.uuid == UUID
    assert boot.rejected == ()


@pytest.mark.parametrize("name", ["10.9.5 x86_64", "14.6 x86_64", "13.5 arm64"])
def test_by_the_header_in_memory(name):
    built = crash(name)
    boot = find(built)
    assert_found(boot, built, "scan for the kernel's header, found at 0x")
    assert boot.uuid == UUID
    (rejected,) = boot.rejected
    assert "no UUID, no banner" in rejected


@pytest.mark.parametrize("name", ["10.9.5 x86_64", "13.5 arm64"])
@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ({"notes": ("main bin spec",)}, 'LC_NOTE "main bin spec"'),
        ({"notes": ("main bin spec v2",)}, 'LC_NOTE "main bin spec"'),
        ({"notes": ("kern ver str",)}, 'LC_NOTE "kern ver str"'),
        ({"ident": True}, "LC_IDENT"),
        ({"notes": ("main bin spec", "kern ver str", "addrable bits")}, 'LC_NOTE "main bin spec"'),
    ],
)
@pytest.mark.parametrize("header", [True, False])
def test_by_what_the_core_says(name, shape, how, header):
    built = crash(name, header=header, **shape)
    boot = find(built)
    assert_found(boot, built, how)
    assert boot.rejected == ()
    assert boot.uuid == (UUID if header else None)  # read from memory, not taken from the note


def test_by_a_slide_in_the_note():
    built = crash(header=False)
    core = build_macho.MachO("x86_64", build_macho.MH_CORE)
    for address, data in built.runs():
        core.segment("", address, data)
    unknown = (1 << 64) - 1
    note = struct.pack("<2I2Q16s2I", 2, 1, unknown, SLIDE, UUID, 12, 0)
    core.note("main bin spec", note)
    assert_found(find(built, core=core.build()), built, 'LC_NOTE "main bin spec"')


@pytest.mark.parametrize("name", ["10.9.5 x86_64", "14.6 x86_64", "13.5 arm64"])
def test_by_the_low_globals(name):
    built = crash(name, header=False, alias=True)
    boot = find(built)
    assert_found(boot, built, "lgStext of the low globals page at 0xff")
    assert boot.uuid is None


@pytest.mark.parametrize("name", ["10.9.5 x86_64", "13.5 arm64"])
def test_when_nothing_leads_there(name):
    built = crash(name, header=False)
    with pytest.raises(MismatchError) as caught:
        find(built)
    for part in ("the kernel (01020304-0506-", "the core (no UUID", banner(name), "--slide"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["10.6.8 x86_64", "13.5 arm64"])
def test_without_a_file_the_header_is_found_and_the_slide_is_unknown(name):
    built = crash(name, notes=("kern ver str",))
    boot = find(built, kernel=False)
    assert boot.kernel_address == built.address("__mh_execute_header")
    assert boot.slide is None  # never a silent 0
    assert boot.uuid == UUID
    assert boot.version == banner(name)


def test_without_a_file_and_without_a_header():
    with pytest.raises(NotFoundError, match=r"kernel in the core not found; .* with -N"):
        find(crash(header=False), kernel=False)


def test_the_header_of_a_kext_or_program_is_not_the_kernels():
    built = crash(slide=0, header=False)
    for filetype in (build_macho.MH_EXECUTE, build_macho.MH_KEXT_BUNDLE):
        other = build_macho.MachO("x86_64", filetype)
        other.segment("__TEXT", 0xFFFFFF7F80000000, filesize=0, fileoff=1)
        core = build_macho.MachO("x86_64", build_macho.MH_CORE)
        core.segment("", 0xFFFFFF7F80000000, other.head().ljust(4096, b"\0"))
        for address, data in built.runs():
            if address != built.address("__mh_execute_header") // 4096 * 4096:
                core.segment("", address, data)
        with pytest.raises(NotFoundError):
            find(built, core=core.build(), kernel=False)


# verification


def test_a_false_note_is_rejected_and_the_search_goes_on():
    built = crash(slide=0)
    core = build_macho.MachO("x86_64", build_macho.MH_CORE)
    for address, data in built.runs():
        core.segment("", address, data)
    core.note("main bin spec", struct.pack("<2IQ16s2I", 1, 1, 0xFFFFFF8077700000, UUID, 12, 0))
    boot = find(built, core=core.build())
    assert_found(boot, built, "the kernel lies at its link address")
    (rejected,) = boot.rejected
    assert rejected.startswith('LC_NOTE "main bin spec" (0xffffff8077700000): found no UUID')


@pytest.mark.parametrize("shape", [{}, {"notes": ("main bin spec",)}, {"ident": True}])
def test_another_uuid_is_another_kernel_even_with_the_same_banner(shape):
    built = crash(slide=0, **shape)
    other = crash(slide=0, uuid=bytes(reversed(UUID)))
    assert other.truth["banner"] == built.truth["banner"]
    with pytest.raises(MismatchError) as caught:
        find(built, kernel=other.kernel)
    for raw in (UUID, bytes(reversed(UUID))):
        assert str(uuids.UUID(bytes=raw)).upper() in str(caught.value)
    boot = find(built, kernel=other.kernel, force=True)
    assert boot.kernel_address == built.address("__mh_execute_header")
    assert boot.how.endswith("unverified (--force)")


def test_another_banner_is_another_kernel_even_without_uuids():
    built = crash(slide=0, uuid=None)
    assert find(built).uuid is None
    place = built.address("_version")
    with built.patched(place + 22, b"9"):
        core = built.dump()
    with pytest.raises(MismatchError, match="Darwin Kernel Version 9"):
        find(built, core=core)


def test_the_uuid_will_do_where_the_banner_is_not_in_the_dump():
    built = crash()
    core = built.dump(without=[built.address("_version")])
    boot = find(built, core=core)
    assert boot.slide == SLIDE
    assert "by its UUID, the banner in memory cannot be read" in boot.how
    assert boot.version == built.truth["banner"]  # the file's


def test_neither_uuid_nor_banner_is_no_proof():
    built = crash(uuid=None)
    with pytest.raises(MismatchError):
        find(built, core=built.dump(without=[built.address("_version")]))


# banners


def test_a_banner_is_read_from_the_file_and_from_memory():
    built = crash()
    image = MachO(BytesSource(built.kernel, "kernel"))
    assert banner_of(image_memory(image), SymbolTable(image.symtab, 0)) == built.truth["banner"]
    memory = MachOCore(BytesSource(built.core, "core")).virtual()
    assert banner_of(memory, SymbolTable(image.symtab, SLIDE)) == built.truth["banner"]
    assert banner_of(memory, SymbolTable(image.symtab, 0)) is None  # nothing lies there
    assert banner_of(memory, SymbolTable(image.symtab, SLIDE + 1)) is None  # no banner lies there
    assert banner_of(memory, SymbolTable(None, 0)) is None


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (None, "no UUID"),
        (bytes(range(16)), "00010203-0405-0607-0809-0A0B0C0D0E0F"),
        (bytes.fromhex("34589CF2A173550CB775018A2E5C205B"), "34589CF2-A173-550C-B775-018A2E5C205B"),
    ],
)
def test_uuids_are_printed_as_apple_does(raw, text):
    assert uuid_text(raw) == text
    assert raw is None or str(uuids.UUID(text)).upper() == text


# what a hostile core costs


def test_very_many_threads_are_not_all_searched_back_from(monkeypatch):
    monkeypatch.setattr("kvmtool.boot._PC_REACH", 1 << 20)
    looked_at = []
    monkeypatch.setattr(Finder, "_kernel_header", lambda _, address: looked_at.append(address))
    core = build_macho.MachO("x86_64", build_macho.MH_CORE)
    core.segment("", 0xFFFFFF8000200000, bytes(4096))
    for number in range(2000):
        state = build_macho.thread_state("x86_64", rip=0xFFFFFF8010000123 + (number << 28))
        core.thread(state)
    with pytest.raises(NotFoundError):
        find(crash(), core=core.build(), kernel=False)
    pages = (1 << 20) // 4096
    assert looked_at[:pages] == [0xFFFFFF8010000000 - n * 4096 for n in range(pages)]
    assert len(looked_at) == 64 * pages


def test_a_header_that_lies_about_itself_is_passed_over():
    head = bytearray(build_macho.MachO("x86_64", build_macho.MH_EXECUTE).build()[:4096])
    core = build_macho.MachO("x86_64", build_macho.MH_CORE)
    for number in range(200):
        struct.pack_into("<II", head, 16, 0xFFFFFF, number << 24 | 0xFFFFFF)
        core.segment("", 0xFFFFFF8000000000 + number * 4096, bytes(head).ljust(4096, b"\xff"))
    with pytest.raises(NotFoundError):
        find(crash(), core=core.build(), kernel=False)


def test_a_candidate_outside_all_memory_is_only_rejected():
    built = crash(slide=0)
    core = build_macho.MachO("x86_64", build_macho.MH_CORE)
    for address, data in built.runs():
        core.segment("", address, data)
    core.ident(f"{built.truth['banner']}; stext=0xffffffffffffffff")
    boot = find(built, core=core.build())
    assert isinstance(boot, Boot)
    assert boot.slide == 0
    with pytest.raises(FaultError):
        MachOCore(BytesSource(built.core)).virtual().read((1 << 64) - 1, 1)
