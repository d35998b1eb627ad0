"""Why a Mac died: against panics of machines that ran, built ones of every kind, and damage."""

from __future__ import annotations

import json
import random
import struct
import time

import pytest
from click.testing import CliRunner

from kvmtool import kvm
from kvmtool.cli import cli
from kvmtool.types import layouts
from kvmtool.xnu.panic import Said, panic_header, read_log
from tests.builders.corefile import AEA, Member, boss_mac, gzip_member, rad_mac
from tests.builders.eras import ERAS
from tests.builders.running import Running, symbols
from tests.builders.xnu import has_kaslr
from tests.inputs import DUMPS, oracle, plain_core, real, truth
from tests.test_builders_xnu import KEXTS, crash

KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"
CRASH, LIVE = "machine/crash.kdp-core", "machine/live.elfcore"
ARM = ("machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel", "machine/armc.corefile")


def said(*args, status=0):
    found = CliRunner().invoke(cli, ["panic", *args])
    assert found.exit_code == status, found.output
    return found


def answer(*args, status=0):
    return json.loads(said(*args, "--format", "json", status=status).stdout)


# machines that ran


def test_the_panic_of_a_machine_that_dumped_itself():
    found = answer("-N", real(KERNEL), "-M", real(CRASH))
    true = oracle("crash")
    assert found["panicked"] is True
    assert found["evidence"] == ["panic string", "panic log", "stack"]
    assert found["log"] == true["strings"]["_debug_buf"]
    assert found["log_origin"].startswith("debug_buf at ")
    path = "@/Users/admin/Code/xnu/xnu-2422.115.4/bsd/kern/kern_exit.c:348"
    assert found["message"] == rf'"launchd died\nState at Last Exception:\n\n"{path}'
    assert found["format"] == rf'"%s died\nState at Last Exception:\n\n%s"{path}'
    assert found["caller"] == {"address": "0xffffff80005efc83", "name": "_exit1_internal+0x203"}
    assert (found["pid"], found["command"], found["tid"]) == (1, "launchd", 30)
    assert found["thread"] == true["cpu"]["active_thread"]
    assert found["cpu"] == true["cpu"]["cpu_number"]
    assert found["version"] == true["strings"]["_version"]
    assert found["osversion"] == true["strings"]["_osversion"]
    assert found["uptime"] == 64188059669
    assert found["boot_args"].startswith("serial=3 -v debug=0x40c")
    (thread,) = [t for t in true["threads"] if t["addr"] == found["thread"]]
    assert [frame["name"] for frame in found["backtrace"]["frames"]] == thread["bt"]
    assert [frame["name"] for frame in found["printed"]] == thread["bt"][1:]
    assert found["kexts"] == []
    assert found["flags"] is None  # panic headers came with 10.13


def test_the_panic_of_an_arm64_machine_in_its_corefile():
    found = answer("-N", real(ARM[0]), "-M", real(ARM[1]))
    with kvm.open(real(ARM[0]), real(ARM[1])) as handle:
        outside = handle.dump.container.log().decode()
    text = '"IOFindBSDRoot: specified root memory device, md0, has not been configured\\n"'
    assert found["message"] == text
    assert f": {text}\n" in outside
    assert found["caller"]["name"] == "_IOFindBSDRoot+0x62c"
    assert (found["pid"], found["command"], found["tid"]) == (0, "kernel_task", 101)
    assert found["uptime"] == 191_181_119_000  # Calendar less Boot, as printed in hex
    assert found["flags"] == ["stackshot succeeded", "coredump failed"]
    printed = [frame["name"] for frame in found["printed"]]
    stack = [frame["name"] for frame in found["backtrace"]["frames"]]
    assert printed[-len(stack) :] == stack
    assert len(printed) == outside.count("lr: 0x") + 5  # the corefile's copy is cut
    assert "\0" not in found["log"]
    assert "stackshot_in_flags" not in found["log"]  # the stackshot is no text
    assert "** Stackshot Succeeded ** Bytes Traced 9008 **" in found["log"]


def test_a_machine_that_had_not_panicked():
    found = answer("-N", real(KERNEL), "-M", real(LIVE))
    assert found["panicked"] is False
    assert {found[key] for key in ("message", "format", "log", "backtrace", "thread")} == {None}
    table = said("-N", real(KERNEL), "-M", real(LIVE)).stdout.split("\n")
    assert table[0] == "panicked  no: no panic string, no panic log"


@pytest.mark.parametrize("dump", DUMPS)
def test_a_stack_in_panic_is_evidence(dump):
    found = answer("-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump))
    assert found["evidence"] == ["stack"]
    pcs = [int(frame["pc"], 16) for frame in found["backtrace"]["frames"]]
    assert pcs == truth(dump)["cpu"]["backtrace"]


def test_the_table_is_for_a_person():
    lines = said("-N", real(KERNEL), "-M", real(CRASH)).stdout.split("\n")
    assert lines[2] == "caller    0xffffff80005efc83 _exit1_internal+0x203"
    assert lines[3] == "thread    thread 30 of launchd (1) at 0xffffff8001b65e30"
    assert "uptime    64.2 s" in lines
    assert "  1  0xffffff80002225c9  _panic+0xc9" in lines
    assert "stack, as it was printed:" not in lines  # it is the same
    assert "  System uptime in nanoseconds: 64188059669" in lines


# panics that were built

TEXT = (
    'panic(cpu 1 caller 0x{caller:x}): "a kext went wrong: %d\\n"@driver.c:12\n'
    "Backtrace (CPU 1), Frame : Return Address\n"
    "0x{fp:x} : 0x{first:x} \n"
    "0x{fp:x} : 0x{second:x} \n"
    "\nBSD process name corresponding to current thread: bash\n"
    "System uptime in nanoseconds: 1234567890\n"
)
EMBEDDED, MACOS = 0x46554E4B, 0x44454544


def panicked(name, *, header=None, text=TEXT):
    """A built crash in which the first thread of process 71 went through a kext into panic()."""
    layout = layouts.table(name)
    arch = name.rpartition(" ")[2]
    slide = 0xA00000 if has_kaslr(layout) else 0
    new = layout.has("thread", "user_timer.all_bits") or not layout.has("thread", "user_timer")
    string = "_debugger_panic_str" if new else "_panicstr"
    start = "_debug_buf_base" if new else "_debug_buf"
    names = (string, start, "_debug_buf_ptr", *(("_panic_info",) if header else ()))
    built = crash(name, functions=["_f0", "_f1"], more_symbols=symbols(arch, slide, names))
    running = Running(built, layout)
    thread, _ = built.process(71)["threads"][0]
    kext = KEXTS[arch] + 0x1234
    calls = [built.address("_Debugger") + 4, built.address("_panic") + 4, kext]
    stack = running.stack(thread, [*calls, built.address("_f1") + 4])
    running.processors([built.process(1)["threads"][0][0], thread])
    written = text.format(caller=kext, fp=running.frame(stack, 0), first=calls[1], second=kext)
    buffer = running.variables["_debug_buf"]
    if header is not None:
        head = header(len(written))
        built.memory.write(buffer, head)
        running.words(running.variables["_panic_info"], buffer)
        buffer += len(head)
    built.memory.write(buffer, written.encode())
    if new:
        running.words(running.variables["_debug_buf_base"], buffer)
    running.words(running.variables["_debug_buf_ptr"], buffer + len(written.encode()))
    running.words(running.variables[string], running.text("a kext went wrong: %d\n"))
    return built, running, thread, written


def files(tmp_path, built, core=None):
    kernel, dump = tmp_path / "kernel", tmp_path / "core"
    kernel.write_bytes(built.kernel)
    dump.write_bytes(core or built.dump())
    return ("-N", str(kernel), "-M", str(dump))


@pytest.mark.parametrize("name", ERAS)
def test_every_era(name, tmp_path):
    """No LC_THREAD leads to the thread: the log's CPU does, and the registers the panic saved."""
    built, _, thread, written = panicked(name)
    found = answer(*files(tmp_path, built, without_threads(built)), "--layout", name)
    assert found["log"] == written
    assert found["message"] == '"a kext went wrong: %d\\n"@driver.c:12'
    assert found["format"] == "a kext went wrong: %d\n"
    assert (found["pid"], found["command"], found["cpu"]) == (71, "bash", 1)
    assert found["thread"] == f"{thread:#x}"
    assert found["uptime"] == 1234567890
    assert [frame["symbol"] for frame in found["backtrace"]["frames"]] == [
        *("_Debugger", "_panic"),
        *(None, "_f1"),
    ]
    (kext,) = found["kexts"]
    assert kext["identifier"] == "com.example.first"
    assert kext["version"] == "2.8"
    assert found["caller"]["name"].startswith("com.example.first+0x")
    assert found["backtrace"]["frames"][2]["kext"] == "com.example.first"
    assert [frame["kext"] for frame in found["printed"]] == [None, "com.example.first"]


def without_threads(built, without=()):
    from tests.builders import xnu

    class Core(xnu._Core):
        def _threads(self, core):
            return

    return Core(built, built.shape, without).write()


# osfmk/kern/debug.h: magic, CRC, version, flags, panic log, stackshot
HEADERS = {
    "embedded": (
        lambda length: struct.pack("<3IQ4I", EMBEDDED, 0, 2, 0x202, 44, length, 0, 0) + bytes(8),
        ["stackshot succeeded", "coredump failed"],
    ),
    "macos 1": (
        lambda length: struct.pack("<4IQ2I", MACOS, 0, 1, 0, 0x3, 32, length),
        ["nested panic", "coprocessor initiated panic"],
    ),
    "macos 2": (
        lambda length: struct.pack("<4IQ4I", MACOS, 0, 2, 0, 0x104, 48, length, 0, 0) + bytes(8),
        ["stackshot succeeded", "coredump complete"],
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_panic_headers(kind, tmp_path):
    name = "15.5 arm64" if kind == "embedded" else "10.14.6 x86_64"
    header, words = HEADERS[kind]
    built, running, _, written = panicked(name, header=header)
    where = files(tmp_path, built)
    found = answer(*where, "--layout", name)
    assert found["flags"] == words
    assert found["log"] == written
    with kvm.open(where[1], where[3], layout=name) as handle:
        known = panic_header(handle.verified_target())
    assert known.address == running.variables["_debug_buf"]
    assert known.log_length == len(written)
    assert known.address + known.log_offset == known.address + len(header(0))
    assert known.stackshot is None


def test_a_stackshot_in_the_middle_is_left_out(tmp_path):
    name = "15.5 arm64"
    shot = "\x01\x02shot!"
    text = TEXT + shot + "** Stackshot Succeeded **\n"
    made = panicked(name, text=TEXT + "{{}}")[3].removesuffix("{}")
    at = 44 + len(made)

    def header(length):
        return struct.pack("<3IQ4I", EMBEDDED, 0, 2, 2, 44, at - 44, at, len(shot)) + bytes(8)

    built, _, _, written = panicked(name, header=header, text=text)
    found = answer(*files(tmp_path, built), "--layout", name)
    assert found["log"] == written.replace(shot, "")
    assert found["log"].endswith("nanoseconds: 1234567890\n** Stackshot Succeeded **\n")


# damage


def test_a_log_whose_page_is_missing_is_told(tmp_path):
    name = "10.9.5 x86_64"
    text = TEXT + "loaded kexts:\n" + "com.example.filler 1.0\n" * 400
    built, running, _, written = panicked(name, text=text)
    second = (running.variables["_debug_buf"] & -0x1000) + 0x1000
    where = files(tmp_path, built, built.dump(without=[second]))
    told = said(*where, "--layout", name, "--format", "json", status=3)
    found = json.loads(told.stdout)
    assert found["message"] == '"a kext went wrong: %d\\n"@driver.c:12'
    assert len(found["log"]) == len(written) - 0x1000
    assert f"0x1000 bytes at {second:#x} are" in told.stderr


@pytest.mark.parametrize("end", [0, 8, 1 << 62, -0x40])
def test_an_end_that_cannot_be_one(end, tmp_path):
    name = "10.9.5 x86_64"
    built, running, _, _ = panicked(name)
    buffer = running.variables["_debug_buf"]
    running.words(running.variables["_debug_buf_ptr"], (buffer + end) % (1 << 64) if end else 0)
    found = answer(*files(tmp_path, built, without_threads(built)), "--layout", name)
    assert found["evidence"] == ["panic string", "stack"]
    assert found["message"] is None
    assert found["log"] is None or len(found["log"]) == 8


def test_a_panic_string_that_is_missing(tmp_path):
    name = "10.9.5 x86_64"
    built, running, _, _ = panicked(name)
    running.words(running.variables["_panicstr"], 0xFFFFFF80FFFF0000)
    where = (*files(tmp_path, built), "--layout", name)
    found = answer(*where, status=3)
    assert "at 0xffffff80ffff0000" in found["format"]["unreadable"]
    assert found["message"] == '"a kext went wrong: %d\\n"@driver.c:12'  # the log has it
    running.words(running.variables["_debug_buf_ptr"], 0)
    table = said(*files(tmp_path, built), "--layout", name, status=3).stdout
    assert "message   ? (" in table


def test_what_cannot_be_told_is_not_denied(tmp_path):
    name = "10.9.5 x86_64"
    built, running, _, _ = panicked(name)
    running.words(running.variables["_panicstr"], 0xFFFFFF80FFFF0000)
    running.words(running.variables["_debug_buf_ptr"], 0)
    running.processors([built.process(1)["threads"][0][0]])
    found = answer(*files(tmp_path, built), "--layout", name, status=3)
    assert found["evidence"] == []
    assert "unreadable" in found["panicked"]
    table = said(*files(tmp_path, built), "--layout", name, status=3).stdout.split("\n")
    assert table[0] == "panicked  not known"


def test_a_stack_that_is_cut_before_panic_denies_nothing(tmp_path):
    """Where the frames are missing that would tell, and nothing else tells."""
    name = "10.9.5 x86_64"
    built, running, _, _ = panicked(name)
    for variable in ("_panicstr", "_debug_buf_ptr"):
        running.words(running.variables[variable], 0)
    whole = files(tmp_path, built, without_threads(built))
    found = answer(*whole, "--layout", name)
    assert found["evidence"] == ["stack"]
    frame = int(found["backtrace"]["frames"][1]["fp"], 16)
    (tmp_path / "core").write_bytes(without_threads(built, [frame]))
    found = answer(*whole, "--layout", name, status=3)
    assert found["evidence"] == []
    for field in ("panicked", "thread", "cpu", "backtrace"):
        assert "unmapped" in found[field]["unreadable"], field
    table = said(*whole, "--layout", name, status=3).stdout.split("\n")
    assert table[0] == "panicked  not known"
    assert table[1].startswith("process   ? (the stack: ")


def test_what_the_log_says_does_not_reach_the_terminal(tmp_path):
    name = "10.9.5 x86_64"
    built, _, _, _ = panicked(name, text="panic(cpu 0 caller 0x1): \x1b[31mred\x1b[0m\n")
    out = said(*files(tmp_path, built), "--layout", name).stdout
    assert "\x1b" not in out
    assert r"message   \x1b[31mred\x1b[0m" in out


@pytest.mark.parametrize(
    "text",
    [
        "panic(cpu 0 caller 0x" * 50_000,
        "Panicked task 0x1: " * 50_000,
        "panic(cpu 0 caller 0x1): " + "\n" * 1_000_000,
        "lr: 0xfffffff007352d9c  " * 40_000,
        "0xffffff802dd2be50 : " * 50_000,
        "Boot : 0x1 0x2\n" * 60_000,
        "Process name corresponding to current thread (0x" * 20_000,
    ],
)
def test_a_hostile_log_takes_no_time(text):
    began = time.monotonic()
    assert isinstance(read_log(text), Said)
    assert time.monotonic() - began < 2


def test_an_empty_log_says_nothing():
    assert read_log("") == Said()


def test_calendar_before_boot_gives_no_uptime():
    assert read_log("Boot    : 0x10 0x0\nCalendar: 0x8 0x0\n").uptime is None


@pytest.mark.parametrize("name", ["10.4.11 i386", "10.9.5 x86_64", "15.5 arm64"])
def test_pages_missing_at_random(name, tmp_path):
    """1 % of the pages, at least one, 50 times: every command ends, and says what is missing."""
    built, _, _, _ = panicked(name)
    page = built.memory.page
    kernel_page = built.address("__mh_execute_header") & -page
    pages = [
        at
        for start, content in built.runs()
        for at in range(start, start + len(content), page)
        if at != kernel_page
    ]
    partial = 0
    for seed in range(50):
        gone = random.Random(seed).sample(pages, max(1, len(pages) // 100))
        where = files(tmp_path, built, built.dump(without=gone))
        for command in ("threads", "backtrace --all", "panic"):
            found = CliRunner().invoke(cli, [*command.split(), *where, "--layout", name])
            assert found.exit_code in (0, 1, 3), found.output
            assert isinstance(found.exception, (SystemExit, type(None))), found.exception
            assert (found.exit_code == 0) == (not found.stderr) or "warning" in found.stderr
            partial += found.exit_code == 3
    assert partial > 0


# corefiles

LOG = b'panic(cpu 0 caller 0x1000): "told outside"@x.c:1\nDebugger message: panic\n'


def test_a_corefile_without_its_kernel_answers_with_its_log(tmp_path):
    built = crash("10.13.6 x86_64")
    core = tmp_path / "corefile"
    core.write_bytes(rad_mac(LOG, [Member(b"kernel", gzip_member(built.core))]))
    told = said(str(core), "--format", "json")
    found = json.loads(told.stdout)
    assert found["message"] == '"told outside"@x.c:1'
    assert found["log_origin"] == f"{core}: panic log"
    assert found["backtrace"] is None
    assert "only the panic log was read" in told.stderr


def test_the_kernels_own_log_wins_over_the_corefiles(tmp_path):
    name = "10.14.6 x86_64"
    built, running, _, written = panicked(name)
    kernel, core = tmp_path / "kernel", tmp_path / "corefile"
    kernel.write_bytes(built.kernel)
    where = ("-N", str(kernel), "-M", str(core), "--layout", name)
    core.write_bytes(rad_mac(LOG, [Member(b"kernel", gzip_member(built.dump()))]))
    assert answer(*where)["log"] == written
    missing = built.dump(without=[running.variables["_debug_buf"]])
    core.write_bytes(rad_mac(LOG, [Member(b"kernel", gzip_member(missing))]))
    found = answer(*where)
    assert found["log"] == LOG.decode()
    assert found["message"] == '"told outside"@x.c:1'


def test_an_encrypted_log_is_told(tmp_path):
    name = "12.5 arm64"
    built, _, _, written = panicked(name)
    kernel, core = tmp_path / "kernel", tmp_path / "corefile"
    kernel.write_bytes(built.kernel)
    core.write_bytes(boss_mac(LOG, [Member(b"kernel", built.dump())], flags=AEA))
    told = said("-N", str(kernel), "-M", str(core), "--layout", name, status=3)
    assert "encrypted (AEA)" in told.stderr
    assert written.split("\n")[0] in told.stdout
