"""blade: a ``torch.compile`` backend that runs the attention of diffusion transformers block-sparse.

``torch.compile(model, backend="blade")`` is all that most programs need. The names below are imported on first
use, so that ``import blade_compile`` loads neither Triton nor diffusers nor the compiler.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# In a checkout kernels/, passes/ and distill/ lie beside this folder; in a wheel they lie inside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

_WHERE = {
    "blade": "blade_compile.backend",
    "BladeConfig": "blade_compile.config",
    "Report": "blade_compile.report",
    "explain": "blade_compile.diagnosis",
    "measure": "blade_compile.fidelity",
    "calibrate": "blade_compile.calibration",
    "generation": "blade_compile.generations",
    "register_policy": "blade_compile.functional",
    "block_sparse_attention": "blade_compile.functional",
    "mask_predict": "blade_compile.functional",
    "sparse_attention": "blade_compile.functional",
}

__all__ = ["__version__", *_WHERE]  # noqa: PLE0604 (the keys are strings)


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that ``import blade_compile`` stays light."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the lazy names too, for completion in a shell."""
    return sorted({*globals(), *_WHERE})


from blade_compile.registration import register_name  # noqa: E402 (needs the __path__ line above)

register_name()
