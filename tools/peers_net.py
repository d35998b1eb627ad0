"""Compare files and net with Volatility 3's mac.lsof, mac.netstat and mac.ifconfig, row by row.

On the two dumps whose kernels were slid, and on the machine that really ran under KASLR, for which
the kernel's own types (CTF) are written down as Volatility wants them. What it gets wrong is set
aside by name:

- OFFSET: addresses lose their upper 16 bits.
- STATE: CLOSED has no name; SYN_RCVD, FIN_WAIT_1 and FIN_WAIT_2 are spelt otherwise.
- UNBOUND: a local socket without a path is a row that names nothing.
- PATH END: a path is read on behind the length that its sockaddr_un says.
- IPV6: no socket of IPv6 is listed but on a Mac: its family is compared with the host's AF_INET6.
- VOLUME: every path begins with the name of the root volume, where its vnode has that.
- LINK: an interface's link address is listed as an IP address.
- EMPTY: a file whose path cannot be told is not listed.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests"), os.path.join(ROOT, "tools")]

import peers  # noqa: E402

if TYPE_CHECKING:
    from kvmtool.types.ctype import CType, Enum
    from kvmtool.types.model import TypeTable

MACHINE = "machine/x86_64-xnu-2422.115.4.mach_kernel"
CTF = "types/x86_64-xnu-2422.115.4.ctfdata"
HEADS = {"allproc": "proclist", "tasks": "queue_entry", "ifnet_head": "ifnethead"}
SPELT = {"SYN_RECV": "SYN_RCVD", "FIN_WAIT1": "FIN_WAIT_1", "FIN_WAIT2": "FIN_WAIT_2"}
# both with their modules compiled, whatever the caller's environment says
ENVIRONMENT = {**os.environ, "PYTHONPYCACHEPREFIX": os.path.join(peers.PEERS, "pycache")}
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)
BASES = {
    "long int": "long",
    "long unsigned int": "unsigned long",
    "short int": "short",
    "short unsigned int": "unsigned short",
    "long long int": "long long",
    "long long unsigned int": "unsigned long long",
}


class Isf:
    """A kernel's types in the form of Volatility's symbol files."""

    def __init__(self, types: TypeTable) -> None:
        """All structures that have a tag, and those inside them."""
        self.types = types
        self.user: dict[str, Any] = {}
        self.enums: dict[str, Any] = {}
        self.bases: dict[str, Any] = {
            "pointer": {"size": 8, "signed": False, "kind": "int", "endian": "little"},
            "void": {"size": 0, "signed": False, "kind": "void", "endian": "little"},
        }
        self._unnamed: dict[int, str] = {}
        for name in types.source.names("tag"):
            found = types.source.find("tag", name)
            if found is not None:
                self.of(found)

    def of(self, ctype: CType) -> dict[str, Any]:
        """A type's description; structures and enumerations are noted on the way."""
        from kvmtool.types import ctype as c

        plain = c.unqualified(ctype)
        if isinstance(plain, c.Pointer):
            target = c.unqualified(plain.target)
            inner = self.of(target) if not isinstance(target, c.Function) else {"kind": "function"}
            return {"kind": "pointer", "subtype": inner}
        if isinstance(plain, c.Array):
            return {"kind": "array", "count": plain.count or 0, "subtype": self.of(plain.target)}
        if isinstance(plain, c.Compound):
            return {"kind": plain.kind, "name": self._compound(plain)}
        if isinstance(plain, c.Enum):
            return {"kind": "enum", "name": self._enum(plain, ctype.name)}
        if isinstance(plain, c.Base):
            return self._base(plain)
        return {"kind": "function"} if isinstance(plain, c.Function) else self._void()

    def _void(self) -> dict[str, Any]:
        return {"kind": "base", "name": "void"}

    def _base(self, base: Any) -> dict[str, Any]:
        name = BASES.get(base.name, base.name)
        kind = base.form if base.size else "void"
        one = {"size": base.size, "signed": base.signed, "kind": kind, "endian": "little"}
        self.bases.setdefault(name, one)
        return {"kind": "base", "name": name}

    def _compound(self, compound: Any) -> str:
        name = compound.tag or self._unnamed.setdefault(
            id(compound), f"unnamed_{len(self._unnamed)}"
        )
        if name not in self.user and compound.complete:
            entry = {"kind": compound.kind, "size": compound.size, "fields": {}}
            self.user[name] = entry
            self._keep = [*getattr(self, "_keep", ()), compound]  # ids stay taken
            entry["fields"] = dict(self._field(n, one) for n, one in enumerate(compound.fields))
        return str(name)

    def _field(self, number: int, field: Any) -> tuple[str, dict[str, Any]]:
        kind = self.of(field.type)
        if field.bit_size is not None:
            place = field.bit_offset or 0
            kind = {
                "kind": "bitfield",
                "bit_length": field.bit_size,
                "bit_position": place,
                "type": kind,
            }
        entry = {"type": kind, "offset": field.offset}
        if field.name is None:
            entry["anonymous"] = True
        return field.name or f"unnamed_field_{number}", entry

    def _enum(self, enum: Enum, typedef: str | None) -> str:
        name = enum.tag or typedef or f"unnamed_enum_{id(enum)}"
        self._base_of_enums()
        values = dict(enum.values)
        self.enums[name] = {"size": enum.size or 4, "base": "int", "constants": values}
        return name

    def _base_of_enums(self) -> None:
        one = {"size": 4, "signed": True, "kind": "int", "endian": "little"}
        self.bases.setdefault("int", one)


def write_machine(path: str) -> None:
    """The symbol file of the machine that ran, at `path`."""
    import base64

    import inputs

    import kvmtool

    with kvmtool.open(inputs.real(MACHINE), types=inputs.real(CTF)) as kvm:
        isf = Isf(kvm.layouts[0].table)
        symbols: dict[str, Any] = {
            one.name.removeprefix("_"): {"address": one.n_value} for one in kvm.symbols
        }
        banner = kvm.read(kvm.address("_version"), 256).split(b"\0")[0] + b"\0"
    symbols["version"]["constant_data"] = base64.b64encode(banner).decode()
    for name, struct in HEADS.items():
        symbols[name]["type"] = {"kind": "struct", "name": struct}
    found = {
        "metadata": {"format": "6.2.0", "producer": {"name": "kvmtool", "version": "0"}},
        "base_types": isf.bases,
        "user_types": isf.user,
        "enums": isf.enums,
        "symbols": symbols,
    }
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as out:
        json.dump(found, out)


def volume(where: list[str]) -> str:
    """The name of the root vnode, which VOLUME puts before every path."""
    found = subprocess.run(
        [sys.executable, "-m", "kvmtool", "print", "rootvnode->v_name", *where, "--format", "json"],
        capture_output=True,
        check=True,
    )
    return (json.loads(found.stdout)["meaning"] or "").strip('"')


def theirs(vol: str, symbols: str, image: str, plugin: str) -> list[dict[str, Any]]:
    """The rows of one of Volatility's plugins."""
    cache = os.path.join(symbols, "cache")  # another run may clear the common one
    os.makedirs(cache, exist_ok=True)
    command = [vol, "-q", "--cache-path", cache, "-s", symbols, "-f", image, "-r", "json", plugin]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"Volatility 3 failed on {image}:\n{done.stderr[-2000:]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("[") :])
    return rows


def ours(*args: str) -> list[dict[str, Any]]:
    """The rows of one of our commands."""
    command = [sys.executable, "-m", "kvmtool", *args, "--format", "json"]
    done = subprocess.run(command, capture_output=True, check=True, env=ENVIRONMENT)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def name_of(row: dict[str, Any]) -> str | None:
    """A descriptor as mac.lsof names it."""
    if row["path"] is not None:
        return str(row["path"])
    kinds = ("IPv4", "IPv6", "unix", "systm", "rte", "ndrv", "key", "sock")
    return "<socket>" if row["type"] in kinds else f"<{row['type'].lower()}>"


def files(where: list[str]) -> set[tuple[Any, ...]]:
    """files in the form of mac.lsof."""
    rows = (row for row in ours("files", *where) if isinstance(row["fd"], int))
    named = ((row["pid"], row["fd"], name_of(row)) for row in rows)
    return {row for row in named if row[2] is not None and row[2] != "<reg>"}


def connections(where: list[str]) -> set[tuple[Any, ...]]:
    """net in the form of mac.netstat: a row for each process with a descriptor."""
    found = set()
    for row in ours("net", *where):
        place = int(row["socket"], 16) & (1 << 48) - 1  # OFFSET
        for pid in row["pids"]:
            if row["proto"] == "unix" and row["local"] is not None:  # UNBOUND
                found.add((place, "UNIX", row["local"], 0, "", 0, "", pid))
            elif row["proto"] in ("tcp4", "udp4"):  # IPV6
                ends = (row["local_address"], row["local_port"])
                ends += (row["foreign_address"], row["foreign_port"])
                state = "" if row["state"] in (None, "CLOSED") else row["state"]  # STATE
                found.add((place, row["proto"][:3].upper(), *ends, state, pid))
    return found


def netstat(rows: list[dict[str, Any]], our: set[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    """mac.netstat's rows to compare with `our`."""
    names = ("Offset", "Proto", "Local IP", "Local Port", "Remote IP", "Remote Port", "State")
    paths = {row[0]: row[2] for row in our if row[1] == "UNIX"}
    found = set()
    for row in rows:
        values = [row[name] for name in names]
        if row["Proto"] == "UNIX":
            path = paths.get(row["Offset"])
            if path is None and not row["Local IP"].isprintable():  # UNBOUND, PATH END
                continue
            if path is not None and values[2].startswith(path):  # PATH END
                values[2] = path
            if not values[2]:  # UNBOUND
                continue
        values[6] = SPELT.get(values[6], values[6])
        found.add((*values, int(row["Process"].rpartition("/")[2])))
    return found


def interfaces(where: list[str]) -> set[tuple[Any, ...]]:
    """net --interfaces in the form of mac.ifconfig, those without addresses left out."""
    return {
        (row["name"], one["address"], (row["mac"] or "").upper(), "PROMISC" in row["options"])
        for row in ours("net", "--interfaces", *where)
        for one in row["addresses"]
    }


def ifconfig(rows: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    """mac.ifconfig's rows to compare; link addresses are told by standing in both columns."""
    return {
        (row["Interface"], row["IP Address"], row["Mac Address"] or "", row["Promiscuous"])
        for row in rows
        if row["IP Address"] not in ("", row["Mac Address"])  # LINK
    }


def compare(vol: str, name: str, folder: str, image: str, where: list[str]) -> bool:
    """Hold the three lists against each other."""
    root = volume(where)
    front = f"/{root}" if root else ""
    raw = ["-N", where[1], "-M", image, *where[4:]]
    files(raw)  # both fill their caches
    theirs(vol, folder, image, "mac.lsof")
    start = cpu()
    rows = theirs(vol, folder, image, "mac.lsof")
    middle = cpu()
    held = files(raw)
    took, our_took = middle - start, cpu() - middle
    lsof = {
        (row["PID"], row["File Descriptor"], row["File Path"].removeprefix(front))  # VOLUME
        for row in rows
    }
    connected = connections(where)
    listed = netstat(theirs(vol, folder, image, "mac.netstat"), connected)
    pairs = {
        "mac.lsof": (lsof, held),
        "mac.netstat": (listed, connected),
        "mac.ifconfig": (ifconfig(theirs(vol, folder, image, "mac.ifconfig")), interfaces(where)),
    }
    same = True
    for plugin, (their, our) in pairs.items():
        same &= their == our
        different = sorted(f"{'+' if row in our else '-'} {row}" for row in their ^ our)
        verdict = "agree" if their == our else "DIFFER (+ ours):\n  " + "\n  ".join(different)
        print(f"{name:16} {plugin:12} {len(our)} rows: {verdict}")
    ratio = f"{took / our_took:.1f} times ours ({our_took:.2f} s)"
    print(f"{name:16} mac.lsof     CPU time, caches warm: {ratio}")
    return same


def cpu() -> float:
    """CPU seconds of the processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    if not os.path.isdir(os.path.join(ROOT, "..", "shared", "data", "dumps")):
        print("the real dumps are not here (../shared/data): nothing to compare")
        return 0
    import inputs

    vol, same = peers.install(), True
    peers.TYPED.update(HEADS)
    for dump, why in peers.DUMPS.items():
        if why:
            print(f"{dump:16} left out: {why}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            peers.write_isf(folder, dump, inputs.truth(dump))
            where = ["-N", inputs.real(f"dumps/{dump}/mach_kernel")]
            where += ["-M", inputs.real(f"dumps/{dump}/mem.lime")]
            image = os.path.join(folder, "memory.raw")
            convert = [sys.executable, "-m", "kvmtool", "convert", image, "--to", "raw", *where]
            subprocess.run(convert, capture_output=True, check=True)
            same &= compare(vol, dump, folder, image, where)
    with tempfile.TemporaryDirectory() as folder:
        write_machine(os.path.join(folder, "mac", "machine.json"))
        image = inputs.real("machine/kaslr.raw")
        where = ["-N", inputs.real(MACHINE), "-M", image, "--types", inputs.real(CTF)]
        same &= compare(vol, "machine (KASLR)", folder, image, where)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
