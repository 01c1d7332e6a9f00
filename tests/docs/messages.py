"""The texts of every warning that the package can give, read from its source: what the troubleshooting page holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "passes", "blade_compile", "distill")
WARN_FUNCTIONS = {"_warn_once", "warn_unreadable_once"}
"""Helpers that hand their first argument to the logger; calls of others with "warn" in their name are an error here."""
OTHER = {
    "warn_misfit",
    "warn_outside",
    "_warn_apart",
    "warn_unreadable",
    "catch_warnings",
    "filterwarnings",
    "simplefilter",
}
"""Functions whose own bodies hold the text, and torch's and Python's"""
FIELD = "…"


def warnings() -> dict[str, str]:
    """``file:line`` of each warning to its text, with an ellipsis for whatever is filled in."""
    found: dict[str, str] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and _warns(node):
                    text = template(node.args[0])
                    if text.strip(FIELD):  # else the text is an argument, and found where it is given
                        found[f"{path.relative_to(ROOT)}:{node.lineno}"] = text
    return found


def notes() -> dict[str, str]:
    """The remarks at the head of a report, in the same way."""
    path = ROOT / "blade_compile" / "diagnosis.py"
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "notes.append":
            text = template(node.args[0])
            if text.strip(FIELD):
                found[f"blade_compile/diagnosis.py:{node.lineno}"] = text
    return found


def _warns(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in {"warning", "warn"} or name in WARN_FUNCTIONS:
        return True
    assert "warn" not in name or name in OTHER, f"{ast.unparse(node)}: is this a warning? Add it to one of the lists"
    return False


def template(node: ast.expr) -> str:
    """The literal text of an expression: ``%s`` and ``{...}`` become an ellipsis."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-\d.]*[sdrgf]", FIELD, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return FIELD
