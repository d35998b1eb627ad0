"""How Sphinx builds the site: `make site`, which takes a warning for an error."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from kvmtool import __version__

project = "kvmtool"
author = "the kvmtool authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["conf.py"]

myst_heading_anchors = 3  # `page.md#heading` works as it does where Markdown is shown
default_role = "literal"  # `name` in a docstring is code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_display_short_literal_types = True
add_module_names = False

html_theme = "furo"
html_title = f"kvmtool {release}"
html_show_sphinx = False
html_copy_source = False
templates_path: list[str] = []
html_static_path: list[str] = []

# Docstrings are plain text: backticks and blocks behind "::" alone mean what they mean to Sphinx.
_SPECIAL = re.compile(r"[*|]|(?<=[\w\"])_(?!\w)")


def _as_plain_text(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    literal = False
    for number, line in enumerate(lines):
        literal = literal and (not line.strip() or line.startswith(" "))
        if not literal and not line.lstrip().startswith(">>>"):
            parts = line.split("`")
            parts[::2] = [_SPECIAL.sub(r"\\\g<0>", part) for part in parts[::2]]
            lines[number] = "`".join(parts)
        literal = literal or line.endswith("::")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _as_plain_text)
