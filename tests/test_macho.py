"""Mach-O: the records against macholib's, hostile headers, and runs of commands read in bulk."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from macholib import mach_o, ptypes

from kvmtool import macho, macho_records, nlist
from kvmtool.errors import FormatError, KvmError, TruncatedError
from kvmtool.macho import MachO
from kvmtool.segment_table import segment_table
from kvmtool.source import BytesSource, FileSource
from tests import inputs
from tests.builders import macho as build

ORDERS = ("<", ">")
ARCHES = ("i386", "x86_64", "ppc", "ppc64")


def open_bytes(data):
    return MachO(BytesSource(bytes(data), "file"))


# records: struct twins == construct == macholib

LOAD_COMMANDS = (
    "segment_command",
    "segment_command_64",
    "symtab_command",
    "dysymtab_command",
    "uuid_command",
    "note_command",
    "source_version_command",
    "build_version_command",
)
OTHERS = ("mach_header", "mach_header_64", "section", "section_64", "nlist", "nlist_64")


def macholib_layout(name):
    """[(field, offset, size)] of a record of macholib, whose commands lack cmd and cmdsize."""
    record = getattr(mach_o, name)
    classes = [mach_o.load_command] if name in LOAD_COMMANDS else []
    fields, at = [], 0
    for cls in (*classes, record):
        for field, kind in zip(cls._names_, cls._types_, strict=True):
            size = ptypes.sizeof(kind)
            fields.append(("n_strx" if field == "n_un" else field, at, size))
            at += size
    return fields


def our_layout(name, order):
    fields, at = [], 0
    for field in macho_records.records(order)[name].subcons:
        fields.append((field.name, at, field.sizeof()))
        at += field.sizeof()
    return fields


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*LOAD_COMMANDS, *OTHERS])
def test_records_are_laid_out_as_macholib_has_them(name, order):
    assert our_layout(name, order) == macholib_layout(name)


TWINS = [
    *(
        (name, order, table[order], 0)
        for order in ORDERS
        for name, table in (
            ("mach_header", macho._HEADER),
            ("symtab_command", macho._SYMTAB),
        )
    ),
    *(
        (name + ("_64" if wide else ""), order, table[order, wide], 0)
        for order in ORDERS
        for wide in (False, True)
        for name, table in (
            ("segment_command", macho._SEGMENT),
            ("section", macho._SECTION),
            ("nlist", nlist._ENTRY),
        )
    ),
    *(("mach_header_64", order, macho._HEADER[order], 4) for order in ORDERS),  # `reserved` unread
    *(("uuid_command", order, macho._COMMAND[order], 16) for order in ORDERS),  # cmd, cmdsize
]


@pytest.mark.parametrize(("name", "order", "twin", "rest"), TWINS)
def test_twins_read_what_construct_reads(name, order, twin, rest):
    record = macho_records.records(order)[name]
    assert twin.size + rest == record.sizeof()
    data = bytes(range(1, record.sizeof() + 1))  # every byte another, all numbers positive
    parsed = record.parse(data)
    named = [parsed[field] for field, at, _ in our_layout(name, order) if at < twin.size]
    assert list(twin.unpack(data[: twin.size])) == named


@pytest.mark.parametrize("module", [macho, nlist])
def test_constants_are_macholibs(module):
    ours = {n: value for n, value in vars(module).items() if n.isupper() and type(value) is int}
    theirs = {name: getattr(mach_o, name) for name in ours if hasattr(mach_o, name)}
    assert {name: ours[name] for name in theirs} == theirs
    assert len(theirs) >= 5


@pytest.mark.parametrize(
    ("magic", "expected"),
    [
        (mach_o.MH_MAGIC, {b"\xfe\xed\xfa\xce": (">", False), b"\xce\xfa\xed\xfe": ("<", False)}),
        (mach_o.MH_MAGIC_64, {b"\xfe\xed\xfa\xcf": (">", True), b"\xcf\xfa\xed\xfe": ("<", True)}),
    ],
)
def test_magics_are_macholibs_in_either_order(magic, expected):
    for order in ORDERS:
        raw = struct.pack(order + "I", magic)
        assert macho.MAGICS[raw] == expected[raw]
        assert macho.is_macho(raw + b"more")
    assert not macho.is_macho(b"\xca\xfe\xba\xbe")  # fat, or Java
    assert not macho.is_macho(b"\xcf\xfa")


@pytest.mark.parametrize("arch", ["i386", "x86_64", "ppc", "ppc64", "arm", "arm64", "arm64e"])
def test_machines_have_the_names_of_apples_tools(arch):
    machine = build.MACHINES[arch]
    assert macho.arch_name(machine.cputype, machine.cpusubtype) == arch
    # capability bits do not make another machine: arm64e kernels carry the pointer-auth ABI there
    assert macho.arch_name(machine.cputype, machine.cpusubtype | 0xC0000000) == arch


def test_an_unknown_machine_is_named_by_its_number():
    assert macho.arch_name(0x99, 0) == "cputype-0x99"


# whole files, in both byte orders and word sizes

UUID = bytes(range(16))


def sample(arch="x86_64", filetype=build.MH_EXECUTE):
    """A little of everything."""
    file = build.MachO(arch, filetype, 0x85)
    sections = [
        build.Section("__text", "__TEXT", 0x1000, 0x20, align=2),
        build.Section("__sixteen_letters"[:16], "__TEXT", 0x1020, 0x10, flags=0x80000400),
        build.Section("__bss", "__DATA", 0x1030, 0x40, flags=build.S_ZEROFILL),
    ]
    file.segment("__TEXT", 0x1000, bytes(0x40), vmsize=0x2000, prot=5, sections=sections)
    file.segment("__DATA", 0x3000, b"data", prot=3)
    file.uuid(UUID)
    file.symtab([build.Sym("_a", 0x1000), build.Sym("_b", 0x1008)], dysymtab=False)
    file.note("main bin spec", b"payload")
    file.source_version(4570, 71, 2)
    return file


@pytest.mark.parametrize("arch", ARCHES)
def test_a_whole_file(arch):
    image = open_bytes(sample(arch).build())
    machine = build.MACHINES[arch]
    assert (image.byteorder, image.is64) == (machine.order, machine.width == 8)
    assert (image.cputype, image.filetype, image.flags) == (machine.cputype, 2, 0x85)
    text, data = image.segments
    assert (text.segname, text.vmaddr, text.vmsize, text.filesize) == (
        "__TEXT",
        0x1000,
        0x2000,
        0x40,
    )
    assert (text.maxprot, text.initprot, text.nsects) == (5, 5, 3)
    assert image.segment("__DATA") == data
    assert image.segment("__NONE") is None
    assert image.source.read_at(data.fileoff, data.filesize) == b"data"
    assert [(s.segname, s.sectname, s.addr, s.size) for s in image.sections] == [
        ("__TEXT", "__text", 0x1000, 0x20),
        ("__TEXT", "__sixteen_letter", 0x1020, 0x10),
        ("__DATA", "__bss", 0x1030, 0x40),
    ]
    assert [s.zerofill for s in image.sections] == [False, False, True]
    assert image.uuid == UUID
    assert [(entry.name, entry.n_value) for entry in image.symtab] == [
        ("_a", 0x1000),
        ("_b", 0x1008),
    ]
    (note,) = image.notes
    assert (note.owner, note.size) == ("main bin spec", 7)
    assert image.source.read_at(note.offset, note.size) == b"payload"
    (version,) = image.commands(macho.LC_SOURCE_VERSION)
    parsed = image.record("source_version_command", version)
    assert parsed.version == 4570 << 40 | 71 << 30 | 2 << 20
    assert image.warnings == []


def test_a_file_without_anything():
    image = open_bytes(build.MachO("x86_64", build.MH_OBJECT).build())
    assert image.segments == image.sections == image.notes == ()
    assert image.uuid is None
    assert image.symtab is None
    assert list(image.commands()) == []


@pytest.mark.parametrize(
    "head", [b"", b"\xcf", b"\xcf\xfa\xed", b"\x7fELF", b"\xca\xfe\xba\xbe", b"\0\0\0\0"]
)
def test_what_is_no_macho_says_what_it_begins_with(head):
    with pytest.raises(FormatError, match="expected a Mach-O magic, got") as caught:
        open_bytes(head)
    assert caught.value.offset == 0


# hostile numbers

NCMDS, SIZEOFCMDS = 16, 20  # offsets of the fields in mach_header


def poke(data, at, value, order="<", code="I"):
    out = bytearray(data)
    struct.pack_into(order + code, out, at, value)
    return bytes(out)


def everything(image):
    """Ask for all there is; errors of ours are answers, any other escapes."""
    answers = []
    for ask in (
        lambda: image.command_runs,
        lambda: list(image.commands()),
        lambda: image.segments,
        lambda: image.sections,
        lambda: segment_table(image),
        lambda: image.uuid,
        lambda: image.notes,
        lambda: image.symtab and list(image.symtab),
        lambda: image.symtab and image.symtab.find("_a"),
        lambda: [image.record("source_version_command", c) for c in image.commands(0x2A)],
    ):
        try:
            answers.append(ask())
        except KvmError as error:
            answers.append(error)
    assert all(str(e).startswith("file: ") for e in answers if isinstance(e, KvmError))
    return answers


@pytest.mark.parametrize("cmdsize", [0, 1, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("arch", ARCHES)
def test_a_cmdsize_that_cannot_be(arch, cmdsize):
    order = build.MACHINES[arch].order
    file = sample(arch)
    first = 32 if build.MACHINES[arch].width == 8 else 28
    image = open_bytes(poke(file.build(), first + 4, cmdsize, order))
    with pytest.raises(FormatError, match=f"cmdsize {cmdsize:#x}, expected 0x8 to") as caught:
        _ = image.command_runs
    assert caught.value.offset == first
    everything(image)


@pytest.mark.parametrize("filetype", [build.MH_EXECUTE, build.MH_CORE])
@pytest.mark.parametrize("ncmds", [0x1000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_more_commands_than_there_is_room_for(ncmds, filetype):
    image = open_bytes(poke(sample(filetype=filetype).build(), NCMDS, ncmds))
    with pytest.raises(FormatError, match=f"ncmds {ncmds:#x} cannot fit in sizeofcmds") as caught:
        _ = image.command_runs
    assert caught.value.offset == NCMDS
    everything(image)


def test_fewer_commands_than_there_are_are_taken_at_their_word():
    image = open_bytes(poke(sample().build(), NCMDS, 1))
    assert [segment.segname for segment in image.segments] == ["__TEXT"]
    assert image.uuid is None


@pytest.mark.parametrize("size", [0x10000000, 0x7FFFFFFF, 0xFFFFFFF0, 0xFFFFFFFF])
def test_commands_that_reach_past_the_end_of_the_file(size):
    data = sample().build()
    image = open_bytes(poke(data, SIZEOFCMDS, size))
    with pytest.raises(TruncatedError, match="load commands") as caught:
        _ = image.command_runs
    assert (caught.value.wanted, caught.value.got) == (size, len(data) - 32)
    everything(image)


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_commands_that_do_not_fit_into_sizeofcmds(size):
    image = open_bytes(poke(sample().build(), SIZEOFCMDS, size))
    with pytest.raises(FormatError):
        _ = image.command_runs
    everything(image)


@pytest.mark.parametrize("nsects", [4, 0x1000, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("arch", ARCHES)
def test_more_sections_than_there_is_room_for(arch, nsects):
    machine = build.MACHINES[arch]
    wide = machine.width == 8
    at = (32 if wide else 28) + (64 if wide else 48)
    image = open_bytes(poke(sample(arch).build(), at, nsects, machine.order))
    with pytest.raises(FormatError, match=f"nsects {nsects:#x} cannot fit in cmdsize") as caught:
        _ = image.sections
    assert caught.value.offset == (32 if wide else 28)
    assert len(image.segments) == 2  # the segment itself is sound
    everything(image)


@pytest.mark.parametrize(("cmd", "room"), [(macho.LC_SEGMENT, 56), (macho.LC_SEGMENT_64, 72)])
@pytest.mark.parametrize("count", [1, 20])
def test_a_segment_command_too_short_for_a_segment(cmd, room, count):
    file = build.MachO("x86_64", build.MH_CORE)
    for _ in range(count):
        file.command(cmd, bytes(room - 16))
    image = open_bytes(file.build())
    for ask in (lambda: image.segments, lambda: segment_table(image)):
        with pytest.raises(
            FormatError, match=f"segment: cmdsize {room - 8:#x}, expected {room:#x}"
        ):
            ask()


@pytest.mark.parametrize(
    ("cmd", "body", "ask"),
    [
        (macho.LC_UUID, bytes(8), "uuid"),
        (macho.LC_UUID, bytes(24), "uuid"),
        (macho.LC_SYMTAB, bytes(8), "symtab"),
        (macho.LC_SYMTAB, bytes(24), "symtab"),
        (macho.LC_NOTE, bytes(24), "notes"),
    ],
)
def test_a_single_command_of_the_wrong_size(cmd, body, ask):
    file = build.MachO("x86_64", build.MH_EXECUTE)
    file.command(cmd, body)
    with pytest.raises(FormatError) as caught:
        getattr(open_bytes(file.build()), ask)
    assert caught.value.offset == 32


def test_cores_may_count_commands_they_had_no_room_for():
    # kern_dump() of xnu-792..1699 stops when the header is full, and zeros follow (kdp_vm.c)
    file = build.MachO("i386", build.MH_CORE)
    file.segment("", 0x1000, b"x" * 4096)
    image = open_bytes(file.build(ncmds=3, sizeofcmds=file.head_size() - 28 + 4 * 68))
    assert len(image.segments) == 1
    assert image.warnings == ["ncmds says 0x3, the load commands end after 0x1"]


def test_zeros_may_end_the_commands_of_other_files_but_nothing_else_may():
    # a command that a tool wrote into a section which was zeroed later (data/objects/….o.ctf)
    file = build.MachO("i386", build.MH_EXECUTE)
    file.segment("__TEXT", 0x1000, b"x" * 4096)
    head = file.head_size() - 28
    image = open_bytes(file.build(ncmds=3, sizeofcmds=head + 4 * 68))
    assert len(image.segments) == 1
    assert image.warnings == ["ncmds says 0x3, the load commands end after 0x1"]
    cut = open_bytes(file.build(ncmds=3, sizeofcmds=head + 4))
    with pytest.raises(FormatError, match="ncmds says 0x3, the load commands end after 0x1"):
        _ = cut.segments


def test_names_need_not_be_text():
    file = build.MachO("x86_64", build.MH_EXECUTE)
    file.segment("__TEXT", 0, b"x")
    data = file.build().replace(b"__TEXT\0\0", b"\xff\x00__XT\0\0")
    assert open_bytes(data).segments[0].segname == "\\xff"


SMALL_FILES = (
    "dumps/i386-10.5.8/KernelMemoryAccess",
    "dumps/x86_64-10.8.5/KernelMemoryAccess",
)


@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_real_file_cut_off_anywhere(name):
    source = FileSource(inputs.real(name))
    whole = source.read_at(0, source.size)
    source.close()
    assert not any(isinstance(answer, KvmError) for answer in everything(open_bytes(whole)))
    broken = 0
    for size in range(len(whole)):
        try:
            image = open_bytes(whole[:size])
        except KvmError:
            broken += 1
            continue
        broken += any(isinstance(answer, KvmError) for answer in everything(image))
    assert broken == len(whole)  # the string table ends the file: every cut is noticed


@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_real_file_with_any_byte_of_its_head_wrong(name):
    source = FileSource(inputs.real(name))
    whole = source.read_at(0, source.size)
    source.close()
    head = MachO(BytesSource(whole)).sizeofcmds + 32
    for at in range(head):
        for value in (0x00, 0x01, 0x7F, 0x80, 0xFF):
            data = bytearray(whole)
            data[at] = value
            try:
                image = open_bytes(data)
            except KvmError:
                continue
            everything(image)


@given(st.binary(max_size=200), st.sampled_from(sorted(macho.MAGICS)))
def test_noise_behind_a_magic(noise, magic):
    try:
        image = open_bytes(magic + noise)
    except KvmError:
        return
    everything(image)


# runs of commands: the fast path equals the plain one


def plain_commands(image):
    """(cmd, cmdsize, offset) of every command, one after the other."""
    order = image.byteorder
    at = 32 if image.is64 else 28
    found = []
    for _ in range(image.ncmds):
        cmd, cmdsize = struct.unpack(order + "II", image.source.read_at(at, 8))
        found.append((cmd, cmdsize, at))
        at += cmdsize
    return found


def plain_segments(image):
    """The columns of a SegmentTable, command after command."""
    rows = []
    for cmd, cmdsize, at in plain_commands(image):
        code = {0x1: "8x16s8I", 0x19: "8x16s4Q4I"}.get(cmd)
        if code:
            raw = image.source.read_at(at, cmdsize)
            fields = struct.unpack_from(image.byteorder + code, raw)
            rows.append((*fields[1:5], fields[6]))
    return list(zip(*rows, strict=True)) if rows else [()] * 5


def assert_fast_equals_plain(image):
    runs = [
        (run.cmd, run.cmdsize, run.offset + number * run.cmdsize)
        for run in image.command_runs
        for number in range(run.repeats)
    ]
    assert runs == plain_commands(image)
    assert [tuple(column) for column in segment_table(image)] == plain_segments(image)
    own = [(s.vmaddr, s.vmsize, s.fileoff, s.filesize, s.initprot) for s in image.segments]
    assert own == list(zip(*plain_segments(image), strict=True))


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_runs_of_the_dumps(dump):
    source = FileSource(inputs.plain_core(dump))
    image = MachO(source)
    assert_fast_equals_plain(image)
    assert len(image.segments) == inputs.truth(dump)["formats"]["core.macho"]["segments"]
    assert len(image.command_runs) < image.ncmds
    source.close()


def test_runs_of_the_core_that_xnu_wrote():
    source = FileSource(inputs.real("machine/crash.kdp-core"))
    assert_fast_equals_plain(MachO(source))
    source.close()


def test_runs_of_the_core_in_the_corefile():
    corefile = FileSource(inputs.real("machine/armc.corefile"))
    packed = corefile.read_at(0x6000, corefile.size - 0x6000)  # where data/README.md says it lies
    corefile.close()
    image = open_bytes(zlib.decompressobj(wbits=31).decompress(packed))
    assert image.cputype == macho.CPU_TYPE_ARM64
    assert_fast_equals_plain(image)


def many(arch, count, *, odd_at=()):
    """A core with `count` one-byte segments; those in `odd_at` have a command of another shape."""
    machine = build.MACHINES[arch]
    wide = machine.width == 8
    layout = struct.Struct(machine.order + ("2I16s4Q4I" if wide else "2I16s4I4I"))
    parts = []
    for number in range(count):
        extra = 8 * (number % 3 + 1) if number in odd_at else 0
        fields = (0x10000 + number * 0x1000, 1 + number, number * 7, number, 5, number % 8, 0, 0)
        cmd = macho.LC_SEGMENT_64 if wide else macho.LC_SEGMENT
        parts.append(layout.pack(cmd, layout.size + extra, b"", *fields) + bytes(extra))
    body = b"".join(parts)
    header = struct.pack(
        machine.order + ("8I" if wide else "7I"),
        *(0xFEEDFACF if wide else 0xFEEDFACE, machine.cputype, 3, build.MH_CORE),
        *(count, len(body), 0, *((0,) if wide else ())),
    )
    return header + body


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("odd_at", [(), (0, 1, 5000, 5009, 9999)], ids=["alike", "odd ones"])
def test_runs_of_ten_thousand_segments(arch, odd_at):
    image = open_bytes(many(arch, 10_000, odd_at=odd_at))
    assert_fast_equals_plain(image)
    assert len(image.command_runs) <= 1 + 2 * len(odd_at)


@pytest.mark.parametrize("odd_at", [range(0, 10_000, 2), range(0, 10_000, 9)])
def test_runs_that_are_often_broken(odd_at):
    assert_fast_equals_plain(open_bytes(many("x86_64", 10_000, odd_at=frozenset(odd_at))))


@given(
    shapes=st.lists(
        st.tuples(
            st.sampled_from([macho.LC_SEGMENT, macho.LC_SEGMENT_64, macho.LC_THREAD, 0x7777]),
            st.sampled_from([72, 76, 80, 152]),
            st.integers(1, 20),
        ),
        max_size=6,
    ),
    order=st.sampled_from(ORDERS),
)
def test_runs_of_any_shapes(shapes, order):
    body = bytearray()
    count = 0
    for cmd, cmdsize, repeats in shapes:
        for _ in range(repeats):
            body += struct.pack(order + "II", cmd, cmdsize)
            body += bytes((count + n) & 0xFF for n in range(cmdsize - 8))
            count += 1
    header = struct.pack(order + "8I", 0xFEEDFACF, 7, 3, build.MH_CORE, count, len(body), 0, 0)
    assert_fast_equals_plain(open_bytes(header + body))


# what a big or lying file costs


def peak_of(ask):
    tracemalloc.start()
    try:
        ask()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("at", "value"),
    [(NCMDS, 0xFFFFFFFF), (SIZEOFCMDS, 0xFFFFFFFF), (36, 0xFFFFFFF8), (32 + 64, 0xFFFFFFFF)],
    ids=["ncmds", "sizeofcmds", "cmdsize", "nsects"],
)
def test_a_lie_costs_no_memory(at, value):
    data = poke(sample().build(), at, value)
    assert peak_of(lambda: everything(open_bytes(data))) < 1 << 20


@pytest.mark.parametrize("field", [12, 20])
def test_a_lying_symbol_table_costs_no_memory(field):
    file = build.MachO("x86_64", build.MH_EXECUTE)
    file.symtab([build.Sym("_a", 1)], dysymtab=False)
    data = poke(file.build(), 32 + field, 0xFFFFFFF0)
    with pytest.raises(FormatError, match="table: expected 0x"):
        _ = open_bytes(data).symtab
    assert peak_of(lambda: everything(open_bytes(data))) < 1 << 20


def test_a_core_with_very_many_segments_opens_at_once():
    data = many("x86_64", 200_000)
    started = time.process_time()
    table = segment_table(open_bytes(data))
    assert time.process_time() - started < 1
    assert len(table.vmaddr) == 200_000
    # the commands themselves (14 MB), their words, and five columns of 8 bytes
    assert peak_of(lambda: segment_table(open_bytes(data))) < 4 * len(data)
