"""A report looked at in headless Chromium: screenshots at phone and desktop width, light and dark, and what is wrong.

    python -m benchmarks.look REPORT.html [--out DIR]

Wrong is: a page wider than its window, a request to the network, an error of the browser, a plot that is flat, and
fewer plots than the page says it was written with.
Needs the Python package ``playwright`` and a Chromium: the system's, or the one of ``playwright install chromium``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

WIDTHS = {"phone": 390, "desktop": 1280}
SCHEMES = ("light", "dark")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BELOW = "() => [...document.querySelectorAll('body > *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
FLAT = "() => [...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().height < 50)"
PLOTS = "() => (e => [e.querySelectorAll('svg').length, +e.dataset.plots])(document.querySelector('.plots'))"
CONTRAST = "() => [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"


def system_browser() -> str | None:
    """A Chromium on the path."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def look(page_file: Path, out: Path) -> list[str]:
    """Write ``<width>_<scheme>.png`` for each; returns what is wrong, nothing where all is well.

    Raises:
        ImportError: playwright is not installed.
    """
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    wrong: list[str] = []
    with sync_playwright() as playwright:
        # The sandbox needs rights that containers rarely give; the page is our own file.
        browser = playwright.chromium.launch(executable_path=system_browser(), args=["--no-sandbox"])
        for name, width in WIDTHS.items():
            for scheme in SCHEMES:
                view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                wrong += [f"{name}, {scheme}: {what}" for what in _problems(view, page_file, scheme)]
                view.screenshot(path=str(out / f"{name}_{scheme}.png"), full_page=True)
                view.close()
        browser.close()
    return wrong


def _problems(view: Any, page_file: Path, scheme: str) -> list[str]:
    found: list[str] = []
    view.on("request", lambda r: r.url.startswith(("file:", "data:")) or found.append(f"it asks for {r.url}"))
    view.on("pageerror", lambda error: found.append(str(error)))
    view.on("console", lambda message: message.type == "error" and found.append(message.text))
    view.goto(page_file.resolve().as_uri())
    if (wide := view.evaluate("document.documentElement.scrollWidth")) > view.viewport_size["width"]:
        found.append(f"the page is {wide} pixels wide, in a window of {view.viewport_size['width']}")
    found += [f"{count} {what}" for script, what in ((BELOW, "parts leave the window"), (FLAT, "plots are flat"))
              if (count := len(view.evaluate(script)))]  # fmt: skip
    drawn, written = view.evaluate(PLOTS)
    if drawn != written:
        found.append(f"{drawn} of {written} plots are there")
    ink, paper = (_light(colour) for colour in view.evaluate(CONTRAST))
    if (ink > paper) != (scheme == "dark"):
        found.append(f"the page is not {scheme}")
    return found


def _light(colour: str) -> float:
    """Brightness of ``rgb(r, g, b)``."""
    return sum(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.look", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the screenshots (default: beside the report)")
    args = parser.parse_args(argv)
    if not args.report.is_file():
        parser.error(f"{args.report} is no file; give the report.html of a run")
    try:
        wrong = look(args.report, args.out or args.report.parent)
    except ImportError:
        parser.error("the package playwright is missing: pip install playwright, and playwright install chromium")
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
