"""Models too small to mean anything, run without Inductor: its code is not what the benchmarks' tests are about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import fx


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both backends run their graphs as they are; blade's with its passes and operators, on any number of tokens."""

    def compile_fx(gm: fx.GraphModule, inputs: Any, *, config_patches: Any = None, **_: Any) -> Callable[..., Any]:
        rewrite = (config_patches or {}).get("pre_grad_custom_pass")
        if rewrite is not None:
            rewrite(gm.graph)
            gm.recompile()
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
