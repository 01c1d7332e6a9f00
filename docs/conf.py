"""Sphinx: `make docs` builds these pages to build/docs, and stops at the first warning."""

from __future__ import annotations

import re
from typing import Any

project = "blade"
html_title = "blade"
extensions = ["myst_parser"]
html_theme = "furo"
nitpicky = True
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False


def _link_as_files(app: Any, docname: str, source: list[str]) -> None:
    """Links to Markdown outside this folder, which are pages where the repository is read, become downloads here."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)(#[^)]*)?\)", r"](path:\1)", source[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _link_as_files)
