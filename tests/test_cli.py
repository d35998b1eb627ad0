"""The commands as a user types them: output, streams, exit status."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result
from inputs import DUMPS, oracle, plain_core, real, truth

from kvmtool import sample
from kvmtool.cli import COMMANDS, cli

if TYPE_CHECKING:
    from pathlib import Path

FIELDS = (
    *("pid", "ppid", "pgid", "sid", "uid", "ruid", "svuid", "gid", "rgid", "groups", "tty"),
    *("login", "stat", "flag", "start", "nice", "xstat", "zombie", "comm", "name"),
    *("address", "task", "ucred"),
)


def run(*arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(cli, arguments, env={"KVMTOOL_KERNEL": "", "KVMTOOL_CORE": ""})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, (result.output, result.stderr)
    return result


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """-N and -M of the embedded sample."""
    folder = str(tmp_path_factory.mktemp("sample"))
    sample.write(folder)
    return ["-N", os.path.join(folder, "mach_kernel"), "-M", os.path.join(folder, "core")]


def of(dump: str) -> list[str]:
    return ["-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump)]


def crash() -> list[str]:
    kernel = real("machine/x86_64-xnu-2422.115.4.mach_kernel")
    return ["-N", kernel, "-M", real("machine/crash.kdp-core")]


# the article


def test_the_articles_symbol(machine: list[str]) -> None:
    assert run("nlist", "_cdevsw", *machine).stdout == "0x441720 D _cdevsw\n"


def test_the_articles_pointer(machine: list[str]) -> None:
    assert run("read", "0x441990", "4", "-t", "x4", *machine).stdout.split()[1] == "3bd0214f"
    assert run("read", "_cdevsw+0x270", "4", "--raw", *machine).stdout_bytes == b"\x4f\x21\xd0\x3b"


def test_options_stand_before_or_after_the_command(machine: list[str]) -> None:
    before = run(*machine, "nlist", "cdevsw").stdout
    assert before == run("nlist", "cdevsw", *machine).stdout


def test_core_as_the_first_operand_of_procs(machine: list[str]) -> None:
    kernel, core = machine[:2], machine[3]
    assert run("procs", core, *kernel).stdout == run("procs", *machine).stdout


# nlist


def test_misses_decide_the_status_of_nlist(machine: list[str]) -> None:
    some = run("nlist", "_cdevsw", "_cdevs", *machine, status=3)
    assert some.stdout == "0x441720 D _cdevsw\n"
    assert "symbol _cdevs not found (did you mean _cdevsw" in some.stderr
    assert run("nlist", "nothing_like_it", *machine, status=1).stdout == ""


def test_raw_value_is_without_the_slide() -> None:
    where = of("x86_64-10.8.5")
    slid = json.loads(run("nlist", "_cdevsw", *where, "--format", "json").stdout)
    raw = run("nlist", "_cdevsw", "--raw-value", *where).stdout.split()[0]
    assert slid[0]["address"] == hex(truth("x86_64-10.8.5")["cdevsw"]["address"])
    assert int(raw, 16) == truth("x86_64-10.8.5")["cdevsw"]["address"] - 0x3200000
    assert slid[0]["n_value"] == raw


@pytest.mark.parametrize("dump", DUMPS)
def test_nlist_of_every_planted_symbol(dump: str) -> None:
    planted = truth(dump)["symbols"]
    rows = json.loads(run("nlist", *planted, *of(dump), "--format", "json").stdout)
    assert {row["name"].lstrip("_"): int(row["address"], 16) for row in rows} == {
        name.lstrip("_"): address for name, address in planted.items()
    }


def test_nlist_of_the_corefile_against_its_oracle() -> None:
    where = ["-N", real("machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel")]
    where += ["-M", real("machine/armc.corefile")]
    symbols = oracle("armc")["symbols"]
    rows = json.loads(run("nlist", *symbols, *where, "--format", "json").stdout)
    assert {row["name"]: row["address"] for row in rows} == {
        name: symbol["addr"] for name, symbol in symbols.items()
    }


# symbols


@pytest.mark.skipif(shutil.which("llvm-nm") is None, reason="llvm-nm is not installed")
@pytest.mark.parametrize(
    "name",
    [
        "kernels/arm64-xnu-4903.221.2-release.macho",
        "kernels/arm64e-xnu-6153.11.26-release.macho",
        "kexts/i386-KernelMemoryAccess",
        "objects/ppc-xnu-792.25.20-bsd.o",
        "objects/ppc-xnu-792.25.20-kern_proc.o",
        "objects/x86_64-xnu-2422.115.4-kern_proc.o",
    ],
)
def test_bsd_format_equals_llvm_nm(name: str) -> None:
    path = real(name)
    theirs = subprocess.run(["llvm-nm", path], capture_output=True, check=True).stdout
    ours = run("symbols", "-N", path).stdout_bytes
    assert sorted(ours.splitlines()) == sorted(theirs.splitlines())


def test_symbols_by_pattern_and_format(machine: list[str]) -> None:
    assert "00441720 D _cdevsw" in run("symbols", "cdevsw", *machine).stdout.splitlines()
    globbed = run("symbols", "_?devsw", "-j", *machine).stdout.split()
    assert globbed == ["_bdevsw", "_cdevsw"]
    posix = run("symbols", "_cdevsw", "--format", "posix", *machine).stdout
    assert posix == "_cdevsw D 441720 0\n"
    row = json.loads(run("symbols", "_cdevsw", "--format", "json", *machine).stdout)[0]
    assert (row["address"], row["type"], row["name"]) == ("0x441720", "D", "_cdevsw")


# read


def test_a_hole_refuses_the_whole_read() -> None:
    where = of("i386-10.5.8")
    first = truth("i386-10.5.8")["formats"]["core.macho"]["table"][0]
    edge = first["vmaddr"] + first["size"]
    result = run("read", hex(edge - 8), "16", *where, status=1)
    assert result.stdout == ""
    assert f"kernel address {edge:#x} is unmapped" in result.stderr


def test_partial_and_zero_fill_do_what_they_say() -> None:
    where = of("i386-10.5.8")
    first = truth("i386-10.5.8")["formats"]["core.macho"]["table"][0]
    edge = first["vmaddr"] + first["size"]
    tail = run("read", hex(edge - 8), "8", "--raw", *where).stdout_bytes
    asked = ["read", hex(edge - 8), "16", "--raw", *where]
    assert run(*asked, "--partial", status=3).stdout_bytes == tail
    assert run(*asked, "--zero-fill", status=3).stdout_bytes == tail + bytes(8)
    shown = run(*asked[:3], *where, "--partial", status=3)
    assert "unreadable" in shown.stdout
    assert "0x8 of 0x10 bytes" in shown.stderr


def test_read_of_the_crash_core_against_its_oracle() -> None:
    text = oracle("crash")["strings"]["_version"]
    assert run("read", "_version", str(len(text)), "--raw", *crash()).stdout == text
    for name, symbol in oracle("crash")["symbols"].items():
        if symbol["size"] in (4, 8):
            out = run("read", name, str(symbol["size"]), "-t", f"x{symbol['size']}", *crash())
            assert int(out.stdout.split()[1], 16) == int(symbol["value"], 16), name


def test_memory_of_a_core_needs_no_kernel() -> None:
    table = truth("x86_64-10.8.5")["formats"]["core.macho"]["table"]
    address = hex(table[0]["vmaddr"])
    core = ["-M", plain_core("x86_64-10.8.5")]
    assert run("read", address, "4", "--raw", *core).stdout_bytes == b"\xcf\xfa\xed\xfe"
    assert "with -N" in run("read", "_version", "4", *core, status=1).stderr


def test_units_are_checked(machine: list[str]) -> None:
    assert "expected one of" in run("read", "0x441990", "4", "-t", "q9", *machine, status=2).stderr


# procs


def expected(proc: dict, sessions: dict) -> dict:
    """A process of truth.json in the form that JSON has it."""
    row = {name: proc[name] for name in FIELDS if name not in ("start", "login")}
    for name in ("address", "task", "ucred"):
        row[name] = None if row[name] is None else hex(row[name])
    # truth's own `login` is the owner's account; what the dump holds is the session's s_login
    row["login"] = sessions[proc["sid"]]
    return row


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_procs_equal_the_truth(dump: str, packed: bool) -> None:
    where = of(dump)
    if packed:
        where[3] = real(f"dumps/{dump}/core.macho.gz")
    known = truth(dump)
    sessions = {session["sid"]: session["login"] for session in known["sessions"]}
    by_pid = {proc["pid"]: proc for proc in known["processes"]}
    result = run("procs", "--format", "json", *where)
    assert result.stderr == ""
    rows = json.loads(result.stdout)
    assert [row["pid"] for row in rows] == known["allproc"] + known["zombproc"]
    for row in rows:
        proc = by_pid[row["pid"]]
        wanted = expected(proc, sessions)
        assert {name: row[name] for name in wanted} == wanted
        assert row["start_raw"] == proc["start"]
        assert row["start"].startswith("2017-07-1")
        assert row["start"].endswith(f".{proc['start'][1]:06d}Z")


def test_procs_of_the_core_xnu_wrote() -> None:
    rows = json.loads(run("procs", "--format", "json", *crash()).stdout)
    known = oracle("crash")["procs"]
    assert [row["pid"] for row in rows] == [proc["p_pid"] for proc in known]
    for row, proc in zip(rows, known, strict=True):
        assert row["address"] == proc["addr"]
        assert row["ppid"] == proc["p_ppid"]
        assert (row["uid"], row["ruid"], row["gid"]) == (
            proc["p_uid"],
            proc["p_ruid"],
            proc["p_gid"],
        )
        assert (row["pgid"], row["sid"]) == (proc["pg_id"], proc["s_sid"])
        assert (row["flag"], row["lflag"], row["stat"]) == (
            proc["p_flag"],
            proc["p_lflag"],
            proc["p_stat"],
        )
        assert (row["comm"], row["name"], row["nice"]) == (
            proc["p_comm"],
            proc["p_name"],
            proc["p_nice"],
        )
        assert row["task"] == (None if proc["task"] == "0x0" else proc["task"])
        assert row["login"] == proc["s_login"]


def test_the_same_without_the_kernels_file() -> None:
    where = crash()
    with_file = run("procs", "--format", "json", *where).stdout
    assert run("procs", "--format", "json", *where[2:]).stdout == with_file


def test_procs_refuse_a_kernel_no_layout_fits() -> None:
    kernel = real("machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel")
    result = run("procs", "-N", kernel, "-M", real("machine/armc.corefile"), status=1)
    assert result.stdout == ""
    assert "no structure layout fits this kernel" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize("damage", ["core.truncated.macho", "core.missing-page.macho"])
def test_damage_costs_only_itself(dump: str, damage: str) -> None:
    where = of(dump)
    where[3] = real(f"dumps/{dump}/damaged/{damage}")
    result = run("procs", "--format", "json", *where, status=3)
    known = truth(dump)
    pids = {row["pid"] for row in json.loads(result.stdout) if isinstance(row["pid"], int)}
    lost = known["formats"]["damaged"][damage]
    everyone = set(known["allproc"] + known["zombproc"])
    whole = set(lost.get("procs_whole", everyone - set(lost.get("procs_touched", ()))))
    assert whole <= pids <= everyone
    assert "allproc: stopped after" in result.stderr


@pytest.mark.parametrize("dump", DUMPS)
def test_a_circle_ends(dump: str) -> None:
    where = of(dump)
    where[3] = real(f"dumps/{dump}/damaged/core.cyclic.macho")
    result = run("procs", "--format", "json", *where, status=3)
    known = truth(dump)
    pids = [row["pid"] for row in json.loads(result.stdout)]
    assert sorted(pids) == sorted(known["allproc"] + known["zombproc"])
    assert "the list runs in a circle" in result.stderr


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize("damage", ["truncated-early.macho", "truncated.macho.gz"])
def test_a_core_cut_off_early_says_where(dump: str, damage: str) -> None:
    where = of(dump)
    where[3] = real(f"dumps/{dump}/damaged/core.{damage}")
    result = run("procs", "--format", "json", *where, status=3)
    json.loads(result.stdout)
    assert "allproc: stopped after" in result.stderr
    assert "are absent" in result.stderr


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize(
    "damage",
    [
        "empty",
        "header-only.macho",
        "lc-size-huge.macho",
        "lc-size-zero.macho",
        "ncmds.macho",
        "sizeofcmds.macho",
    ],
)
def test_nonsense_is_one_clear_line(dump: str, damage: str) -> None:
    where = of(dump)
    path = where[3] = real(f"dumps/{dump}/damaged/core.{damage}")
    result = run("procs", *where, status=1)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert path in result.stderr
    assert "at offset 0x" in result.stderr


def test_wrong_kernel_names_both() -> None:
    where = ["-N", of("x86_64-10.8.5")[1], "-M", plain_core("x86_64-10.13.6")]
    result = run("procs", *where, status=1)
    for name in (where[1], where[3], "A9E0A06D-7E2D-528B-8058-40AB5852B840", "34589CF2"):
        assert name in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_filters(machine: list[str]) -> None:
    def pids(*options: str) -> list[int]:
        out = run("procs", "--format", "json", *options, *machine).stdout
        return [row["pid"] for row in json.loads(out)]

    everyone = pids()
    assert pids("--pid", "1") == [1]
    assert set(pids("--user", "501")) < set(everyone)
    tty = pids("--tty", "ttyp2")
    assert tty
    assert tty == pids("--tty", "/dev/ttyp2") == pids("--tty", "p2")
    assert set(pids("--session", "0")) >= {0}


def test_columns_beside_the_usual_and_all_of_them(machine: list[str]) -> None:
    def names(*options: str) -> list[str]:
        out = run("devsw", "--format", "csv", *options, *machine).stdout
        return out.splitlines()[0].split(",")

    def headings(*options: str) -> list[str]:
        return run("procs", "--pid", "1", *options, *machine).stdout.splitlines()[0].split()

    assert headings("-o", "+ppid,wchan") == [*headings(), "WCHAN"]
    assert headings("-o", "+wchan=", "-o", "sid=SESSION") == [*headings(), "SESSION"]
    assert names("-o", "all") == names()
    assert names("-o", "read,all")[:2] == ["read", "kind"]
    assert sorted(names("-o", "read,all")) == sorted(names())
    usual = run("devsw", *machine).stdout.splitlines()[0].split()
    assert len(run("devsw", "-o", "all", *machine).stdout.splitlines()[0].split()) > len(usual)


def test_tree_puts_children_below_parents(machine: list[str]) -> None:
    out = run("procs", "--tree", "-o", "pid,ppid", "--format", "jsonl", *machine).stdout
    seen: set[int] = set()
    for line in out.splitlines():
        row = json.loads(line)
        assert row["ppid"] in seen or row["pid"] == 0
        seen.add(row["pid"])
    drawn = run("procs", "--tree", "-o", "command", *machine).stdout.splitlines()
    assert drawn[1:3] == ["kernel_task", "`- launchd"]


def test_formats_agree(machine: list[str]) -> None:
    rows = json.loads(run("procs", "--format", "json", *machine).stdout)
    lines = run("procs", "--format", "jsonl", *machine).stdout.splitlines()
    assert [json.loads(line) for line in lines] == rows
    table = csv.DictReader(io.StringIO(run("procs", "--format", "csv", *machine).stdout))
    assert [(row["pid"], row["address"]) for row in table] == [
        (str(row["pid"]), row["address"]) for row in rows
    ]


# info


@pytest.mark.parametrize("dump", DUMPS)
def test_info_tells_slide_uuid_and_layout(dump: str) -> None:
    facts = json.loads(run("info", *of(dump), "--format", "json").stdout)
    known = truth(dump)
    assert facts["kernel"]["uuid"] == known["uuid"]
    assert facts["slide"]["slide"] == hex(known["slide"])
    assert facts["slide"]["version"] == known["banner"]
    assert facts["core"]["segment_count"] == known["formats"]["core.macho"]["segments"]
    assert facts["layouts"][-1]["fits"] is True
    pc = "eip" if known["arch"] == "i386" else "rip"
    thread = facts["threads"][0]
    assert thread["registers"][pc] == hex(known["cpu"]["registers"][pc])
    assert thread["at"].startswith(f"_{known['cpu']['functions'][0]}+")


def test_info_of_the_corefile() -> None:
    kernel = real("machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel")
    where = ["-N", kernel, "-M", real("machine/armc.corefile")]
    facts = json.loads(run("info", *where, "--format", "json").stdout)
    known = oracle("armc")["symbols"]
    assert [member["name"] for member in facts["container"]["files"]] == ["kernel"]
    assert "IOFindBSDRoot: specified root memory device" in facts["container"]["panic_log"]
    assert facts["core"]["version"] == known["_version"]["value"]
    assert facts["core"]["uuid"] == known["_kernel_uuid_string"]["value"]
    assert facts["core"]["said_by"]["uuid"] == "LC_IDENT"
    assert facts["slide"]["kernel_address"] == known["_vm_kernel_stext"]["value"]
    assert facts["threads"][0]["at"].startswith("_DebuggerTrapWithState+")
    text = run("info", *where).stdout
    assert "panic log:" in text
    assert "no structure layout" not in text


# the rest


def test_every_command_has_help_with_an_example() -> None:
    for name in COMMANDS:
        text = run(name, "--help").stdout
        assert "Example:" in text, name
        assert f"kvmtool {name}" in text, name


def test_no_kernel_says_what_to_type() -> None:
    result = run("nlist", "_cdevsw", status=1)
    assert "kvmtool demo DIR" in result.stderr


def test_a_missing_file_is_one_line() -> None:
    result = run("nlist", "_cdevsw", "-N", "/nowhere/mach_kernel", status=1)
    assert result.stderr == "kvmtool: /nowhere/mach_kernel: No such file or directory\n"


def test_a_core_named_as_the_kernel_is_noticed(machine: list[str]) -> None:
    result = run("nlist", "_cdevsw", "-N", machine[3], status=1)
    assert "expected a kernel's file: name it with -M" in result.stderr


def test_demo_writes_the_sample(tmp_path) -> None:
    folder = str(tmp_path / "sample")
    out = run("demo", folder).stdout
    assert "kvmtool nlist _cdevsw" in out
    assert sorted(os.listdir(folder)) == ["KernelMemoryAccess", "README.txt", "core", "mach_kernel"]


def test_the_machine_sample_answers_as_the_kernel_did_on_its_serial_line(tmp_path: Path) -> None:
    run("demo", "--machine", str(tmp_path))
    names = ["README.txt", "mach_kernel", "memory.lime", "serial.jsonl"]
    assert sorted(os.listdir(tmp_path)) == names
    opened = ["-N", str(tmp_path / "mach_kernel"), "-M", str(tmp_path / "memory.lime")]
    said = [json.loads(line) for line in (tmp_path / "serial.jsonl").read_text().splitlines()]

    symbols = {line["name"]: line["address"] for line in said if line["kind"] == "symbol"}
    found = json.loads(run(*opened, "nlist", *symbols, "--format", "json").stdout)
    assert {entry["name"]: entry["address"] for entry in found} == symbols

    told = {line["pid"]: line for line in said if line["kind"] == "process"}
    procs = json.loads(run(*opened, "procs", "--format", "json").stdout)
    shared = set.intersection(*(set(line) for line in told.values())) & set(procs[0])
    assert {"ppid", "uid", "groups", "login", "stat", "start_raw", "comm", "address"} < shared
    for proc in procs:
        assert {key: proc[key] for key in shared} == {key: told[proc["pid"]][key] for key in shared}
    assert len(procs) == len(told)


@pytest.mark.parametrize(("module", "tool"), [("lzma", "xz"), ("bz2", "bzip2")])
def test_a_packed_core_is_refused_with_what_unpacks_it(
    module: str, tool: str, machine: list[str], tmp_path: Path
) -> None:
    with open(machine[3], "rb") as file:
        packed = importlib.import_module(module).compress(file.read())
    (tmp_path / "core.packed").write_bytes(packed)
    result = run(*machine[:2], "-M", str(tmp_path / "core.packed"), "procs", status=1)
    assert f"; {tool} -d unpacks it" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_others_call_it_leads_to_a_command():
    """Someone who types ps is told procs; none of these names is a command of ours."""
    from kvmtool.cli import COMMANDS, ELSEWHERE

    assert set(ELSEWHERE.values()) <= COMMANDS.keys()
    assert not ELSEWHERE.keys() & COMMANDS.keys()
    found = run("ps", "-N", "mach_kernel", status=2)
    assert found.stdout == ""
    assert "no command 'ps': procs does that" in found.stderr
