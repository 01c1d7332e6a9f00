"""Fill the file table of each folder's README from the first sentence of each file.

``folder_tables.py`` writes the tables; ``folder_tables.py --check`` only says which are out of date.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "passes", "blade_compile", "distill", "benchmarks")
SUFFIXES = (".py", ".cpp", ".h")
START, END = "<!-- files -->", "<!-- end of files -->"


def first_sentence(path: Path) -> str:
    """Return the first sentence of a file's docstring or leading comment, in one line and without its full stop."""
    text = path.read_text()
    if path.suffix == ".py":
        about = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = re.match(r"(?://.*\n)*", text)
        about = re.sub(r"^// ?", "", lines.group() if lines else "", flags=re.MULTILINE)
    paragraph = " ".join(about.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`])", paragraph)[0].rstrip(".:")
    return sentence.replace("|", "\\|").replace("``", "`")


def file_table(folder: Path) -> str:
    """Return the Markdown table of a folder's source files."""
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    rows = [f"| `{path.name}` | {first_sentence(path)} |" for path in files]
    return "\n".join([START, "| file | what |", "| --- | --- |", *rows, END])


def updated(folder: Path) -> tuple[str, str]:
    """Return a folder's README as it is and as it should be."""
    text = (folder / "README.md").read_text()
    if START not in text or END not in text:
        raise ValueError(f"{folder.name}/README.md has no lines {START} and {END} to put its file table between")
    before, rest = text.split(START, 1)
    return text, before + file_table(folder) + rest.split(END, 1)[1]


def main() -> int:
    """Write or check all tables. Returns 1 where a check finds one out of date."""
    check = "--check" in sys.argv[1:]
    late = 0
    for name in FOLDERS:
        now, wanted = updated(ROOT / name)
        if now != wanted and check:
            print(f"{name}/README.md: the file table is out of date; run `make format`")
            late = 1
        elif now != wanted:
            (ROOT / name / "README.md").write_text(wanted)
    return late


if __name__ == "__main__":
    sys.exit(main())
