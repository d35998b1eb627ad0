"""The tables of system calls, and the sysctl tree.

After bsd/sys/sysent.h, osfmk/kern/syscall_sw.h, bsd/sys/sysctl.h and bsd/kern/kern_newsysctl.c.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tests.builders.ground import Ground
    from tests.builders.heap import Record

# number -> (name, arguments); 0, syscall(2) itself, and the rest of the table are nosys
CALLS = {
    0: ("syscall", 0),
    1: ("exit", 1),
    2: ("fork", 0),
    3: ("read", 3),
    4: ("write", 3),
    5: ("open", 3),
    6: ("close", 1),
    7: ("wait4", 4),
    9: ("link", 2),
    10: ("unlink", 1),
    12: ("chdir", 1),
    13: ("fchdir", 1),
    14: ("mknod", 3),
    15: ("chmod", 2),
    16: ("chown", 3),
    20: ("getpid", 0),
}
TRAPS = {
    26: ("mach_reply_port", 0),
    28: ("task_self_trap", 0),
    31: ("mach_msg_trap", 7),
    32: ("mach_msg_overwrite_trap", 8),
    33: ("semaphore_signal_trap", 1),
    34: ("semaphore_signal_all_trap", 1),
    35: ("semaphore_signal_thread_trap", 2),
    36: ("semaphore_wait_trap", 1),
    37: ("semaphore_wait_signal_trap", 2),
    38: ("semaphore_timedwait_trap", 3),
    39: ("semaphore_timedwait_signal_trap", 4),
}
NSYSENT, NTRAPS = 40, 128

CTLTYPE = {"node": 1, "int": 2, "string": 3, "quad": 4, "opaque": 5}
RD, WR, LOCKED = 0x80000000, 0x40000000, 0x00800000
OID_AUTO = 100


class Leaf(NamedTuple):
    """A sysctl: its name, its generic handler's name ("" for one of its own), format, value."""

    name: str
    handler: str
    fmt: str
    value: int | str | bytes | None
    constant: bool = False  # the value stands in oid_arg2


TREE: dict[str, Any] = {
    "kern": (
        Leaf("ostype", "string", "A", "Darwin"),
        Leaf("osrelease", "string", "A", "13.4.0"),
        Leaf("maxproc", "int", "I", -1064),
        Leaf("ngroups", "int", "I", 16, constant=True),
        Leaf("proc", "", "S,proc", None),
        Leaf("wide", "quad", "Q", -(1 << 40)),
        Leaf("long", "long", "L", -2),
        Leaf("narrow", "int2quad", "Q", 77),
        Leaf("boottime", "opaque", "S,timeval", bytes(range(12))),
        {"ipc": (Leaf("maxsockbuf", "int", "I", 1 << 22),)},
    ),
    "hw": (Leaf("ncpu", "int", "I", 8),),
}


class Tables:
    """Plants them; each method returns its part of the truth."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._image = ground.image
        self._width = ground.memory.width

    def sysent(self) -> dict[str, Any]:
        """sysent with names; from xnu-3248 (10.11) on, when base_pri came, its symbol is stripped.

        {call; munger; int return type; i16 arguments; u16 bytes} by then, and in no debug kit.
        """
        ground, image, types = self._ground, self._image, self._ground.types
        named = types.has("thread", "priority")
        if named:
            size, members = types.layout.size("sysent"), ("sy_call", "sy_arg_munge32", "sy_narg")
            call, munger, narg = (types.offset("sysent", member) for member in members)
            table = image.table("_sysent", NSYSENT * size)
        else:
            size, call, munger, narg = 24, 0, 8, 20
            table = image.unnamed(NSYSENT * size)
        names = image.table("_syscallnames", NSYSENT * self._width)
        found = []
        for number in range(NSYSENT):
            name, arguments = CALLS.get(number, (f"#{number}", 0))
            handler = f"_{name}" if number in CALLS and number else "_nosys"
            at = table + number * size
            function = image.function(handler)
            image.init_pointer(at + call, function, code=True)
            munge = self._munger(arguments)
            if munge:
                image.init_pointer(at + munger, munge, code=True)
            image.init(at + narg, struct.pack("<H", arguments))
            image.init_pointer(names + number * self._width, ground.text(name))
            found.append(
                {"number": number, "name": name, "arguments": arguments, "address": at}
                | {"handler": function, "handler_name": handler, "munge": munge}
            )
        image.init(image.table("_nsysent", 4, align=4), struct.pack("<I", NSYSENT))
        return {"sysent": found}

    def traps(self) -> dict[str, Any]:
        """mach_trap_table in the shape of its time (see `_trap_shape`)."""
        image = self._image
        size, function_at, munge_at = self._trap_shape()
        table = image.table("_mach_trap_table", NTRAPS * size)
        found = []
        for number in range(NTRAPS):
            name, arguments = TRAPS.get(number, ("kern_invalid", 0))
            at = table + number * size
            function = image.function(f"_{name}")
            image.init(at, struct.pack("<I", arguments))
            image.init_pointer(at + function_at, function, code=True)
            munge = self._munger(arguments) if munge_at is not None else None
            if munge and munge_at is not None:
                image.init_pointer(at + munge_at, munge, code=True)
            found.append(
                {"number": number, "name": None, "arguments": arguments, "address": at}
                | {"handler": function, "handler_name": f"_{name}", "munge": munge}
            )
        image.init(image.table("_mach_trap_count", 4, align=4), struct.pack("<I", NTRAPS))
        return {"traps": found}

    def _munger(self, arguments: int) -> int:
        return self._image.function("_munge_" + "w" * arguments) if arguments else 0

    def _trap_shape(self) -> tuple[int, int, int | None]:
        """(size, offset of the function, of the munger).

        xnu-792, 1228: {int count; function; boolean_t stack; int unused}; 1456 to 2050: {int count;
        function}; 2422 on: {int count; function; munger; int words}; arm64 without the munger;
        later {u8 count, words, returns a port; function; munger}.
        """
        types = self._ground.types
        if self._width == 4:
            return (8, 4, None) if types.has("thread", "thread_id") else (16, 4, None)
        if types.offset("sysent", "sy_call") == 8 or self._image.arch == "arm64":
            return (16, 8, None)
        return (24, 8, 16) if types.has("zone", "z_self") else (32, 8, 16)

    def sysctls(self) -> dict[str, Any]:
        """sysctl__children and all below it."""
        head = self._image.variable("_sysctl__children", self._width)
        found: list[dict[str, Any]] = []
        for number, (name, below) in enumerate(TREE.items(), 1):
            self._node(head, number, name, below, (), (), found)
        return {"sysctl": found}

    def _node(
        self,
        head: int,
        number: int,
        name: str,
        below: tuple[Any, ...],
        names: tuple[str, ...],
        mib: tuple[int, ...],
        found: list[dict[str, Any]],
    ) -> None:
        children = self._ground.zones["kalloc"].alloc(self._width)
        oid = self._oid(head, number, name, "node", "N")
        oid.ptr("oid_arg1", children)
        names, mib = (*names, name), (*mib, number)
        for place, item in enumerate(below, OID_AUTO):
            if isinstance(item, dict):
                for inner, more in item.items():
                    self._node(children, place, inner, more, names, mib, found)
            else:
                found.append(self._leaf(children, place, item, names, mib))

    def _leaf(
        self, head: int, number: int, leaf: Leaf, names: tuple[str, ...], mib: tuple[int, ...]
    ) -> dict[str, Any]:
        kinds = {"string": "string", "opaque": "opaque", "": "opaque", "int": "int"}
        kind = kinds.get(leaf.handler, "quad")
        oid = self._oid(head, number, leaf.name, kind, leaf.fmt)
        handler = f"_sysctl_handle_{leaf.handler}" if leaf.handler else f"_sysctl_{leaf.name}"
        function = self._image.function(handler)
        oid.ptr("oid_handler", self._ground.types.sign(function, oid.place("oid_handler")))
        if leaf.constant:
            assert isinstance(leaf.value, int)
            oid.u32("oid_arg2", leaf.value)
        elif leaf.value is not None:
            data = self._stored(leaf)
            oid.ptr("oid_arg1", self._ground.bytes(data))
            oid.u32("oid_arg2", len(data))
        return {
            "name": ".".join((*names, leaf.name)),
            "mib": [*mib, number],
            "address": oid.address,
            "type": kind,
            "fmt": leaf.fmt,
            "handler": function,
            "handler_name": handler,
            "value": leaf.value.hex() if isinstance(leaf.value, bytes) else leaf.value,
        }

    def _stored(self, leaf: Leaf) -> bytes:
        if isinstance(leaf.value, str):
            return leaf.value.encode() + b"\0"
        if isinstance(leaf.value, bytes):
            return leaf.value
        assert leaf.value is not None
        sizes = {"quad": 8, "long": self._width}
        return leaf.value.to_bytes(sizes.get(leaf.handler, 4), "little", signed=True)

    def _oid(self, head: int, number: int, name: str, kind: str, fmt: str) -> Record:
        """A new oid at the end of the list that begins at `head`."""
        ground = self._ground
        oid = ground.record("sysctl_oid")
        link = ground.types.offset("sysctl_oid", "oid_link")
        place = head
        while following := int.from_bytes(ground.memory.read(place, self._width), "little"):
            place = following + link
        ground.memory.put_pointer(place, oid.address)
        oid.ptr("oid_parent", head)
        oid.u32("oid_number", number)
        oid.u32("oid_kind", CTLTYPE[kind] | RD | LOCKED | (0 if kind == "node" else WR))
        oid.ptr("oid_name", ground.text(name))
        oid.ptr("oid_fmt", ground.text(fmt))
        return oid
