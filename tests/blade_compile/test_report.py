"""The table, its plain form, and the headline."""

from __future__ import annotations

import io
import sys

from rich.console import Console

from blade_compile.report import Report, Site


def layers() -> list[Site]:
    sites = []
    for i in range(3):
        sparse = {"rewritten": True, "code": "rewritten", "ran": "aten", "density": 0.2 + i / 100, "recall": 0.9}
        times = {"predicted_dense": 0.01, "predicted_sparse": 0.002}
        shape = (1, 4, 8192, 8192, 128)
        name = f"blocks.{i}.attn1"
        sites.append(Site(name=name, kind="sdpa", reason="runs block-sparse", shape=shape, **sparse, **times))
        name = f"blocks.{i}.attn2"
        sites.append(Site(name=name, kind="sdpa", rewritten=False, code="cross", reason="keys come from elsewhere"))
    return sites


def test_headlines() -> None:
    assert Report(layers()).headline == "3 of 6 attention sites run sparse; 3 stay dense: 3 cross"
    assert Report(layers()[:1]).headline == "1 of 1 attention site runs sparse"
    assert Report([]).headline == "no attention was found"
    full = layers()[:2]
    full[0].density = 1.0
    assert Report(full).headline == "0 of 2 attention sites run sparse; 1 keeps every block; 1 stays dense: 1 cross"


def test_layers_share_a_line_and_empty_columns_are_left_out() -> None:
    for site in (sites := layers()):
        site.reason = "keys are text" if site.code == "cross" else site.reason
    assert Report(sites, ["one thing to know"]).plain().splitlines() == [
        "3 of 6 attention sites run sparse; 3 stay dense: 3 cross",
        "! one thing to know",
        "",
        "site                n  kind  B x H x S x D  decision       density      recall  predicted ms  reason",
        "------------------  -  ----  -------------  -------------  -----------  ------  ------------  -------------",
        "blocks.{0-2}.attn1  3  sdpa  1x4x8192x128   sparse (aten)  0.200-0.220  0.900   10 -> 2",
        "blocks.{0-2}.attn2  3  sdpa                 dense: cross                                      keys are text",
    ]


def test_print_is_plain_unless_there_is_a_terminal(monkeypatch, capsys) -> None:
    report = Report(layers())
    print(report)  # noqa: T201
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "\x1b[" in str(report)
    assert "blocks.{0-2}.attn1" in str(report)


def test_it_is_a_rich_renderable() -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(Report(layers()))
    assert "blocks.{0-2}.attn1" in out.getvalue()
    assert "0.200-0.220" in out.getvalue()
