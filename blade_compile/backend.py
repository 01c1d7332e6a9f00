"""The main path: ``torch.compile(model, backend="blade")``.

config -> passes as Inductor options -> Inductor. Nothing is switched on for the process: two models compiled with
different options live side by side.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from . import carriers
from .config import BladeConfig, nearest
from .errors import BladeOptionError
from .kernels import accelerator
from .passes.decide import CalibrationMismatchError

logger = logging.getLogger("blade_compile")


def blade(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_ignored: Any,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with Inductor, its attention made sparse where that gains.

    Args:
        gm, example_inputs: what Dynamo gives a backend.
        mode: an Inductor mode; also ``options={"mode": ...}``.
        options: `BladeConfig` fields and Inductor config keys in one flat dictionary.

    Raises:
        BladeOptionError (a ValueError): unknown key or invalid value.
    """
    from torch._inductor.compile_fx import compile_fx

    config, inductor = split_options(mode, options)
    if inductor.get("max_autotune"):
        accelerator.search_tiles()
    _mark(gm)
    # config_patches, not a context manager: the backward graph compiles later and must see the same options.
    compile_graph: Any = functools.partial(compile_fx, config_patches=inductor_options(config, inductor))
    if _switched_off():
        return compile_graph(gm, example_inputs)  # type: ignore[no-any-return]
    try:
        compiled: Any = carriers.carry(
            gm,
            example_inputs,
            compile_graph,
            policy=config.policy,
            schedule=config.schedule,
            identity=config,
            cuda_graphs=bool(inductor.get("triton.cudagraphs")),
        )
    except CalibrationMismatchError as error:
        raise BladeOptionError(str(error)) from None
    return compiled  # type: ignore[no-any-return]


def _switched_off() -> bool:
    return os.environ.get("BLADE_DISABLE") == "1"


def _mark(gm: fx.GraphModule) -> None:
    """Note what only the whole graph shows: Inductor hands its passes the sub-graphs first, one by one."""
    if _switched_off():
        return
    try:
        from .passes.find_attention import mark_custom_autograd

        mark_custom_autograd(gm)
    except Exception as error:
        logger.debug("custom autograd functions could not be marked", exc_info=error)


def _reset() -> None:
    """``torch._dynamo.reset()`` calls this on compiled wrappers: CUDA-graph pools are released as Inductor's are."""
    from torch._inductor import config

    if config.triton.cudagraph_trees:
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


blade.reset = _reset  # type: ignore[attr-defined]


def split_options(mode: str | None, options: Mapping[str, Any] | None) -> tuple[BladeConfig, dict[str, Any]]:
    """``options`` as blade's configuration and Inductor's config patches, both checked."""
    from torch._inductor import config as inductor_config

    known = inductor_config.get_config_copy()
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key in BladeConfig.names():
            ours[key] = value
        elif key.replace("-", "_") in known:
            inductor[key] = value
        else:
            hint = nearest(key, (*BladeConfig.names(), *known))
            raise BladeOptionError(
                f"unknown option {key!r}: neither a field of BladeConfig nor an Inductor config key{hint}"
            )
    try:
        config = BladeConfig.of(ours)
    except ValueError as error:
        raise BladeOptionError(str(error)) from None
    return config, _checked(mode or config.mode, inductor)


def _checked(mode: str | None, inductor: dict[str, Any]) -> dict[str, Any]:
    """Inductor's own reading of a mode and options: names, types and side effects as for backend="inductor"."""
    try:
        return dict(torch._TorchCompileInductorWrapper(mode, inductor, None).config)
    except RuntimeError as error:
        raise BladeOptionError(str(error)) from None


def inductor_options(
    config: BladeConfig | Mapping[str, Any] | None = None, inductor: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Inductor options that carry blade's passes, for the routes that don't call a backend.

    For example ``aoti_compile_and_package(exported, inductor_configs=inductor_options({"sparsity": 0.8}))``.
    """
    config, patches = BladeConfig.of(config), dict(inductor or {})
    if _switched_off():
        return patches
    try:
        from .passes import pipeline
        from .settings import settings_of

        return pipeline.inductor_patches(settings_of(config), patches)
    except Exception as error:  # an odd torch build must not take the user's program down
        logger.warning("blade is off (%s: %s); the model is compiled by plain Inductor.", type(error).__name__, error)
        logger.debug("details", exc_info=True)
        return patches
