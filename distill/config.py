"""The configuration of a run: one YAML, checked before anything starts.

``load`` reads a preset, a YAML and ``key=value`` overrides, each over the one before, and refuses what it doesn't know.
``dump`` writes the YAML back, with a comment on every field.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from blade_compile.config import nearest
from blade_compile.distill import presets
from blade_compile.distill.config_sections import (
    ROLE_ALIASES,
    DataConfig,
    EmaConfig,
    LatentConfig,
    LoopConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Section,
    SparsityConfig,
)
from blade_compile.distill.errors import ConfigError
from blade_compile.distill.objective import guidance_note
from blade_compile.distill.presets import PRESETS

_WHOLE = frozenset({"blade_options", "columns"})
"""Fields that are mappings: one of them replaces the preset's, it isn't merged into it"""
_BUDGET = ("min_keep", "max_keep")

Tracker = Literal["none", "tensorboard", "wandb", "trackio"]


class RunConfig(Section):
    """Everything that decides a run."""

    name: str = Field("run", description="of the run; its files go to <output_dir>/<name>")
    output_dir: str = Field("runs", description="parent folder of all runs")
    seed: int = Field(0, ge=0, lt=2**31, description="of weights and noise")
    preset: str | None = Field(None, description=f"start from {', '.join(PRESETS)}; what stands here changes it")
    model: ModelConfig = Field(description="the teacher, from which student and critic start")
    data: DataConfig = Field(DataConfig(), description="prompts or their embeddings; no image or video is needed")
    latent: LatentConfig = Field(LatentConfig(), description="size of the clip in frames and pixels")
    method: MethodConfig = Field(MethodConfig(), description="Trajectory Distribution Matching")
    sparsity: SparsityConfig = Field(SparsityConfig(), description='of the student\'s attention (backend="blade")')
    lora: LoraConfig | None = Field(LoraConfig(), description="adapters on student and critic; null: full weights")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW for student and critic")
    ema: EmaConfig = Field(EmaConfig(), description="average of the student's weights")
    loop: LoopConfig = Field(LoopConfig(), description="length, batch, checkpoints")
    parallel: ParallelConfig = Field(ParallelConfig(), description="ranks and memory")
    tracker: Tracker = Field("none", description="beside metrics.jsonl: none, tensorboard, wandb, trackio")

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str) -> str:
        if not re.fullmatch(r"[\w][\w.+-]*", value):
            raise ValueError(f"{value!r}; valid are letters, digits, '.', '_', '+', '-': it names a folder")
        return value

    @model_validator(mode="after")
    def _prompts(self) -> RunConfig:
        if self.model.path is not None and self.data.prompts is None and self.data.embeddings is None:
            raise ValueError("data has neither prompts nor embeddings; give data.prompts or data.embeddings")
        return self

    @property
    def folder(self) -> str:
        """Where the run's files are."""
        return f"{self.output_dir}/{self.name}"

    @property
    def embeddings(self) -> str:
        """Where the prompts' embeddings are."""
        return self.data.embeddings or f"{self.folder}/embeddings"

    @property
    def guidance(self) -> str:
        """The guidance scale in both conventions, for logs."""
        return guidance_note(self.method.cfg_scale)


def json_schema() -> dict[str, Any]:
    """The JSON schema of the YAML, for editors."""
    return RunConfig.model_json_schema()


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a configuration.

    Args:
        path: a YAML file, or the name of a preset; None: overrides alone (``preset=..`` among them).
        overrides: ``dotted.path=value``, the value in YAML (``method.step_choices=[1,2,4]``, ``lora=null``).

    Raises:
        ConfigError: with one line per problem: a missing or malformed file, an unknown key (with its dotted path and
            the nearest valid one), a value that isn't valid.
    """
    given: dict[str, Any] = _canonical(_read(path))
    for override in sorted(overrides, key=lambda text: not text.startswith("preset=")):
        _apply(given, override)
    return resolve(given)


def resolve(given: dict[str, Any]) -> RunConfig:
    """A configuration from nested sections, over the preset that they name."""
    name = given.get("preset")
    if name is None:
        return _checked(given)
    if name not in PRESETS:
        raise ConfigError(f"preset: found {name!r}; valid are {', '.join(PRESETS)}{_near(str(name), PRESETS)}")
    given = _canonical(given)
    return _checked(_without_budget(_merged(presets.values(name), given), given))


def dump(config: RunConfig, commented: bool = True) -> str:
    """The configuration as YAML, which ``load`` reads back to an equal one.

    Args:
        config: what to write.
        commented: with what each field means and, where a preset gave the value, the value's source.
    """
    return "\n".join(_lines(config, "", config.preset, commented)) + "\n"


def _read(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    if str(path) in PRESETS and not Path(path).exists():
        return {"preset": str(path)}
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        hint = f"; a path of a YAML file or a preset ({', '.join(PRESETS)}) is wanted"
        raise ConfigError(f"{path}: {error.strerror or error}{hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path} holds {found}; a mapping of sections is wanted: see `blade-distill init`")
    return content


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _apply(given: dict[str, Any], override: str) -> None:
    """Set one ``dotted.path=value``."""
    path, equals, text = override.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"override {override!r}; valid is dotted.path=value, such as method.steps=8")
    names = [ROLE_ALIASES.get(name, name) for name in names]
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is no YAML value; quote it, or give one") from None
    here = given
    for name in names[:-1]:
        if not isinstance(here.get(name), dict):
            here[name] = _presets_own(given, name)
        here = here[name]
    here[names[-1]] = value


def _presets_own(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What one key of a mapping is set in: the preset's mapping, which what is given would replace as a whole."""
    preset = given.get("preset")
    if name not in _WHOLE or preset not in PRESETS:
        return {}
    return next((dict(value) for path, (value, _) in PRESETS[preset].items() if path.endswith(f".{name}")), {})


def _canonical(value: Any) -> Any:
    """The roles under their own names, so that a preset's section and the user's are merged, not set side by side."""
    if not isinstance(value, dict):
        return value
    renamed = {ROLE_ALIASES.get(k, k): _canonical(v) for k, v in value.items()}
    return renamed if len(renamed) == len(value) else value


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = key not in _WHOLE and isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    if "factory" in over or "path" in over:  # another source replaces the preset's
        for name in {"factory", "path", "family", "revision", "weights"} - over.keys():
            merged.pop(name, None)
    return merged


def _without_budget(merged: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the preset's bounds of the density where a sparsity is given, which fixes it."""
    own = given.get("sparsity")
    if not isinstance(own, dict) or "blade_options" in own or (own.get("sparsity") is None and not own.get("schedule")):
        return merged
    section = merged["sparsity"]
    left = {k: v for k, v in section.get("blade_options", {}).items() if k not in _BUDGET}
    return merged | {"sparsity": section | {"blade_options": left}}


def _checked(given: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(given)
    except ValidationError as errors:
        raise ConfigError("\n".join(_sentence(error) for error in errors.errors())) from None


def _sentence(error: ErrorDetails) -> str:
    """One problem in one line: the dotted path, what was found, what is valid."""
    place = [str(part) for part in error["loc"]]
    path = ".".join(place)
    if error["type"] == "extra_forbidden":
        fields = _fields_at(place[:-1])
        return f"{path}: unknown key{_near(place[-1], fields)}; valid are {', '.join(fields)}"
    if error["type"] == "missing":
        return f"{path}: missing; give it, or a preset ({', '.join(PRESETS)})"
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {said}" if path else said
    return f"{path}: found {error['input']!r}; {said[0].lower()}{said[1:]}"


def _fields_at(place: Sequence[str]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for name in place:
        section = _section(section, name) or section
    return list(section.model_fields)


def _section(parent: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that a field of another holds, if it holds one."""
    annotation = parent.model_fields[name].annotation if name in parent.model_fields else None
    options = (annotation, *getattr(annotation, "__args__", ()))
    return next((kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _near(name: str, names: Any) -> str:
    return nearest(name, names).rstrip(".")


def _lines(section: BaseModel, indent: str, preset: str | None, commented: bool, at: str = "") -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value, path = getattr(section, name), f"{at}{name}"
        source = presets.source(preset, path, _plain(value)) if preset else None
        text = f"{field.description} ({source})" if source else field.description
        comment = f"  # {text}" if commented else ""
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:{comment}"
            yield from _lines(value, indent + "  ", preset, commented, f"{path}.")
        else:
            yield f"{indent}{name}: {_yaml(value)}{comment}"


def _yaml(value: Any) -> str:
    plain = _plain(value)
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True).strip()
    return text.removesuffix("...").strip()


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML has."""
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value
