"""What a family of models needs beyond its weights: shapes, noise schedule, call convention, conditions.

One small file per family, ``adapter_<family>.py``, says how the family's diffusers pipeline calls its transformer.

A new family:

1. Write ``adapter_<family>.py`` with a subclass of ``Adapter``: the class attributes, ``latent_shape``, ``token_grid``,
   ``conditions`` and ``encode``; ``call`` only where the transformer isn't called with ``hidden_states``, ``timestep``
   and the conditions, or returns more than its prediction.
2. Name it in ``_FAMILIES`` below and in ``config_sections.Family``.
3. Add a tiny configuration to ``tests/distill/test_adapters.py``: its pipeline's own call has to give the same numbers.

A model that diffusers doesn't have needs none of this: ``model.factory=module:callable`` names a function that returns
``(nn.Module, adapter)``, where the adapter has the members of ``Adapter`` (``adapter_digits.py`` is an example).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blade_compile.distill.config_sections import LatentConfig, ModelConfig
from blade_compile.distill.errors import ConfigError
from blade_compile.distill.grids import Grid, flow_grid, scheduler_grid, vp_grid
from blade_compile.distill.model_files import ModelFiles
from blade_compile.distill.schedules import FlowSchedule, Prediction, Schedule, schedule_of

Conditions = dict[str, Any]
"""Keyword arguments of a transformer: tensors ``[B, ...]``, or what all samples share (position ids, sizes)"""

_FAMILIES = {
    "WanTransformer3DModel": "wan",
    "CogVideoXTransformer3DModel": "cogvideox",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "LTXVideoTransformer3DModel": "ltx",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "PixArtTransformer2DModel": "pixart",
    "DiTTransformer2DModel": "dit",
}


_MEMBERS = (
    "family", "block_lists", "latent_shape", "token_grid", "conditions", "call", "schedule", "grid", "prediction"
)  # fmt: skip


class Adapter:
    """One family. Latents ``[B, ...]`` have the layout that the transformer takes and that the pipeline's ``latents=``
    accepts (packed for Flux and LTX); times are those of the scheduler.
    """

    family: ClassVar[str]
    block_lists: ClassVar[tuple[str, ...]]
    "module lists of the transformer whose members are compiled, sharded and checkpointed one by one"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    time_layers: ClassVar[tuple[str, ...]] = ("timestep_embedder.linear_2",)
    "ends of the names of the time embedding's last linear layers, through which a student is told K"
    text_tokens: ClassVar[int] = 0
    "tokens of text that share the self-attention by default; 0: text by cross-attention, or none"
    held_by_root: ClassVar[tuple[str, ...]] = ()
    "blocks, as <list>.<index>, that the transformer also reads outside their own call: never sharded by themselves"
    compression: ClassVar[tuple[int, int]] = (1, 8)
    "frames and pixels per latent where the model folder has no VAE"

    def __init__(
        self,
        transformer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        vae: Mapping[str, Any] | None = None,
        pipeline: Mapping[str, Any] | None = None,
    ) -> None:
        """From the folder's configurations: transformer, scheduler, VAE, and ``model_index.json``."""
        self.transformer, self.scheduler = transformer, scheduler
        self.pipeline = pipeline or {}
        self.frames_per_latent, self.pixels_per_latent = self.vae_compression(vae) if vae else self.compression

    # What a family says.

    def latent_shape(self, latent: LatentConfig, batch: int) -> tuple[int, ...]:
        """Shape of a batch of latents. Raises ``ConfigError`` for a clip that the model can't make."""
        raise NotImplementedError

    def token_grid(self, latent: LatentConfig) -> tuple[int, int, int]:
        """Tokens along time, height and width, in raster order."""
        raise NotImplementedError

    def conditions(self, embeddings: Mapping[str, Tensor], latent: LatentConfig) -> Conditions:
        """Keyword arguments of the transformer.

        Args:
            embeddings: of a batch, from ``encode`` or read back from disk, ``[B, ...]``.
            latent: the clip.
        """
        raise NotImplementedError

    def encode(self, pipeline: Any, prompts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """Embed prompts by the pipeline's own ``encode_prompt``: one row per prompt in each tensor."""
        raise NotImplementedError

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's embeddings at the default length, for estimates."""
        raise NotImplementedError

    def call(
        self, model: nn.Module, x: Tensor, time: Tensor, condition: Mapping[str, Any], guidance: float | None = None
    ) -> Tensor:
        """The model's prediction.

        Args:
            model: the transformer, plain or compiled.
            x: noisy latents.
            time: of the scheduler, any real number, ``[B]``.
            condition: from ``conditions``.
            guidance: for models that take it as an input; ignored by others.

        Returns:
            What ``prediction`` says, in the shape of ``x``.
        """
        out: Tensor = model(
            hidden_states=x,
            timestep=self.model_time(x, time),
            **self.guidance_inputs(x, guidance),
            **condition,
            return_dict=False,
        )[0]
        return out

    def model_time(self, x: Tensor, time: Tensor) -> Tensor:
        """The time as the transformer takes it."""
        return time.to(torch.float32)

    def guidance_inputs(self, x: Tensor, guidance: float | None) -> Conditions:
        """The guidance scale as the transformer takes it."""
        return {}

    def sampler_sigmas(self, steps: int) -> list[float] | None:
        """The noise levels that the pipeline passes to the scheduler; None: it leaves them to the scheduler."""
        return None

    def vae_compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        """Frames and pixels per latent."""
        return 1, 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)

    # What follows from it.

    def example_embeddings(self, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """A batch of the right shapes, all ones."""
        return {name: torch.ones(batch, *shape, dtype=dtype) for name, shape in self.embedding_shapes().items()}

    @property
    def embedded_guidance(self) -> bool:
        """Whether the model takes the guidance scale as an input."""
        return bool(self.transformer.get("guidance_embeds"))

    @property
    def prediction(self) -> Prediction:
        """What the model predicts: flow, epsilon, v or sample."""
        return schedule_of(self.scheduler).prediction

    def scheduler_config(self, latent: LatentConfig) -> dict[str, Any]:
        """The scheduler's configuration with a shift that depends on the number of tokens replaced by its value."""
        config = {k: v for k, v in self.scheduler.items() if k == "_class_name" or not k.startswith("_")}
        if not config.get("use_dynamic_shifting"):
            return config
        mu = self._mu(math.prod(self.token_grid(latent)))
        linear = config.get("time_shift_type", "exponential") == "linear"
        return config | {"use_dynamic_shifting": False, "shift": mu if linear else math.exp(mu)}

    def schedule(self, latent: LatentConfig) -> Schedule:
        """The noise schedule of real-valued times."""
        try:
            return schedule_of(self.scheduler_config(latent))
        except ValueError as error:
            raise ConfigError(f"the model's scheduler/scheduler_config.json: {error}") from None

    def grid(self, latent: LatentConfig, steps: int) -> Grid:
        """The steps that a student is trained on, which the exported scheduler (``samplers.py``) then visits.

        Trailing steps: the first is pure noise. Flow matching: u = 1, 1 - 1/K .. 1/K, shifted; variance preserving:
        T - 1, T - 1 - T/K .. T/K - 1.
        """
        schedule = self.schedule(latent)
        try:
            return flow_grid(schedule, steps) if isinstance(schedule, FlowSchedule) else vp_grid(schedule, steps)
        except ValueError as error:
            raise ConfigError(f"method: {error}") from None

    def pipeline_grid(self, latent: LatentConfig, steps: int) -> Grid:
        """The times that the family's pipeline visits in so many steps of the model folder's scheduler."""
        import diffusers

        config = self.scheduler_config(latent)
        schedule = self.schedule(latent)
        kind = getattr(diffusers, str(config.get("_class_name")), None)
        if kind is None:
            raise ConfigError(f"scheduler {config.get('_class_name')!r} is not one of diffusers'; give another")
        sigmas = None if config.get("use_flow_sigmas") else self.sampler_sigmas(steps)
        try:
            return scheduler_grid(kind.from_config(config), schedule, steps, sigmas)
        except (ValueError, IndexError) as error:
            raise ConfigError(f"method.steps is {steps}, which {config['_class_name']} can't take: {error}") from None

    def _mu(self, tokens: int) -> float:
        """The shift's logarithm by the number of tokens: ``calculate_shift`` of diffusers (Esser et al., 5.3.2)."""
        get = self.scheduler.get
        low, high = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
        first, last = get("base_shift", 0.5), get("max_shift", 1.15)
        return float(first + (last - first) * (tokens - low) / (high - low))

    # Sizes shared by the families.

    def latent_sizes(self, latent: LatentConfig) -> tuple[int, int, int]:
        """Frames, rows and columns of latents; each has to come out whole, and in whole patches."""
        frames = latent.num_frames - 1
        if frames % self.frames_per_latent:
            fits = frames // self.frames_per_latent * self.frames_per_latent + 1
            raise ConfigError(
                f"latent.num_frames is {latent.num_frames}; {self.family} wants 1 more than a multiple of "
                f"{self.frames_per_latent}: {fits} or {fits + self.frames_per_latent}"
            )
        unit = [self.pixels_per_latent * p for p in self.patch[1:]]
        for name, size, n in zip(("height", "width"), (latent.height, latent.width), unit):
            if size % n:
                fits = size // n * n
                near = f"{fits} or {fits + n}" if fits else str(n)
                raise ConfigError(f"latent.{name} is {size}; {self.family} wants a multiple of {n}: {near}")
        return (
            frames // self.frames_per_latent + 1,
            latent.height // self.pixels_per_latent,
            latent.width // self.pixels_per_latent,
        )

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token."""
        size = self.transformer.get("patch_size", 2)
        return tuple(size) if isinstance(size, (list, tuple)) else (1, size, size)  # type: ignore[return-value]

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.transformer["in_channels"])

    def _patched(self, sizes: Sequence[int]) -> tuple[int, int, int]:
        t, h, w = (n // p for n, p in zip(sizes, self.patch))
        return t, h, w

    def _still(self, latent: LatentConfig) -> None:
        """Refuse more than one frame from a model of images."""
        if latent.num_frames != 1:
            raise ConfigError(f"latent.num_frames is {latent.num_frames}; {self.family} makes images: set it to 1")


def even_sigmas(steps: int) -> list[float]:
    """1, 1 - 1/K .. 1/K: what the Flux, LTX and HunyuanVideo pipelines pass to their scheduler."""
    return [1 - i / steps for i in range(steps)]


def family_of(transformer: Mapping[str, Any], asked: str = "auto") -> str:
    """The family of a transformer's configuration. Raises ``ConfigError`` where it has none, or is of another."""
    name = str(transformer.get("_class_name"))
    if asked != "auto":
        if _FAMILIES.get(name, asked) != asked:
            raise ConfigError(
                f"model.family is {asked!r}, but the transformer is a {name}, which is {_FAMILIES[name]!r}; "
                "set model.family=auto"
            )
        return asked
    if name not in _FAMILIES:
        raise ConfigError(
            f"the transformer is a {name}, for which there is no adapter; valid are {', '.join(_FAMILIES)}. "
            "Set model.family if it is called like one of them, or give model.factory (see distill/adapters.py)"
        )
    return _FAMILIES[name]


def adapter_of(files: ModelFiles, family: str = "auto") -> Adapter:
    """The adapter of a model folder. Raises ``ConfigError`` for a missing or malformed one."""
    pipeline = files.json("model_index.json")
    _check_pipeline(pipeline)
    transformer = files.json("transformer/config.json")
    module = import_module(f"blade_compile.distill.adapter_{family_of(transformer, family)}")
    adapter: Adapter = module.ADAPTER(
        transformer,
        files.json("scheduler/scheduler_config.json"),
        files.json("vae/config.json", optional=True) or None,
        pipeline,
    )
    return adapter


def _check_pipeline(pipeline: Mapping[str, Any]) -> None:
    second = pipeline.get("transformer_2", [None])
    if pipeline.get("boundary_ratio") is not None or (isinstance(second, list) and second and second[0]):
        raise ConfigError("the model has two transformers (Wan 2.2 A14B); only models with one can be distilled")


def load_adapter(model: ModelConfig) -> Adapter:
    """The adapter of a configured model, without its weights."""
    if model.factory is not None:
        return build_by_factory(model, meta=True)[1]
    return adapter_of(ModelFiles(str(model.path), model.revision), model.family)


def load_model(model: ModelConfig, *, meta: bool = False) -> tuple[nn.Module, Adapter]:
    """The transformer with its weights, in eval mode and frozen, and its adapter.

    Eval mode matters: DiT drops class labels at random in training mode.

    Args:
        model: the configuration.
        meta: on the meta device, without weights.

    Raises:
        ConfigError: for a missing or malformed model folder.
    """
    if model.factory is not None:
        return build_by_factory(model, meta=meta)
    import diffusers

    files = ModelFiles(str(model.path), model.revision)
    adapter = adapter_of(files, model.family)
    kind = getattr(diffusers, str(adapter.transformer.get("_class_name")), None)
    if kind is None:
        raise ConfigError(f"transformer class {adapter.transformer.get('_class_name')!r} is not one of diffusers'")
    dtype = getattr(torch, model.dtype)
    try:
        if meta:
            with torch.device("meta"):
                module = kind.from_config(dict(adapter.transformer))
            _cast(module, dtype)
        else:
            module = kind.from_pretrained(
                files.location, subfolder="transformer", revision=model.revision, torch_dtype=dtype
            )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{model.path}: the transformer can't be made: {' '.join(str(error).split())}") from None
    return module.eval().requires_grad_(False), adapter


def _cast(module: Any, dtype: torch.dtype) -> None:
    """Parameters to a dtype, but those that diffusers keeps in fp32."""
    kept = set(module._keep_in_fp32_modules or ())
    for name, parameter in module.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def build_by_factory(model: ModelConfig, *, meta: bool = False) -> tuple[nn.Module, Adapter]:
    """Call ``module:callable``, which returns (nn.Module, adapter)."""
    module, _, name = str(model.factory).partition(":")
    try:
        function: Any = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.factory={model.factory}: {error}") from None
    if meta:
        with torch.device("meta"):
            made = function()
    else:
        made = function()
    fits = isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)
    missing = [n for n in _MEMBERS if not hasattr(made[1], n)] if fits else []
    if not fits or missing:
        found = f"an adapter without {', '.join(missing)}" if missing else f"a {type(made).__name__}"
        raise ConfigError(f"model.factory={model.factory} returned {found}; valid is (nn.Module, adapter)")
    return made[0].eval().requires_grad_(False), made[1]
