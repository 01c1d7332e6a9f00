"""All transformer classes of the pinned diffusers, as tiny models; and the list of classes there are."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from tests.zoo import audio, cross, image, image_joint, video, video_hunyuan, video_ltx, video_wan
from tests.zoo.entry import Entry

# Classes without an entry, each with the reason.
EXCLUDED: dict[str, str] = {}

FAMILIES = (cross, image, image_joint, video, video_hunyuan, video_wan, video_ltx, audio)
ENTRIES: list[Entry] = [entry for family in FAMILIES for entry in family.ENTRIES]


def transformer_classes() -> set[str]:
    """Names of the `ModelMixin` classes defined in `diffusers.models.transformers`."""
    import diffusers.models.transformers as package
    from diffusers.models.modeling_utils import ModelMixin

    names = set()
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        for name, value in vars(module).items():
            if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == module.__name__:
                names.add(name)
    return names
