"""Walks of every kind of list, by types."""

from __future__ import annotations

import struct

import pytest

from kvmtool.arch.arm64 import ARM64E
from kvmtool.arch.x86 import X86_64
from kvmtool.errors import KvmError
from kvmtool.object import Object
from kvmtool.types.ctype import Compound, Field, Pointer, Void
from kvmtool.xnu.queues import Report
from kvmtool.xnu.walk import chain_of, walk_chain
from tests.builders.typed import INT, HandTypes, target_of

HEAD, NODES = 0xFFFFFF8000300000, [0xFFFFFF8000310000 + 0x40 * n for n in range(4)]
LINK = 8  # where a node has its link


def node_type(entry):
    """struct node { int key; entry link; }; the entry is made for it."""
    node = Compound("struct", "node", 24, lambda: fields)
    fields = [Field("key", INT, 0), Field("link", entry(node), LINK)]
    return node


def entry_of(member):
    """A LIST_ENTRY and the like: next and prev pointers to the element."""

    def make(node):
        return Compound("struct", None, 16, [Field(member, Pointer(node, 8), 0)])

    return make


QUEUE = Compound("struct", "queue_entry", 16, lambda: _QUEUE_FIELDS)
_QUEUE_FIELDS = [Field("next", Pointer(QUEUE, 8), 0), Field("prev", Pointer(QUEUE, 8), 8)]


def walked(links, node, head_type, *, how=("link",), arch=X86_64, sign=lambda pointer: pointer):
    """The numbers of the nodes that a walk meets, and its report.

    `links` are (address, next, prev) of the head and the nodes.
    """
    runs = {at: struct.pack("<2Q", sign(after), before) for at, after, before in links}
    target = target_of(arch, runs, HandTypes(arch, {"node": node, "queue_entry": QUEUE}))
    report = Report()
    chain = chain_of(target, Object(target, head_type, HEAD), *how)
    found = [element.address for element in walk_chain(target, chain, "the list", report, 100)]
    return [NODES.index(address) for address in found], report


def straight(ends=0, into=0):
    """Head → 0 → 1 → 2 → 3 → ends, the links pointing `into` bytes into nodes."""
    targets = [node + into for node in NODES]
    places = [HEAD, *(node + LINK for node in NODES)]
    before = [targets[-1], ends, *targets]
    return list(zip(places, [*targets, ends], before, strict=False))


@pytest.mark.parametrize(
    ("first", "after"),
    [
        ("lh_first", "le_next"),
        ("slh_first", "sle_next"),
        ("stqh_first", "stqe_next"),
        ("tqh_first", "tqe_next"),
    ],
)
@pytest.mark.parametrize("path", ["link", "link.{after}"])
def test_lists_of_queue_h(first, after, path):
    node = node_type(entry_of(after))
    head = Compound("struct", "head", 16, [Field(first, Pointer(node, 8), 0)])
    how = (path.format(after=after),)
    assert walked(straight(), node, head, how=how)[0] == [0, 1, 2, 3]
    found, report = walked([(HEAD, 0, 0)], node, head, how=how)
    assert (found, report.partial) == ([], False)


def test_a_circleq_ends_at_its_head():
    node = node_type(entry_of("cqe_next"))
    head = Compound("struct", "head", 16, [Field("cqh_first", Pointer(node, 8), 0)])
    found, report = walked(straight(ends=HEAD), node, head)
    assert (found, report.partial) == ([0, 1, 2, 3], False)


@pytest.mark.parametrize("into", [0, LINK])
@pytest.mark.parametrize("how", [("link", "node"), (None, "node.link"), (None, "struct node.link")])
def test_mach_queues_of_either_kind(into, how):
    """queue_enter's links point at elements, enqueue's at the chain inside: prev tells."""
    node = node_type(lambda node: QUEUE)
    found, report = walked(straight(ends=HEAD, into=into), node, QUEUE, how=how)
    assert (found, report.partial) == ([0, 1, 2, 3], False)
    found, report = walked([(HEAD, HEAD, HEAD)], node, QUEUE, how=how)
    assert (found, report.partial) == ([], False)


def test_a_pointer_to_the_first_element_will_do():
    node = node_type(entry_of("le_next"))
    assert walked(straight(), node, Pointer(node, 8))[0] == [0, 1, 2, 3]
    found, report = walked(straight(ends=NODES[0]), node, Pointer(node, 8))
    assert found == [0, 1, 2, 3]
    assert report.notes == ["the list: back at the first element, the list is a ring"]
    assert not report.partial


def test_a_list_with_a_head_may_not_run_in_a_circle():
    node = node_type(entry_of("le_next"))
    head = Compound("struct", "head", 16, [Field("lh_first", Pointer(node, 8), 0)])
    for back in (NODES[0], NODES[2]):
        found, report = walked(straight(ends=back), node, head)
        assert found == [0, 1, 2, 3]
        reason = f"{back:#x} was met before (the list runs in a circle)"
        assert report.stops == [f"the list: stopped after 4 elements: {reason}"]


def test_a_torn_list_says_where():
    node = node_type(entry_of("le_next"))
    head = Compound("struct", "head", 16, [Field("lh_first", Pointer(node, 8), 0)])
    found, report = walked(straight()[:3], node, head)
    assert found == [0, 1, 2]
    place = NODES[2] + LINK
    assert report.stops == [
        f"the list: stopped after 3 elements: the link at {place:#x} is unmapped"
    ]


def test_signed_links_and_links_in_wrappers():
    def entry(node):
        smr = Compound("struct", "smr", 8, [Field("__ptr", Pointer(node, 8), 0)])
        return Compound("struct", None, 16, [Field("le_next", smr, 0)])

    node = node_type(entry)
    head = Compound("struct", "head", 16, [Field("lh_first", Pointer(node, 8), 0)])
    found, _ = walked(
        straight(), node, head, arch=ARM64E, sign=lambda at: at and at ^ 0x0012_0000_0000_0000
    )
    assert found == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("head", "how", "complaint"),
    [
        (INT, ("link",), "int is no list"),
        (Pointer(Void(), 8), ("link",), "does not tell the elements' type"),
        (QUEUE, (), "which member of struct queue_entry has the next pointer"),
        (QUEUE, ("key", "node"), "int key has no next pointer"),
        (QUEUE, ("lnk", "node"), r"struct node\.lnk not found"),
        (QUEUE, (None, "nod.link"), "nod not found"),
        (QUEUE, (None, "!"), "expected TYPE or TYPE.MEMBER"),
    ],
)
def test_what_is_no_list(head, how, complaint):
    node = node_type(entry_of("le_next"))
    with pytest.raises(KvmError, match=complaint):
        walked(straight(), node, head, how=how)
