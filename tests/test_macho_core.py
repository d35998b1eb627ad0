"""MH_CORE: the traps each writer left, what the records say of the kernel, and lying ones."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtool import formats, macho
from kvmtool.arch import arch_for
from kvmtool.errors import FaultError, FormatError, KvmError, TruncatedError, UnknownFormatError
from kvmtool.formats.macho_core import MachOCore, parse_version_string
from kvmtool.source import BytesSource, FileSource
from tests import inputs
from tests.builders import macho as build

TOP = 1 << 64
UNKNOWN = TOP - 1
UUID = bytes(range(1, 17))
UUID_TEXT = "01020304-0506-0708-090A-0B0C0D0E0F10"
BANNER = "Darwin Kernel Version 17.7.0: date; root:xnu-4570.71.2~1/RELEASE_X86_64"
PAGE = 0x1000


def core_of(file, **claims):
    return MachOCore(BytesSource(file.build(**claims), "core"))


def new_core(arch="x86_64"):
    return build.MachO(arch, build.MH_CORE)


def page(letter):
    return letter.encode() * PAGE


def fault(memory, address):
    with pytest.raises(FaultError) as caught:
        memory.read(address, 1)
    return caught.value.reason


# which files are cores


@pytest.mark.parametrize("arch", ["i386", "x86_64", "ppc", "ppc64", "arm", "arm64"])
def test_cores_are_known_by_their_bytes(arch):
    file = new_core(arch)
    file.segment("", 0x1000, page("a"))
    data = file.build()
    assert MachOCore.probe(data)
    assert formats.identify(BytesSource(data, "any name")).name == "macho-core"
    core = MachOCore(BytesSource(data))
    assert core.facts.cputype == build.MACHINES[arch].cputype
    assert core.virtual().read(0x1000, PAGE) == page("a")


@pytest.mark.parametrize("size", range(16))
def test_half_a_header_is_no_core(size):
    assert not MachOCore.probe(new_core().build()[:size])


@pytest.mark.parametrize(
    "filetype", [build.MH_OBJECT, build.MH_EXECUTE, build.MH_DSYM, build.MH_KEXT_BUNDLE]
)
def test_other_machos_are_no_cores(filetype):
    data = build.MachO("x86_64", filetype).build()
    assert not MachOCore.probe(data)
    with pytest.raises(UnknownFormatError, match="no known format begins with cf fa ed fe"):
        formats.identify(BytesSource(data, "file"))
    with pytest.raises(FormatError, match=f"filetype {filetype:#x}, expected 0x4") as caught:
        MachOCore(BytesSource(data, "file"))
    assert caught.value.offset == 12


@pytest.mark.parametrize("data", [b"\x7fELF" + bytes(60), bytes(64), b"text\n"])
def test_what_no_format_knows(data):
    with pytest.raises(UnknownFormatError) as caught:
        formats.identify(BytesSource(data, "file"))
    assert data[:4].hex(" ") in str(caught.value)
    assert all(entry.name in str(caught.value) for entry in formats.FORMATS)


def test_an_empty_file_says_so():
    with pytest.raises(UnknownFormatError, match="file: at offset 0x0: the file is empty"):
        formats.identify(BytesSource(b"", "file"))


def test_formats_have_names():
    for entry in formats.FORMATS:
        assert formats.by_name(entry.name) is entry
        assert formats.load(entry).name == entry.name
    with pytest.raises(UnknownFormatError, match=r"expected one of .*macho-core"):
        formats.by_name("minix")


# segments


def test_where_segments_overlap_the_first_in_the_file_wins():
    # kern_dump() of xnu-792..1504 writes the kernel's sections, then every region of kernel_map
    file = new_core("i386")
    file.segment("", 0x3000, page("k") + page("k"))
    file.segment("", 0x2000, page("r") * 4)
    memory = core_of(file).virtual()
    assert memory.read(0x2000, 4 * PAGE) == page("r") + page("k") * 2 + page("r")


def test_segments_need_not_be_sorted():
    # xnu-8796..11417 on arm64 write page tables in the order of a queue (kdp_core.c)
    file = new_core("arm64")
    order = [5, 0, 3, 1, 4]
    for number in order:
        file.segment("", 0x10000 + number * PAGE, page(str(number)), vmsize=PAGE)
    core = core_of(file)
    memory = core.virtual()
    assert memory.read(0x10000, 2 * PAGE) == page("0") + page("1")
    assert memory.read(0x13000, 3 * PAGE) == page("3") + page("4") + page("5")
    assert fault(memory, 0x12000) == "unmapped"
    assert [run.address for run in core.runs()] == [0x10000 + n * PAGE for n in order]


def test_runs_say_where_the_bytes_lie():
    file = new_core()
    file.segment("", 0x8000, page("a"))
    file.segment("", 0x4000, page("b"))
    core = core_of(file)
    for run, letter in zip(core.runs(), "ab", strict=True):
        assert (run.space, run.size) == ("virtual", PAGE)
        assert core.source.read_at(run.offset, run.size) == page(letter)


@pytest.mark.parametrize("arch", ["i386", "x86_64"])
@pytest.mark.parametrize("held", [0, 1, PAGE - 1])
def test_segments_may_end_past_the_end_of_the_file(arch, held):
    # regions tagged VM_MEMORY_IOKIT are seeked over: xnu-792, kdp_vm.c
    file = new_core(arch)
    file.segment("", 0x1000, page("a"))
    file.segment("", 0x4000, page("b"))
    data = file.build()
    core = MachOCore(BytesSource(data[: len(data) - PAGE + held], "core"))
    memory = core.virtual()
    assert memory.read(0x1000, PAGE) == page("a")
    assert memory.read(0x4000, held) == page("b")[:held]
    assert fault(memory, 0x4000 + held) == fault(memory, 0x4FFF) == "absent"
    assert fault(memory, 0x5000) == fault(memory, 0x3000) == "unmapped"
    assert core.warnings == [
        f"1 of 2 segments end past the end of the file: {PAGE - held:#x} bytes of memory are absent"
    ]


def test_a_segment_that_lies_wholly_past_the_end():
    file = new_core()
    file.segment("", 0x1000, page("a"))
    file.segment("", 0x8000, vmsize=PAGE, filesize=PAGE, fileoff=TOP - PAGE)
    core = core_of(file)
    assert fault(core.virtual(), 0x8000) == "absent"
    assert list(core.virtual().regions()) == [(0x1000, PAGE)]
    assert len(core.warnings) == 1


def test_a_segment_shorter_in_the_file_than_in_memory_is_absent_from_there_on():
    file = new_core()
    file.segment("", 0x1000, page("a"), vmsize=3 * PAGE)
    memory = core_of(file).virtual()
    assert memory.read(0x1000, PAGE) == page("a")
    assert fault(memory, 0x2000) == "absent"
    assert fault(memory, 0x4000) == "unmapped"


def test_a_segment_longer_in_the_file_than_in_memory_is_cut():
    file = new_core()
    file.segment("", 0x1000, page("a") * 2, vmsize=PAGE)
    core = core_of(file)
    assert fault(core.virtual(), 0x2000) == "unmapped"
    assert core.warnings == []


def test_the_last_page_of_all():
    file = new_core()
    file.segment("", TOP - PAGE, page("z"))
    memory = core_of(file).virtual()
    assert memory.read(TOP - PAGE, PAGE - 1) == page("z")[1:]
    assert fault(memory, TOP - 1) == "unmapped"  # no array holds the number 2^64
    file = new_core("i386")
    file.segment("", (1 << 32) - PAGE, page("z"))
    assert core_of(file).virtual().read((1 << 32) - PAGE, PAGE) == page("z")


@pytest.mark.parametrize("vmaddr", [TOP - 1, TOP - PAGE + 1])
def test_a_segment_that_leaves_the_address_space(vmaddr):
    file = new_core()
    file.segment("", vmaddr, page("z"))
    with pytest.raises(FormatError, match="leaves the address space"):
        core_of(file)


def test_empty_segments_are_nothing():
    file = new_core()
    file.segment("", 0x1000, page("a"))
    for address in (0x1000, 0x1800, 0x2000, 0x9000):
        file.segment("", address, vmsize=0, filesize=0, fileoff=0x1000)
    file.segment("", 0x2000, page("b"))
    core = core_of(file)
    assert core.virtual().read(0x1000, 2 * PAGE) == page("a") + page("b")
    assert list(core.virtual().regions()) == [(0x1000, 2 * PAGE)]


def test_file_offsets_of_32_bits_start_again_past_4_gib(tmp_path):
    # kdp_x86_common.c, xnu-2050: offsets are counted in 32 bits, the file goes on
    file = new_core("i386")
    places = [0x1000, 0xFFFFF000, 0x100000000, 0x100001000, 0x1FFFFF000, 0x200000000]
    for number, place in enumerate(places):
        offset = place & 0xFFFFFFFF
        file.segment("", 0x1000 * (number + 1), vmsize=PAGE, filesize=PAGE, fileoff=offset)
    path = tmp_path / "core"
    with path.open("wb") as out:
        out.write(file.build())
        for number, place in enumerate(places):
            out.seek(place)
            out.write(page(str(number)))
    source = FileSource(str(path))
    core = MachOCore(source)
    assert core.warnings == []
    assert [run.offset for run in core.runs()] == places
    assert core.virtual().read(0x1000, 0x6000) == b"".join(page(str(n)) for n in range(6))
    source.close()


def test_a_core_without_segments_has_no_memory():
    core = core_of(new_core())
    assert list(core.runs()) == []
    assert fault(core.virtual(), 0) == "unmapped"


def test_more_commands_claimed_than_written_is_only_a_warning():
    file = new_core("i386")
    file.segment("", 0x1000, page("a"))
    core = core_of(file, ncmds=4, sizeofcmds=file.head_size() - 28 + 4 * 68)
    assert core.virtual().read(0x1000, 1) == b"a"
    assert core.warnings == ["ncmds says 0x4, the load commands end after 0x1"]


# threads


def test_registers_wherever_the_thread_stands():
    # the last command in xnu-792..1699, the first in later ones
    for first in (True, False):
        file = new_core()
        state = build.thread_state("x86_64", rip=0xFFFFFF8000212345, rsp=0x1234, gs=7)
        if first:
            file.thread(state)
        file.segment("", 0x1000, page("a"))
        if not first:
            file.thread(state)
        (thread,) = core_of(file).facts.threads
        ((flavor, data),) = thread.states
        registers = arch_for(macho.CPU_TYPE_X86_64).registers(flavor, data)
        assert (registers["rip"], registers["rsp"], registers["gs"]) == (
            0xFFFFFF8000212345,
            0x1234,
            7,
        )
        assert registers["rax"] == 0


@pytest.mark.parametrize(
    ("arch", "counter", "stack"),
    [
        ("i386", "eip", "esp"),
        ("x86_64", "rip", "rsp"),
        ("arm64", "pc", "sp"),
        ("arm64e", "pc", "sp"),
        ("ppc", "srr0", "r1"),
    ],
)
def test_every_machine_knows_its_registers(arch, counter, stack):
    file = new_core(arch)
    file.thread(build.thread_state(arch, **{counter: 0x11223344, stack: 0x55667788}))
    core = core_of(file)
    machine = arch_for(core.facts.cputype, core.facts.cpusubtype)
    ((flavor, data),) = core.facts.threads[0].states
    registers = machine.registers(flavor, data)
    assert (machine.name, machine.pc, machine.sp) == (arch, counter, stack)
    assert registers[counter] == 0x11223344
    assert registers[stack] == 0x55667788
    assert machine.registers(flavor, data[:4]).keys() <= registers.keys()
    assert machine.registers(0x7777, data) == {}


def test_several_flavors_and_several_threads():
    file = new_core()
    file.thread(build.thread_state("x86_64", rip=1) + struct.pack("<II8x", 99, 2))
    file.thread(build.thread_state("x86_64", rip=2), unix=True)
    first, second = core_of(file).facts.threads
    assert [flavor for flavor, _ in first.states] == [4, 99]
    assert [len(data) for _, data in first.states] == [168, 8]
    assert [flavor for flavor, _ in second.states] == [4]


@pytest.mark.parametrize("count", [43, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_thread_state_larger_than_its_command(count):
    file = new_core()
    file.thread(struct.pack("<II", 4, count) + bytes(168))
    core = core_of(file)
    assert core.facts.threads == (((),),)
    assert core.warnings == [
        f"LC_THREAD at offset 0x20: flavor 0x4 has count {count:#x}, expected at most 0x2a"
    ]


# what the kernel is


def main_bin_spec(version, kind=1, address=UNKNOWN, slide=UNKNOWN, uuid=UUID):
    middle = struct.pack("<Q", slide) if version == 2 else b""
    return struct.pack("<IIQ", version, kind, address) + middle + uuid + struct.pack("<II", 12, 0)


def facts_of(*, ident=None, **notes):
    file = new_core()
    if ident is not None:
        file.ident(ident)
    for owner, payload in notes.items():
        file.note(owner.replace("_", " "), payload)
    return core_of(file).facts


def said(facts):
    return {name: getattr(facts, name) for name in facts.said}


def test_a_core_that_says_nothing():
    facts = facts_of()
    assert (facts.cputype, facts.cpusubtype) == (macho.CPU_TYPE_X86_64, 3)
    assert facts[2:7] == (None, None, None, None, None)
    assert facts.said == {}


STRINGS = [
    (BANNER, {"version": BANNER}),
    (f"{BANNER}; UUID={UUID_TEXT}", {"version": BANNER, "uuid": UUID}),
    (
        f"{BANNER}; UUID={UUID_TEXT}; stext=0xffffff8003400000",
        {"version": BANNER, "uuid": UUID, "kernel_address": 0xFFFFFF8003400000},
    ),
    (
        f"{BANNER}; stext=0xffffff8003400000",
        {"version": BANNER, "kernel_address": 0xFFFFFF8003400000},
    ),
    (f"{BANNER}; UUID=; stext=", {"version": BANNER}),
    (f"{BANNER}; UUID=0102; stext=nonsense", {"version": BANNER}),
    (f"{BANNER}; stext=-0x1000", {"version": BANNER}),
    (f"{BANNER}; stext=0x1ffffff8000200000", {"version": BANNER}),
    (f"{BANNER}; UUID={UUID_TEXT[:-1]}g", {"version": BANNER}),
    (f"{BANNER}; UUID=00000000-0000-0000-0000-000000000000", {"version": BANNER}),
    ("", {}),
]


@pytest.mark.parametrize(("text", "expected"), STRINGS)
def test_the_version_string(text, expected):
    assert parse_version_string(text.encode()) == expected
    assert parse_version_string(text.encode() + b"\0; UUID=" + UUID_TEXT.encode()) == expected
    facts = facts_of(ident=text)
    assert said(facts) == expected
    assert set(facts.said.values()) <= {"LC_IDENT"}
    facts = facts_of(kern_ver_str=struct.pack("<I", 1) + text.encode() + b"\0")
    assert said(facts) == expected
    assert set(facts.said.values()) <= {'LC_NOTE "kern ver str"'}


def test_the_main_binary():
    kernel = 0xFFFFFF8003400000
    for version in (1, 2):
        facts = facts_of(main_bin_spec=main_bin_spec(version, address=kernel))
        assert said(facts) == {"uuid": UUID, "kernel_address": kernel}
        assert facts.said["uuid"] == 'LC_NOTE "main bin spec"'
    facts = facts_of(main_bin_spec=main_bin_spec(2, slide=0x3200000))
    assert said(facts) == {"uuid": UUID, "slide": 0x3200000}
    assert said(facts_of(main_bin_spec=main_bin_spec(2, uuid=bytes(16)))) == {}


@pytest.mark.parametrize("kind", [0, 2, 3, 4, 0xFFFFFFFF])
def test_a_main_binary_that_is_no_kernel_says_nothing_of_one(kind):
    assert said(facts_of(main_bin_spec=main_bin_spec(1, kind, 0x1000))) == {}


@pytest.mark.parametrize("version", [0, 3, 0xFFFFFFFF])
def test_a_note_of_an_unknown_version_is_left_alone(version):
    unknown = struct.pack("<I", version) + bytes(60)
    assert said(facts_of(main_bin_spec=unknown, load_binary=unknown)) == {}


def test_address_bits():
    assert facts_of(addrable_bits=struct.pack("<IIQ", 3, 39, 0)).va_bits == 39
    assert facts_of(addrable_bits=struct.pack("<IIII", 4, 39, 47, 0)).va_bits == 47
    for bits in (0, 31, 65, 0xFFFFFFFF):
        assert facts_of(addrable_bits=struct.pack("<IIQ", 3, bits, 0)).va_bits is None


def test_the_binary_that_is_called_xnu():
    def load_binary(name, address=0xFFFFFE0007004000):
        return struct.pack("<I16sQQ", 1, UUID, address, UNKNOWN) + name

    facts = facts_of(load_binary=load_binary(b"xnu\0"))
    assert said(facts) == {"uuid": UUID, "kernel_address": 0xFFFFFE0007004000}
    assert said(facts_of(load_binary=load_binary(b"xnu\0", UNKNOWN))) == {"uuid": UUID}
    for other in (b"sptm\0", b"xnuproxy\0", b"xn", b""):
        assert said(facts_of(load_binary=load_binary(other))) == {}


def test_the_first_record_to_say_something_is_believed():
    facts = facts_of(
        ident=f"{BANNER}; UUID={UUID_TEXT}",
        main_bin_spec=main_bin_spec(1, address=0x1000, uuid=bytes(15) + b"\x07"),
    )
    assert (facts.uuid, facts.kernel_address) == (UUID, 0x1000)
    assert facts.said["uuid"] == "LC_IDENT"
    assert facts.said["kernel_address"] == 'LC_NOTE "main bin spec"'


def test_a_note_that_lies_past_the_end_is_a_warning():
    file = new_core()
    file.note("main bin spec", main_bin_spec(1, address=0x1000), offset=0x7FFFFFFF)
    core = core_of(file)
    assert said(core.facts) == {}
    assert core.warnings == [
        'LC_NOTE "main bin spec": 0x28 bytes at offset 0x7fffffff lie past the end of the file'
    ]


@pytest.mark.parametrize(
    ("owner", "version", "whole"),
    [
        ("main bin spec", 1, 40),
        ("main bin spec", 2, 48),
        ("load binary", 1, 36),
        ("addrable bits", 3, 16),
        ("addrable bits", 4, 16),
    ],
)
def test_half_a_note_says_which(owner, version, whole):
    def noted(size):
        file = new_core()
        file.note(owner, (struct.pack("<I", version) + bytes(60))[:size])
        return core_of(file)

    for size in range(4):
        assert said(noted(size).facts) == {}  # not even a version
    for size in range(4, whole):
        with pytest.raises(TruncatedError, match=owner) as caught:
            noted(size)
        assert (caught.value.source, caught.value.wanted, caught.value.got) == ("core", whole, size)
    noted(whole)


@given(
    st.sampled_from(["main bin spec", "kern ver str", "addrable bits", "load binary", "other"]),
    st.integers(0, 5),
    st.binary(max_size=80),
    st.sampled_from(["x86_64", "ppc64", "i386"]),
)
def test_noise_in_a_note(owner, version, noise, arch):
    file = new_core(arch)
    order = build.MACHINES[arch].order
    file.note(owner, struct.pack(order + "I", version) + noise)
    try:
        facts = core_of(file).facts
    except KvmError:
        return
    assert facts.uuid is None or len(facts.uuid) == 16
    assert facts.va_bits is None or 32 <= facts.va_bits <= 64


# the real ones


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_the_dumps_say_what_is_true(dump):
    truth = inputs.truth(dump)
    source = FileSource(inputs.plain_core(dump))
    core = MachOCore(source)
    assert core.warnings == []
    facts = core.facts
    table = truth["formats"]["core.macho"]["table"]
    assert [(run.address, run.size, run.offset) for run in core.runs()] == [
        (row["vmaddr"], row["size"], row["fileoff"]) for row in table
    ]
    (thread,) = facts.threads
    ((flavor, data),) = thread.states
    registers = arch_for(facts.cputype).registers(flavor, data)
    wanted = truth["cpu"]["registers"]
    assert {name: registers[name] for name in wanted} == wanted
    if truth["formats"]["core.macho"]["notes"] == "none":
        assert facts.said == {}
    else:
        assert facts.uuid == bytes.fromhex(truth["uuid"].replace("-", ""))
        assert facts.version == truth["banner"]
        assert facts.kernel_address == truth["statics"]["kernel_stext"]
    source.close()


def test_the_core_that_xnu_wrote():
    source = FileSource(inputs.real("machine/crash.kdp-core"))
    core = MachOCore(source)
    assert core.warnings == []
    assert core.facts.said == {}
    assert core.facts.cputype == macho.CPU_TYPE_X86_64
    ((flavor, data),) = core.facts.threads[0].states
    registers = arch_for(core.facts.cputype).registers(flavor, data)
    oracle = inputs.oracle("crash")
    running = oracle["cpu"]["active_thread"]
    (stack,) = (t["bt"] for t in oracle["threads"] if t["addr"] == running)
    assert stack[0] == "_Debugger+0x22b"
    kernel = FileSource(inputs.real("machine/x86_64-xnu-2422.115.4.mach_kernel"))
    symbols = macho.MachO(kernel).symtab.find("_Debugger")
    (debugger,) = (entry for entry in symbols if entry.defined)
    assert registers["rip"] == debugger.n_value + 0x22B
    kernel.close()
    source.close()


def test_the_core_in_the_corefile_that_xnu_wrote():
    container = FileSource(inputs.real("machine/armc.corefile"))
    packed = container.read_at(0x6000, container.size - 0x6000)  # where data/README.md says
    container.close()
    core = MachOCore(BytesSource(zlib.decompressobj(wbits=31).decompress(packed), "core"))
    oracle = inputs.oracle("armc")["symbols"]
    assert core.warnings == []
    assert core.facts.uuid == bytes.fromhex(oracle["_kernel_uuid_string"]["value"].replace("-", ""))
    assert core.facts.version == oracle["_version"]["value"]
    assert set(core.facts.said.values()) == {"LC_IDENT"}
    memory = core.virtual()
    for name in ("_allproc", "_kernproc", "_vm_kernel_stext", "_msgbufp"):
        stored = memory.read(int(oracle[name]["addr"], 16), 8)
        assert int.from_bytes(stored, "little") == int(oracle[name]["value"], 16), name


@pytest.mark.parametrize("dump", inputs.DUMPS)
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("core.lc-size-zero", "load command 0 .*cmdsize 0x0, expected 0x8 to"),
        ("core.lc-size-huge", "load command 0 .*cmdsize 0x7ffffff0, expected 0x8 to"),
        ("core.ncmds", "ncmds 0xffffffff cannot fit in sizeofcmds"),
        ("core.sizeofcmds", "load commands: expected 0xfffffff0 bytes"),
        ("core.header-only", "expected 0x(20|1c) bytes, got 0x14"),
    ],
)
def test_a_damaged_head_is_one_clear_error(dump, name, match):
    source = FileSource(inputs.real(f"dumps/{dump}/damaged/{name}.macho"))
    with pytest.raises(FormatError, match=match) as caught:
        MachOCore(source)
    assert caught.value.source == source.name
    assert caught.value.offset is not None
    assert "\n" not in str(caught.value)
    source.close()


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_an_empty_core_is_one_clear_error(dump):
    source = FileSource(inputs.real(f"dumps/{dump}/damaged/core.empty"))
    with pytest.raises(UnknownFormatError, match="the file is empty"):
        formats.identify(source)
    source.close()


@pytest.mark.parametrize("dump", inputs.DUMPS)
@pytest.mark.parametrize("name", ["core.truncated.macho", "core.truncated-early.macho"])
def test_what_a_cut_core_lost_is_absent(dump, name):
    damage = inputs.truth(dump)["formats"]["damaged"][name]
    source = FileSource(inputs.real(f"dumps/{dump}/damaged/{name}"))
    core = MachOCore(source)
    assert source.size == damage["size"]
    assert core.lost == [tuple(lost) for lost in damage["lost"]]
    memory = core.virtual()
    for start, end in damage["lost"]:
        assert fault(memory, start) == fault(memory, end - 1) == "absent"
        assert memory.read(start - 1, 0) == b""
    assert any(f"{len(damage['lost'])} of " in text for text in core.warnings)
    source.close()
