"""Run a model with blade's rewritten graphs, eagerly: the report looks on, `measure` and `calibrate` take part.

Graphs are compiled privately (private_compile.py): nothing that the user compiled is used or changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .passes.decide import Settings
from .private_compile import PrivateCompile, fresh_dynamo, replaced
from .regions import Region, find_regions, module_paths, unwrap
from .traced_sites import Handler, ProbeBackend, SiteLog
from .undisturbed import undisturbed


@contextlib.contextmanager
def installed(
    root: nn.Module, regions: list[Region], settings: list[Settings], log: SiteLog, fullgraph: bool
) -> Iterator[Callable[..., Any]]:
    """What to call so that every region runs as compiled by a private backend; all is put back at exit."""
    private: dict[Any, PrivateCompile] = {}
    entry: Callable[..., Any] = root
    with contextlib.ExitStack() as stack:
        for region, options in zip(regions, settings, strict=True):
            if region.inside:
                if region.attributes is not None:
                    stack.enter_context(replaced(region.attributes, region.key, region.plain))
                continue
            key = (options, region.fullgraph and fullgraph, region.dynamic)
            if key not in private:
                private[key] = PrivateCompile(ProbeBackend(options, log), fullgraph=key[1], dynamic=key[2])
                stack.callback(private[key].forget)
            call = stack.enter_context(private[key].compiled(region))
            if region.attributes is None:
                entry = call
            else:
                stack.enter_context(replaced(region.attributes, region.key, call))
        yield entry


class SiteRunner:
    """A model whose rewritten attention calls go through a function of the caller's; made by `site_runner`."""

    def __init__(self, root: nn.Module, run: Callable[..., Any], log: SiteLog) -> None:
        self._root, self._run, self._log = root, run, log

    def run(self, handler: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output, every rewritten attention computed by ``handler(site, op, args, kwargs)``.

        The model, its inputs and the random state are as before afterwards.
        """
        self._log.handler = handler
        with torch.no_grad(), undisturbed(self._root, args, kwargs):
            return self._run(*args, **kwargs)

    def plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own output."""
        with torch.no_grad(), undisturbed(self._root, args, kwargs):
            return self._root(*args, **kwargs)


@contextlib.contextmanager
def site_runner(model: Any, settings: Settings) -> Iterator[SiteRunner]:
    """A `SiteRunner` of a model, plain or compiled in any way; graphs are traced once and kept until the exit."""
    root, compiled = unwrap(model)
    regions = find_regions(root, compiled)
    log = SiteLog(module_paths(root))
    with fresh_dynamo(), installed(root, regions, [settings] * len(regions), log, False) as run:
        yield SiteRunner(root, run, log)
