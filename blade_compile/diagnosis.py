"""``explain``: why each attention of a model runs sparse or does not, found out by running the model twice.

    eagerly          every attention call is counted, whatever Dynamo would make of it (eager_calls.py)
    compiled afresh  blade's passes rewrite the graphs, which then run eagerly under observation (traced_sites.py)

Neither run uses what was compiled before, so that plain models, compiled ones and those whose code came out of a
cache all give the same report; and neither leaves a trace (undisturbed.py, private_compile.py).
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .backend import split_options
from .config import BladeConfig
from .eager_calls import Call, attention_calls
from .passes.decide import Settings
from .private_compile import fresh_dynamo
from .regions import Region, find_regions, module_paths, unwrap
from .report import RUN_CODES, Report, Site
from .settings import settings_of
from .site_runs import installed
from .traced_sites import SiteLog
from .undisturbed import undisturbed

logger = logging.getLogger("blade_compile")

_GIVE_UP = (
    "ran outside every graph: Dynamo gave up the frame ({why}). Compile with fullgraph=True, or set "
    "torch._dynamo.config.capture_scalar_outputs and capture_dynamic_output_shape_ops to True"
)
_NOT_COMPILED = "lies in no compiled part of the model: compile the whole model, or this module too"
_FOREIGN = "goes through diffusers' attention backend `{name}`: call set_attention_backend('native')"


def explain(
    model: Any,
    *args: Any,
    blade_options: BladeConfig | Mapping[str, Any] | None = None,
    blade_measure: bool = False,
    **kwargs: Any,
) -> Report:
    """Say of every attention site of a model whether it runs block-sparse, and why or why not.

    Runs the model twice on the given inputs, in the caller's grad, autocast and training mode, and puts back what that
    changes: random state, buffers, inputs written in place, attributes. What was compiled stays compiled.

    Args:
        model: a module (or function), plain or compiled in any way, run before or not.
        args, kwargs: what the model is called with.
        blade_options: options to explain the model under, as for ``torch.compile(backend="blade", options=...)``;
            None: those that it was compiled with, or the defaults.
        blade_measure: also time dense and sparse attention on each site's tensors.

    Returns:
        The report; ``print`` shows a table.

    Raises:
        ValueError: for wrong options. What the model itself raises passes through.
    """
    root, compiled = unwrap(model)
    regions = find_regions(root, compiled)
    notes: list[str] = []
    settings = [_settings(region, blade_options, notes) for region in regions]
    paths = module_paths(root)
    with undisturbed(root, args, kwargs) as rewind:
        calls = attention_calls(lambda: root(*args, **kwargs), paths)
        rewind()
        log, breaks = _traced(root, regions, settings, paths, blade_measure, (args, kwargs), rewind, notes)
    rows = log.rows()
    rows += _not_in_graphs(rows, calls, log, regions, breaks)
    _name_backends(rows, calls, notes)
    if _switched_off():
        notes.append(RUN_CODES["disabled"])
        for row in rows:
            if row.code == "never":
                row.code, row.reason = "disabled", RUN_CODES["disabled"]
    return Report(rows, list(dict.fromkeys(notes)), _options(blade_options, regions))


# --- options ----------------------------------------------------------------------------------------------------------


def _settings(region: Region, given: BladeConfig | Mapping[str, Any] | None, notes: list[str]) -> Settings:
    settings = settings_of(_config(region, given))
    if region.context is not None and not region.by_blade and not region.inside:
        where = f"`{region.path}`" if region.path else "the model"
        notes.append(
            f"{where} is compiled by `{region.backend_name}`, not by blade: shown is what backend='blade' would do"
        )
    return dataclasses.replace(settings, when="never") if _switched_off() else settings


def _switched_off() -> bool:
    return os.environ.get("BLADE_DISABLE") == "1"


def _config(region: Region, given: BladeConfig | Mapping[str, Any] | None) -> BladeConfig:
    if isinstance(given, BladeConfig):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(
            f"blade_options is a {type(given).__name__}; expected a BladeConfig, a mapping of options, or None."
        )
    options: Mapping[str, Any] = region.options if given is None else {"options": given}
    return split_options(options.get("mode"), options.get("options"))[0]


def _options(given: BladeConfig | Mapping[str, Any] | None, regions: list[Region]) -> dict[str, Any]:
    """The fields that differ from the defaults."""
    config, default = _config(regions[0], given), BladeConfig()
    return {
        name: getattr(config, name) for name in BladeConfig.names() if getattr(config, name) != getattr(default, name)
    }


# --- the compiled run -------------------------------------------------------------------------------------------------


def _traced(
    root: nn.Module,
    regions: list[Region],
    settings: list[Settings],
    paths: dict[int, str],
    measure: bool,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    rewind: Callable[[], None],
    notes: list[str],
) -> tuple[SiteLog, list[str]]:
    """The log of a run in which blade compiled the model's regions, and why Dynamo broke graphs.

    A model that can't be compiled at all leaves an empty log: it ran eagerly without an error before, so the failure
    is the compiler's and belongs in the report.
    """
    strict = any(region.fullgraph for region in regions)
    for fullgraph in (True, False) if strict else (False,):
        log = SiteLog(paths, measure)
        try:
            with fresh_dynamo() as counters, installed(root, regions, settings, log, fullgraph) as run:
                run(*inputs[0], **inputs[1])
                return log, [_first_line(reason) for reason in counters["graph_break"]]
        except Exception as error:  # any compiler error; the model's own were raised by the eager run
            logger.debug("the report's compile failed", exc_info=True)
            message = f"{type(error).__name__}: {_first_line(str(error))}"
            notes.append(f"{'fullgraph=True' if fullgraph else 'compiling'} fails on this model ({message})")
            rewind()
    return SiteLog(paths, failed=message), []


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"


# --- what the graphs did not hold -------------------------------------------------------------------------------------


def _not_in_graphs(
    rows: list[Site], calls: list[Call], log: SiteLog, regions: list[Region], breaks: list[str]
) -> list[Site]:
    """Rows for eager calls that have no counterpart in a graph, one per module."""
    missing = len(calls) - sum(row.calls for row in rows)
    if missing <= 0:
        return []
    held = Counter[str]()
    for row in rows:
        held[row.path] += row.calls
    absent: dict[tuple[str, str], list[Call]] = {}
    for call in calls:
        path = call.path or call.kind
        if held[path] > 0:
            held[path] -= 1
        elif missing > 0:
            missing -= 1
            absent.setdefault((path, call.kind), []).append(call)
    return [_absent_row(path, group, log, regions, breaks) for (path, _), group in absent.items()]


def _absent_row(path: str, calls: list[Call], log: SiteLog, regions: list[Region], breaks: list[str]) -> Site:
    call = calls[0]
    code, reason = _why_absent(path, call, log, regions, breaks)
    return Site(
        name=path,
        kind=call.kind,
        rewritten=False,
        code=code,
        reason=reason,
        shape=call.shape,
        dtype=call.dtype,
        mask="unknown",
        calls=len(calls),
    )


def _why_absent(path: str, call: Call, log: SiteLog, regions: list[Region], breaks: list[str]) -> tuple[str, str]:
    if call.backend is not None:
        return "other-backend", _FOREIGN.format(name=call.backend)
    if log.failed:
        return "unreadable", f"the model could not be compiled ({log.failed})"
    if call.path in log.unreadable:
        return (
            "unreadable",
            "blade could not read the graph that holds it; logging.getLogger('blade_compile') has the details",
        )
    if call.path in log.unrecognised:
        return (
            "unreadable",
            "the graph holds a softmax or an attention operator here, in a form that blade does not know",
        )
    if not any(_within(path, region.path) for region in regions):
        return "outside-graph", _NOT_COMPILED
    return "outside-graph", _GIVE_UP.format(why="; ".join(breaks[:2]) or "no reason given")


def _within(path: str, region: str) -> bool:
    return not region or path == region or path.startswith(f"{region}.")


def _name_backends(rows: list[Site], calls: list[Call], notes: list[str]) -> None:
    """Say so, plainly, where a library's attention backend keeps blade out; add what only the run knows."""
    counted = Counter(call.backend for call in calls if call.backend is not None)
    by_path = {call.path: call for call in calls}
    for row in rows:
        call = by_path.get(row.path)
        if call is not None and set(row.shape) == {None}:  # the graph does not say, the run did
            row.shape, row.dtype = call.shape, call.dtype
        name = None if call is None else call.backend
        if name is not None and not row.rewritten and row.code != "other-backend":
            row.reason += "; it " + _FOREIGN.format(name=name)
    replaced = sum(row.rewritten for row in rows)
    for name, number in counted.items():
        notes.append(f"{replaced} replaced, {number} calls go through `{name}`: call `set_attention_backend('native')`")
