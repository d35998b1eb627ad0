"""An object with what is in it, as a tree: built once, shown as a table, JSON or rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.arithmetic import is_bytes, is_scalar
from kvmtool.cli.natural import Forms, Natural, date_of
from kvmtool.object import Object
from kvmtool.types.ctype import Array, Compound, unqualified
from kvmtool.types.declare import declare
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

NODE_LIMIT = 1 << 16
_NAME_WIDTH = 40


class Node(NamedTuple):
    """`name` is that of the member, or "[3]"; `natural` the value of what has no `children`."""

    name: str
    object: Object
    natural: Natural
    children: list[Node]

    @property
    def type(self) -> str:
        """As C declares it."""
        return declare(self.object.type)


class Tree:
    """The tree below one object; counts what is unreadable and what was left out."""

    def __init__(self, found: Object, forms: Forms, depth: int, elements: int) -> None:
        """`depth` is how many structures inside one another are shown, `elements` of an array."""
        self._forms, self._elements = forms, elements
        self._nodes = 0
        self.unreadable = 0
        self.left_out = 0
        self.root = self._node("", found, depth)

    def _node(self, name: str, found: Object, depth: int) -> Node:
        self._nodes += 1
        plain = unqualified(found.type)
        if isinstance(plain, Compound) or _is_big(plain):
            if depth <= 0 or self._nodes > NODE_LIMIT:
                self.left_out += self._nodes > NODE_LIMIT
                return Node(name, found, Natural(None, "{…}", None), [])
            inner = [self._node(*part, depth - 1) for part in self._parts(found, plain)]
            return Node(name, found, Natural(None, "", date_of(found)), inner)
        if isinstance(plain, Array) and not is_bytes(plain.target):
            found = self._cut(found, plain)
        natural = self._forms.of(found, name)
        self.unreadable += isinstance(natural.value, Unreadable)
        return Node(name, found, natural, [])

    def _parts(self, found: Object, plain: Any) -> Iterator[tuple[str, Object]]:
        if isinstance(plain, Compound):
            yield from found.members()
            return
        count = plain.count or 0
        for index in range(min(count, self._elements)):
            if self._nodes > NODE_LIMIT:
                self.left_out += min(count, self._elements) - index
                break
            yield f"[{index}]", found[index]
        self.left_out += max(0, count - self._elements)

    def _cut(self, found: Object, array: Array) -> Object:
        """An array of numbers, no longer than wanted."""
        if (array.count or 0) <= self._elements:
            return found
        self.left_out += (array.count or 0) - self._elements
        return Object(self._forms.target, Array(array.target, self._elements), found.address)

    def lines(self) -> Iterator[str]:
        """The tree for a table: offset from the start, name, value, and what that means."""
        root = self.root
        if not root.children:
            yield str(root.natural)
            return
        meaning = f"  {root.natural.meaning}" if root.natural.meaning else ""
        yield f"{root.type} at {root.object.address:#x}, {root.object.size:#x} bytes{meaning}"
        rows = list(_rows(root, "", 0))[1:]
        width = min(_NAME_WIDTH, max(2 * (depth - 1) + len(n.name) for depth, _, n in rows))
        start = root.object.address
        for depth, _, node in rows:
            name = "  " * (depth - 1) + node.name
            bits = node.object.bit_field
            place = f"+{node.object.address - start:#06x}" + (f":{bits[0]}" if bits else "")
            yield f"  {place:<10} {name:<{width}}  {node.natural}".rstrip()

    def record(self) -> dict[str, Any]:
        """The tree for JSON: `value` nested; `meanings` are those of members, by dotted path."""
        root = self.root
        found: dict[str, Any] = {"type": root.type}
        if not root.object.is_value:
            found["address"] = f"{root.object.address:#x}"
        found |= {"value": _value(root), "meaning": root.natural.meaning}
        if root.children:
            inner = ((path, node.natural.meaning) for _, path, node in _rows(root, "", 0) if path)
            found["meanings"] = {path: meaning for path, meaning in inner if meaning}
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """The values one by one, for csv."""
        for _, path, node in _rows(self.root, "", 0):
            if not node.children:
                yield {
                    "address": None if node.object.is_value else node.object.address,
                    "name": path,
                    "type": node.type,
                    "value": node.natural.value,
                    "meaning": node.natural.meaning,
                }


def _is_big(plain: object) -> bool:
    """Whether it is an array whose elements take a line each."""
    if not isinstance(plain, Array) or plain.count is None:
        return False
    inner = unqualified(plain.target)
    return isinstance(inner, (Array, Compound)) or not is_scalar(inner)


def _rows(node: Node, path: str, depth: int) -> Iterator[tuple[int, str, Node]]:
    yield depth, path, node
    for child in node.children:
        dot = "." if path and not child.name.startswith("[") else ""
        yield from _rows(child, f"{path}{dot}{child.name}", depth + 1)


def _value(node: Node) -> Any:
    if not node.children:
        return node.natural.value
    if isinstance(unqualified(node.object.type), Array):
        return [_value(child) for child in node.children]
    return {child.name: _value(child) for child in node.children}
