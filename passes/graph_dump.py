"""Graphs before and after the rewrite as text, on request: logger ``blade_compile.graphs`` at DEBUG.

A graph that comes out of the compile cache was rewritten in an earlier process and is not seen here;
``blade_compile.explain`` rewrites afresh and always shows it.
"""

from __future__ import annotations

import logging

from torch import fx

logger = logging.getLogger("blade_compile.graphs")
if logger.level == logging.NOTSET:  # DEBUG on blade_compile asks for reasons, not for thousands of lines of graph
    logger.setLevel(logging.INFO)


def dump_graph(graph: fx.Graph, when: str) -> None:
    """Log a graph with shapes and module paths; ``when`` says which state it is in."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    module = graph.owning_module
    text = str(graph) if module is None else module.print_readable(print_output=False)
    logger.debug("graph %s\n%s", when, text)
