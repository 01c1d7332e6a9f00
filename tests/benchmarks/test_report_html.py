"""The page: every figure in it is a value of the report, plots name their rows, nothing is fetched."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markupsafe
import pytest

from benchmarks import __main__ as command
from benchmarks import look, plots, registry, report_html, setup_info, tables
from benchmarks.__main__ import main, write
from blade_compile.report import Site

SPAN = {"median": 4.0, "low": 3.5, "high": 4.5, "samples": 5}
SECONDS = {"median": 0.0123, "low": 0.012, "high": 0.013, "samples": 5}
Row = dict[str, Any]


def _row(**more: Any) -> Row:
    row = {"suite": "ops", "case": "c", "arm": "blade <b>", "status": "ok", "kind": "forward", "policy": "asa"}
    row |= {"block": 128, "density": 0.2, "dtype": "float32", "D": 64, "S": 2048, "sparsity": 0.8}
    row |= {"speedup": SPAN, "baseline": "dense", "seconds": SECONDS, "samples": [0.0123] * 5}
    return {**row, "error": 1.7e-07, "distance": 0.31, **more}


def _content() -> dict[str, Any]:
    """A report with rows of every suite, so that every plot is drawn."""
    model = {"suite": "models", "case": "wan, one step", "model": "wan2.1-1.3b", "kind": "", "error": 0.123,
             "size": "Wan, scaled down", "weights": "random", "sdpa": "default"}  # fmt: skip
    rows = [
        {"suite": "ops", "case": "c", "arm": "peer", "status": "absent", "reason": "is not installed"},
        _row(), _row(S=4096, tflops=1.25, peak_mib=12.5), _row(S=4096, sparsity=0.5, density=0.5),
        _row(arm="bad", status="wrong", reason="error 1 < 2"),
        _row(**model, split={"prediction": 0.101, "selection": 0.02, "attention": 0.203, "rest": 1.07}),
        _row(case="p", kind="policies"), _row(suite="fidelity", case="q", l1=0.31, recall=0.87, cosine=0.95),
        _row(suite="headline", case="g", arm="8 steps", published_speedup=14.1, published_seconds=24.0,
             published_on="one H20", calculation="8 x (step)", over_few=SPAN),
        _row(suite="compile", case="k", arm="blade, cold", graphs=3, recompiles_by_step=0, first_call=61.2),
    ]  # fmt: skip
    for place in (1, 4):
        rows[place].pop("policy")
    rows[4] = {k: v for k, v in rows[4].items() if k not in ("speedup", "seconds")}
    rows[1]["policy"] = "asa"
    site = Site(name="blocks.0.attn1", kind="sdpa", rewritten=True, code="rewritten", reason="sparse").to_dict()
    site |= {"shape": [1, 2, 2304, 2304, 64], "density": 0.234, "recall": 0.5, "predicted_dense": 0.0183}
    other = {**site, "name": "blocks.0.attn2", "shape": [1, 2, 2304, 32, 64], "density": None}
    return {
        "title": "t", "command": "c", "setup": setup_info.collect(), "notes": ["a note"], "rows": rows,
        "not_run": ["suite x: not run"], "sites": {"wan2.1-1.3b": {"headline": "1 of 1", "sites": [site, other]}},
    }  # fmt: skip


class Cells(HTMLParser):
    """Texts of table cells with their sources, ids and links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[tuple[str, str | None]] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self._in: tuple[str | None] | None = None
        self._text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.add(str(given["id"]))
        if tag == "a":
            self.links.append(str(given["href"]))
        if tag == "td":
            self._in, self._text = (given.get("data-source"),), ""

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "td" and self._in is not None:
            self.cells.append((self._text, self._in[0]))
            self._in = None


def test_every_figure_is_a_value_of_the_report(tmp_path: Path) -> None:
    write(_content(), tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    cells = Cells((tmp_path / "report.html").read_text()).cells
    sourced = {source: text for text, source in cells if source}
    the_same_figures(content, sourced)
    said = {row["reason"] for row in content["rows"] if "reason" in row}
    for text, source in cells:
        assert source or not re.search(r"\d", text) or text.partition(": ")[2] in said, text
    shown = {f"rows/{place}/{name}" for place, row in enumerate(content["rows"]) for name in row
             if name in report_html.COLUMNS}  # fmt: skip
    assert shown <= sourced.keys()
    assert sourced["rows/1/speedup"] == "4.00x (3.50-4.50)"
    assert sourced["rows/1/seconds"] == "12.3 ms (12 ms to 13 ms)"
    assert sourced["rows/5/split/attention"] == "203 ms"
    assert sourced["rows/8/published_speedup"] == "14.10x"
    assert (sourced["rows/1/samples"], sourced["rows/1/distance"], sourced["rows/5/sdpa"]) == ("5", "0.31", "default")
    site = {source.rpartition("/")[2]: text for source, text in sourced.items() if "/sites/0/" in source}
    assert (site["density"], site["recall"], site["predicted_dense"]) == ("0.234", "0.500", "18.3 ms")
    assert site["shape"] == "1 x 2 x 2304 x 64"
    assert sourced["sites/wan2.1-1.3b/sites/1/shape"] == "1 x 2 x 2304/32 x 64"
    assert not any("first_call" in source for source in sourced), "the arms of a case share caches"


def the_same_figures(content: dict[str, Any], sourced: dict[str, str]) -> None:
    for source, text in sourced.items():
        assert text == report_html.shown(content, source), source


@pytest.mark.parametrize("page", sorted(tables.RESULTS.glob("*/report.html")), ids=lambda page: page.parent.name)
def test_committed_pages_show_their_reports_figures(page: Path) -> None:
    content = json.loads(page.with_suffix(".json").read_text())
    sourced = {source: text for text, source in Cells(page.read_text()).cells if source}
    timed = {f"rows/{place}/seconds" for place, row in enumerate(content["rows"]) if "seconds" in row}
    assert timed <= sourced.keys()
    the_same_figures(content, sourced)


def test_a_page_is_drawn_again_from_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(_content(), tmp_path)
    page, rows = ((tmp_path / name).read_text() for name in ("report.html", "report.json"))
    (tmp_path / "report.html").write_text("of an earlier look")
    assert main(["render", str(tmp_path)]) == 0
    assert [(tmp_path / name).read_text() for name in ("report.html", "report.json")] == [page, rows]
    with pytest.raises(SystemExit):
        main(["render", str(tmp_path / "none")])
    assert "no report.json here" in capsys.readouterr().err


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    content = _content()
    write(content, tmp_path)
    page = (tmp_path / "report.html").read_text()
    content["rows"][1]["speedup"] = {**SPAN, "median": 4.1}
    wrong = [source for text, source in Cells(page).cells if source and text != report_html.shown(content, source)]
    assert wrong == ["rows/1/speedup"]


def test_the_page_holds_everything_and_needs_no_network() -> None:
    content = _content()
    page = report_html.render(content)
    assert "blade &lt;b&gt;" in page
    assert "wrong: error 1 &lt; 2" in page
    assert "peer (is not installed)" in page
    assert "suite x: not run" in page
    assert all(line in page for line in setup_info.lines(content["setup"]))
    assert "http" not in page.replace("http://www.w3.org", "")
    assert f'data-plots="{len(plots.PLOTS)}"' in page, "benchmarks.look compares it with what is there"
    assert page.count("<svg") == len(plots.PLOTS)
    for plot in plots.PLOTS:
        assert f"<figcaption>{markupsafe.escape(plot.title)}" in page


def test_plots_name_the_rows_that_they_draw() -> None:
    content = _content()
    page = Cells(report_html.render(content))
    assert {link.removeprefix("#") for link in page.links} <= page.ids
    for plot in plots.PLOTS:
        chosen = plot.select(content["rows"])
        assert chosen
        assert all(row["status"] == "ok" for row in chosen)
        svg = plot.draw(chosen)
        assert "currentColor" in svg
        assert plots.INK not in svg
        assert not plot.select([])
    assert [r["S"] for r in plots.select_over_length(content["rows"])] == [2048, 4096]
    assert [r["sparsity"] for r in plots.select_over_sparsity(content["rows"])] == [0.8, 0.5]
    timed, compared = plots.select_fidelity(content["rows"])
    assert (timed["kind"], compared["suite"]) == ("policies", "fidelity")


def test_quantities() -> None:
    seconds = (3213.76, 2.0, 0.0125, 3e-5, 4e-7, None)
    assert [report_html.quantity(s) for s in seconds] == ["3214 s", "2 s", "12.5 ms", "30 µs", "0.4 µs", ""]


def test_suites_are_run_written_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(plan: registry.Plan) -> Any:
        arms = [registry.Arm("dense", lambda: 1), registry.Arm("blade", lambda: 1, lambda out: 1e-7)]
        yield registry.Case("a case", lambda: arms, absent={"peer": "needs a GPU"})

    def broken(result: Any) -> float:
        raise registry.WrongResultError("error 3, allowed 1")

    monkeypatch.setitem(registry.SUITES, "ops", small)
    assert main(["--suite", "ops", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["arm"] for row in content["rows"]] == ["peer", "dense", "blade"]
    assert content["command"] == "python -m benchmarks --suite ops"
    assert "not here: peer (needs a GPU)" in said
    for name in command.SUITES[1:]:
        assert f"not run: suite {name}: not asked for" in said
    assert "1.00x" in said

    wrong = [registry.Arm("dense", lambda: 1), registry.Arm("blade", lambda: 1, broken)]
    monkeypatch.setitem(registry.SUITES, "ops", lambda plan: iter([registry.Case("a case", lambda: wrong)]))
    assert main(["--suite", "ops", "--out", str(tmp_path)]) == 1
    assert "wrong: a case, blade: error 3, allowed 1" in capsys.readouterr().err


def test_quick_says_what_it_leaves_out() -> None:
    lines = "\n".join(command._not_run(list(command.QUICK), registry.Plan(command.device(), quick=True)))
    for word in (
        "suite pipeline",
        "suite distill",
        "suite compile",
        "suite fidelity",
        "flux-dev",
        "lengths",
        "headline",
    ):
        assert word in lines


@pytest.mark.slow
def test_the_page_fits_a_phone_and_a_desktop_in_light_and_dark(tmp_path: Path) -> None:
    pytest.importorskip("playwright", reason="needs the package playwright (make look installs it)")
    write(_content(), tmp_path)
    assert look.look(tmp_path / "report.html", tmp_path) == []
    assert len(list(tmp_path.glob("*.png"))) == len(look.WIDTHS) * len(look.SCHEMES)
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "wide.html").write_text(page.replace("<h2>", '<div style="width:2000px">wide</div><h2>', 1))
    (tmp_path / "gone.html").write_text(re.sub(r"<svg.*?</svg>", "", page, count=1, flags=re.DOTALL))
    missing = f"{len(plots.PLOTS) - 1} of {len(plots.PLOTS)} plots are there"
    assert any(missing in line for line in look.look(tmp_path / "gone.html", tmp_path))
    assert any("2000" in line or "pixels wide" in line for line in look.look(tmp_path / "wide.html", tmp_path))
