"""``BladeConfig``: every setting of the backend, its default and its validity."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .kernels import policies
from .kernels.presets import PRESETS
from .kernels.schedule import Schedule

Order = Literal["none", "gilbert", "tile"]
When = Literal["auto", "always", "never"]
Probe = Literal["sample", "mean"]

BLOCK_SIZES = (16, 32, 64, 128)
_TAU_FIELDS = {"tau": 0.95, "min_keep": 0.05, "max_keep": 1.0}


@dataclass(frozen=True, kw_only=True)
class BladeConfig:
    """How attention is made sparse. Pass the fields as ``torch.compile(model, backend="blade", options={...})``.

    Raises ``ValueError`` for a value that isn't valid, naming the field, the value found and the valid ones.
    """

    policy: str = "asa"
    """how blocks are chosen: ``asa`` (sampled probe, BLADE), ``asa_g`` (with pooled global tokens), ``adaspa`` (exact
    search, reused over steps), ``dense``; for comparison ``vsa``, ``sparge``, ``xattention``, ``sta``, ``radial``"""
    preset: str | None = None
    "a published configuration by name, ``wan2.1-1.3b`` or ``cogvideox-5b``: values of the fields left at their default"
    sparsity: float | None = None
    """share of key blocks dropped in each row, in [0, 1); None: the policy's own (0.8 for ``adaspa``, ``vsa``, ``sta``,
    ``radial``), or chosen by ``tau``"""
    tau: float = 0.95
    "predicted attention mass to keep in each row, in (0, 1]"
    min_keep: float = 0.05
    "smallest kept share of a row under ``tau``, in (0, 1]"
    max_keep: float = 1.0
    "largest kept share of a row under ``tau``, in (0, 1]"
    block_size: int | None = None
    "tokens in a query block and in a key block: 16, 32, 64, 128; None: 128, but 64 for ``adaspa`` and ``vsa``"
    probe_tokens: int = 16
    "tokens sampled from each block by the probe, 1 to block_size"
    seed: int = 0
    "seed of the probe's sample, 0 to 2**31 - 1"
    probe: str = "sample"
    "what ``asa`` ranks blocks by: ``sample`` (sampled tokens) or ``mean`` (mean-pooled blocks)"
    global_window: int = 30
    "tokens pooled into one global token by ``asa_g``"
    similarity: float = 0.6
    "``sparge``: blocks whose tokens are less alike (mean cosine) are always kept, in [-1, 1]"
    stride: int = 16
    "``xattention``: stride of the antidiagonals, 1 to block_size"
    search_steps: tuple[int, ...] | None = None
    """``adaspa``: steps of a generation, counted from 1, at which masks are searched; dense before the first. None: at
    20 % and 60 % of the steps (10 and 30 of 50)"""
    head_adaptive: bool = True
    "``adaspa``: heads with high recall drop more, as many with low recall less"
    drift: float | None = None
    "``adaspa``: search again when the mass on a reused mask has fallen by this share, in (0, 1)"
    dense_steps: int = 0
    "first steps of a generation that stay dense"
    sparsity_steps: tuple[tuple[int, float], ...] = ()
    "(step, sparsity) pairs: the sparsity from that step of a generation on, counted from 1"
    order: str = "none"
    """token order inside the attention, undone on the way out: ``gilbert`` (curve through the token grid), ``tile``
    (3-D tiles), ``none``"""
    grid: tuple[int, int, int] | None = None
    "token grid (T, H, W); its product is the number of tokens that are not protected. None: found in the graph"
    protect: str | tuple[tuple[int, int], ...] = "auto"
    "tokens never dropped: ``auto`` (found in the graph) or (start, length) ranges; start < 0 counts from the end"
    when: str = "auto"
    "``auto``: sparse where predicted faster; ``always``: the block path everywhere; ``never``: dense"
    min_tokens: int = 2048
    "a site with fewer key tokens stays dense under ``auto``"
    include: tuple[str, ...] = ()
    "module paths that may be rewritten, as shell patterns (``blocks.*.attn1``); empty: all"
    exclude: tuple[str, ...] = ()
    "module paths that stay dense, as shell patterns"
    inline_kernels: bool = False
    "on CUDA, Inductor launches blade's Triton kernels itself instead of calling the operators (``when='always'`` only)"
    mode: str | None = None
    "Inductor mode, e.g. ``max-autotune`` (torch.compile refuses ``mode`` and ``options`` together)"
    calibration: str | None = None
    "path of a file that `calibrate` wrote: budgets for each site and head"

    def __post_init__(self) -> None:
        self._apply_preset()
        self._apply_calibration()
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        object.__setattr__(self, "protect", _ranges(self.protect))
        self._check_choices()
        self._check_numbers()
        self._check_geometry()
        self._check_steps()
        self._check_combination()

    @property
    def block(self) -> int:
        """The block size in tokens."""
        return self._own("block_size") or 128

    @property
    def inner_order(self) -> str:
        """The order of the tokens inside the attention: the field's, or the policy's own where it was left at none."""
        own: str = policies.defaults(self.policy).get("order", "none")
        return own if self.order == "none" else self.order

    @property
    def budget(self) -> float | None:
        """The share of key blocks dropped in each row; None: ``tau`` decides."""
        changed = any(getattr(self, name) != default for name, default in _TAU_FIELDS.items())
        return self.sparsity if changed else self._own("sparsity")

    @property
    def mass(self) -> float:
        """The predicted mass to keep in each row where there is no budget."""
        return self.tau if self.tau != _TAU_FIELDS["tau"] else policies.defaults(self.policy).get("tau", self.tau)

    @property
    def policy_options(self) -> str:
        """The policy's own options as the operators take them."""
        names = policies.options(self.policy)
        own = {name: getattr(self, name) for name in names if name in _FIELD_NAMES}
        return "{" + ", ".join(f'"{name}": {_json(own[name])}' for name in sorted(own)) + "}" if own else ""

    @property
    def schedule(self) -> Schedule:
        """What changes over the steps of a generation."""
        return Schedule(self.dense_steps, self.sparsity_steps, self.search_steps, self.head_adaptive, self.drift)

    def _own(self, name: str) -> Any:
        """A field, or the policy's default where it was left at None."""
        value = getattr(self, name)
        return policies.defaults(self.policy).get(name) if value is None else value

    def _apply_preset(self) -> None:
        if self.preset is None:
            return
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        changed = {name: getattr(self, name) for name, default in fields.items() if getattr(self, name) != default}
        for name, value in _with_preset(changed).items():
            object.__setattr__(self, name, value)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all fields."""
        return _FIELD_NAMES

    @classmethod
    def of(cls, config: BladeConfig | Mapping[str, Any] | None) -> BladeConfig:
        """A config from itself, from a mapping of its fields, or the default.

        In a mapping a field beside ``preset`` stands as it is given, also where it is given its default.
        """
        if config is None:
            return cls()
        if isinstance(config, BladeConfig):
            return config
        if not isinstance(config, Mapping):
            raise ValueError(f"config is a {type(config).__name__}; expected a BladeConfig or a mapping of its fields.")
        for key in config:
            if key not in cls.names():
                raise ValueError(f"unknown option {key!r}{nearest(key, cls.names())}.")
        return cls(**(config if config.get("preset") is None else _with_preset(config)))

    def _apply_calibration(self) -> None:
        if self.calibration is None:
            return
        if not isinstance(self.calibration, (str, os.PathLike)):
            raise ValueError(f"calibration={self.calibration!r}; valid is the path of a calibration file, or None.")
        changed = [name for name in ("sparsity", *_TAU_FIELDS) if getattr(self, name) != self._default(name)]
        if changed:
            raise ValueError(f"calibration together with {', '.join(changed)}: the file holds the budgets; give one.")
        from . import budgets

        for name, value in budgets.kept_options(self.calibration).items():
            if getattr(self, name) == self._default(name):
                object.__setattr__(self, name, value)
            elif getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}, but the calibration {str(self.calibration)!r} was made with "
                    f"{name}={value!r}; leave it out, or calibrate again."
                )

    def _default(self, name: str) -> Any:
        return next(field.default for field in dataclasses.fields(self) if field.name == name)

    def _check_choices(self) -> None:
        choices = {
            "policy": policies.names(),
            "order": get_args(Order),
            "when": get_args(When),
            "probe": get_args(Probe),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r}; valid are {', '.join(map(repr, valid))}.")
        for name in ("inline_kernels", "head_adaptive"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}; valid are True and False.")

    def _check_numbers(self) -> None:
        if self.block_size is not None and (type(self.block_size) is not int or self.block_size not in BLOCK_SIZES):
            raise ValueError(f"block_size={self.block_size!r}; valid are {', '.join(map(str, BLOCK_SIZES))} or None.")
        if self.sparsity is not None:
            _check_number("sparsity", self.sparsity, 0.0, 1.0, low_open=False, high_open=True)
        for name in _TAU_FIELDS:
            _check_number(name, getattr(self, name), 0.0, 1.0, low_open=True, high_open=False)
        _check_number("similarity", self.similarity, -1.0, 1.0, low_open=False, high_open=False)
        _check_integer("global_window", self.global_window, 1, 2**31 - 1)
        _check_integer("probe_tokens", self.probe_tokens, 1, self.block)
        _check_integer("seed", self.seed, 0, 2**31 - 1)
        _check_integer("min_tokens", self.min_tokens, 0, 2**62)
        if self.policy == "xattention":
            _check_integer("stride", self.stride, 1, self.block)
            if self.block % self.stride:
                raise ValueError(f"stride={self.stride} doesn't divide block_size={self.block}; take a power of two.")
        if self.min_keep > self.max_keep:
            raise ValueError(f"min_keep={self.min_keep} is above max_keep={self.max_keep}; swap or equal them.")

    def _check_geometry(self) -> None:
        if self.grid is None:
            return
        sizes = tuple(self.grid) if isinstance(self.grid, (list, tuple)) else ()
        if len(sizes) != 3 or not all(type(n) is int and n > 0 for n in sizes):
            raise ValueError(f"grid={self.grid!r}; valid are three positive integers (T, H, W) or None.")
        object.__setattr__(self, "grid", sizes)

    def _check_steps(self) -> None:
        if self.search_steps is not None:
            if not isinstance(self.search_steps, (list, tuple)):
                raise ValueError(f"search_steps={self.search_steps!r}; valid are ascending steps such as (10, 30).")
            object.__setattr__(self, "search_steps", tuple(self.search_steps))
        pairs = self.sparsity_steps
        if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
            raise ValueError(
                f"sparsity_steps={pairs!r}; valid are (step, sparsity) pairs such as ((1, 0.5), (9, 0.8))."
            )
        for _, sparsity in pairs:
            _check_number("sparsity_steps", sparsity, 0.0, 1.0, low_open=False, high_open=True)
        object.__setattr__(self, "sparsity_steps", tuple((step, sparsity) for step, sparsity in pairs))
        _ = self.schedule  # checks the rest

    def _check_combination(self) -> None:
        if self.policy == "adaspa" and self.sparsity is None and self.budget is None:
            raise ValueError("policy='adaspa' has a fixed budget; give sparsity instead of tau, min_keep, max_keep.")
        if self.sparsity is None:
            return
        changed = [name for name, default in _TAU_FIELDS.items() if getattr(self, name) != default]
        if changed:
            raise ValueError(
                f"sparsity={self.sparsity} together with {', '.join(changed)}: sparsity fixes the budget, "
                "and these choose it; give one or the other."
            )


_FIELD_NAMES = tuple(field.name for field in dataclasses.fields(BladeConfig))  # a constant: Dynamo can't ask for fields


def _with_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's values, and the given ones instead of or beside them; without the preset's name."""
    preset = given["preset"]
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset={preset!r}; valid are {', '.join(map(repr, PRESETS))} or None.")
    budgeted = given.get("sparsity") is not None or given.get("calibration") is not None
    # a budget of the user's own takes the place of the preset's
    values = {name: value for name, value in PRESETS[preset].items() if not (budgeted and name in _TAU_FIELDS)}
    return {**values, **{name: value for name, value in given.items() if name != "preset"}}


def nearest(key: str, names: Iterable[str]) -> str:
    """``; did you mean 'a' or 'b'?`` for an unknown key, or nothing."""
    close = difflib.get_close_matches(key, list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _json(value: str | bool | float) -> str:
    """A field as JSON, in words that Dynamo can trace: a direct call may stand inside a compiled function."""
    if isinstance(value, str):
        return f'"{value}"'
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _check_number(name: str, value: Any, low: float, high: float, *, low_open: bool, high_open: bool) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (low <= value <= high) or (low_open and value == low) or (high_open and value == high):
        interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
        raise ValueError(f"{name}={value!r}; valid is a number in {interval}.")


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}; valid is an integer from {low} to {high}.")


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{name}={value!r}; valid is a tuple of module-path patterns such as ('blocks.*.attn1',).")
    return tuple(items)


def _ranges(value: Any) -> str | tuple[tuple[int, int], ...]:
    if isinstance(value, str) and value == "auto":
        return "auto"
    problem = f"protect={value!r}; valid are 'auto' or (start, length) ranges of tokens such as ((0, 226),)."
    if not isinstance(value, (list, tuple)):
        raise ValueError(problem)
    ranges = []
    for item in value:
        if (
            not isinstance(item, (list, tuple))
            or len(item) != 2
            or not all(type(n) is int for n in item)
            or item[1] < 0
        ):
            raise ValueError(problem)
        ranges.append((item[0], item[1]))
    return tuple(ranges)
