"""Make ``backend="blade"`` known to ``torch.compile`` where no installed entry point does.

An installed blade is found through its entry point and needs nothing here. A checkout that was never installed
has no metadata, so a small finder offers the same entry point to ``importlib.metadata``, where torch looks names up
on their first use. Importing torch's registry to register the name directly would load all of Dynamo and Triton
(about two seconds) on ``import blade_compile``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution
from pathlib import Path

DISTRIBUTION = "blade-compile"
_REGISTRY = "torch._dynamo.backends.registry"
_METADATA_FILES = {
    "METADATA": f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {{version}}\n",
    "entry_points.txt": "[torch_dynamo_backends]\nblade = blade_compile.backend:blade\n",
    "top_level.txt": "blade_compile\n",
}


class _CheckoutDistribution(Distribution):
    """The metadata that ``pip install`` would have written, as far as anyone asks for it."""

    def read_text(self, filename: str) -> str | None:
        """Return the text of a metadata file, or None as for a file that is not there."""
        text = _METADATA_FILES.get(filename)
        return text and text.format(version=import_module("blade_compile").__version__)

    def locate_file(self, path: object) -> Path:  # type: ignore[override]  # the argument's type differs by Python version
        """Return where a file of the distribution lies."""
        return Path(__file__).parent.parent / str(path)


class _CheckoutFinder(DistributionFinder):
    """Finds the checkout's distribution and nothing else; it takes no part in importing modules."""

    def find_spec(self, *args: object) -> None:  # type: ignore[override]
        """Leave every import to the other finders."""
        return

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        """Yield the checkout when all distributions, or blade by name, are asked for."""
        name = context.name if context else None
        if name is None or name.replace("_", "-").lower() == DISTRIBUTION:
            yield _CheckoutDistribution()


def register_name() -> None:
    """Make ``torch.compile(model, backend="blade")`` work, whether or not blade is installed."""
    try:
        distribution(DISTRIBUTION)
    except PackageNotFoundError:
        sys.meta_path.append(_CheckoutFinder())
    registry = sys.modules.get(_REGISTRY)
    # torch reads the entry points once; if that was before this import, the name has to be added by hand.
    if registry is not None and "blade" not in registry.list_backends(exclude_tags=()):
        registry.register_backend(import_module("blade_compile.backend").blade, name="blade")
