"""Tables for people: cells in aligned columns, and what to do when the terminal is too narrow.

Piped, a table is plain text: two spaces between columns, nothing cut off, no trailing spaces. rich
is imported only when a terminal is too narrow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kvmtool.cli.color import bold, colored

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TextIO

    from rich.console import JustifyMethod

GAP = "  "
_BLOCK = 1000  # rows whose widths are found together; a later block can only widen the columns
_NARROWEST = 8  # cells; text cut shorter says nothing


class Table:
    """Lines of cells, written a block at a time, so that a long table needs little memory.

    On a terminal the widest text of a block that is too wide is cut, with an ellipsis, numbers
    never are; where even that would not do every row becomes a paragraph with a line per cell.
    Cells hold only characters that print.
    """

    def __init__(
        self, headings: Sequence[str], right: Sequence[bool], labels: Sequence[str], out: TextIO
    ) -> None:
        """`right` says which columns are right-aligned (and never cut).

        `labels` stand in paragraphs for headings that are empty; with no heading at all there is
        no line of headings.
        """
        self._headings = headings
        self._right = right
        self._labels = [heading or label for heading, label in zip(headings, labels, strict=True)]
        self._out = out
        self._terminal = out.isatty()
        self._widths = [width_of(heading) for heading in headings]
        self._head_due = any(headings)

    def write(self, lines: Iterable[list[str]]) -> None:
        """Write `lines`, each with a cell per column; those before an error are still written."""
        block: list[list[str]] = []
        try:
            for cells in lines:
                block.append(cells)
                if len(block) == _BLOCK:
                    written, block = block, []
                    self._write_block(written)
        finally:
            if block:
                self._write_block(block)
        if self._head_due:
            self._write_block([])

    def _write_block(self, block: list[list[str]]) -> None:
        for cells in block:
            self._widths = list(map(max, self._widths, map(width_of, cells)))
        if self._terminal:
            self._print(block)
        else:
            self._write_lines(block)
        self._head_due = False

    def _write_lines(self, block: list[list[str]]) -> None:
        if self._head_due:
            self._out.write(bold(self._line(self._headings), self._out) + "\n")
        self._out.writelines(self._line(cells) + "\n" for cells in block)

    def _print(self, block: list[list[str]]) -> None:
        """A block on a terminal."""
        from shutil import get_terminal_size

        columns = get_terminal_size().columns
        cut = fit(self._widths, self._right, columns)
        if cut is None:
            self._write_paragraphs(block)
        elif cut != self._widths:
            self._print_cut(block, cut, columns)
        else:
            self._write_lines(block)

    def _line(self, cells: Sequence[str]) -> str:
        return GAP.join(map(pad, cells, self._widths, self._right)).rstrip()

    def _print_cut(self, block: list[list[str]], widths: list[int], columns: int) -> None:
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            box=None, pad_edge=False, padding=(0, len(GAP), 0, 0), show_header=self._head_due
        )
        for heading, width, right in zip(self._headings, widths, self._right, strict=True):
            justify: JustifyMethod = "right" if right else "left"
            table.add_column(
                heading, width=width, justify=justify, no_wrap=True, overflow="ellipsis"
            )
        for cells in block:
            table.add_row(*map(Text, cells))
        system: Literal["auto"] | None = "auto" if colored(self._out) else None
        Console(file=self._out, width=columns, color_system=system).print(table)

    def _write_paragraphs(self, block: list[list[str]]) -> None:
        indent = max(map(width_of, self._labels), default=0)
        for cells in block:
            for label, cell in zip(self._labels, cells, strict=True):
                self._out.write(f"{pad(label, indent)}{GAP}{cell}".rstrip() + "\n")
            self._out.write("\n")


def fit(widths: Sequence[int], fixed: Sequence[bool], room: int) -> list[int] | None:
    """Column widths that fit into `room` cells; the widest one that is not fixed gives way first.

    None when no column may give way any more: the table would not be readable.
    """
    gaps = len(GAP) * (len(widths) - 1)
    if sum(widths) + gaps <= room:
        return list(widths)
    most = max(room, _NARROWEST)
    fitted = [w if stays else min(w, most) for w, stays in zip(widths, fixed, strict=True)]
    while sum(fitted) + gaps > room:
        width, widest = max(((w, i) for i, w in enumerate(fitted) if not fixed[i]), default=(0, 0))
        if width <= _NARROWEST:
            return None
        fitted[widest] -= 1
    return fitted


def pad(text: str, width: int, right: bool = False) -> str:
    """`text` filled up with spaces to `width` cells, on its left if `right`."""
    blank = " " * (width - width_of(text))
    return blank + text if right else text + blank


def width_of(text: str) -> int:
    """Cells that `text` takes on a terminal."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(
        0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text
    )
