"""What click asks of a shell, and `--option=value` in each of them.

zsh and fish give and want such a word whole, bash cuts it at the "="; click knows of neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from click.shell_completion import (
    BashComplete,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class _Whole(ShellComplete):
    """A shell that replaces the word with what is offered."""

    _option = ""  # what stands before the value, "=" included

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before, and the one to be completed."""
        words, incomplete = super().get_completion_args()
        name, equals, _ = incomplete.partition("=")
        self._option = name + equals if equals and name.startswith("--") else ""
        return words, incomplete

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """A line of the answer."""
        if item.type == "plain":
            item.value = f"{self._option}{item.value}"
        return super().format_completion(item)


class Zsh(_Whole, ZshComplete):
    """zsh; files, too, are looked for behind the "="."""

    source_template = ZshComplete.source_template.replace(
        "_path_files -", "compset -P '--*='; _path_files -"
    )


class Fish(_Whole, FishComplete):
    """fish."""


class Bash(BashComplete):
    """bash, to which the "=" is a word."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before, and the one to be completed."""
        words, incomplete = super().get_completion_args()
        return (words[:-1] if words[-1:] == ["="] else words), incomplete


def register() -> None:
    """Have click use these."""
    for shell in (Bash, Zsh, Fish):
        add_completion_class(shell)
