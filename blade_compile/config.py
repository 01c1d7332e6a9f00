"""``BladeConfig``: every setting of the backend, its default and its validity."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Policy = Literal["asa", "asa_g", "adaspa", "dense"]
Order = Literal["none", "gilbert", "tile"]
When = Literal["auto", "always", "never"]

AVAILABLE_POLICIES = ("asa", "dense")
BLOCK_SIZES = (16, 32, 64, 128)
_TAU_FIELDS = {"tau": 0.95, "min_keep": 0.05, "max_keep": 1.0}


@dataclass(frozen=True, kw_only=True)
class BladeConfig:
    """How attention is made sparse. Pass the fields as ``torch.compile(model, backend="blade", options={...})``.

    Raises ``ValueError`` for a value that isn't valid, naming the field, the value found and the valid ones.
    """

    policy: str = "asa"
    "how blocks are chosen: ``asa`` (sampled probe, BLADE) or ``dense``"
    preset: str | None = None
    "a published configuration by name"
    sparsity: float | None = None
    "share of key blocks dropped in each row, in [0, 1); None: chosen by ``tau``"
    tau: float = 0.95
    "predicted attention mass to keep in each row, in (0, 1]"
    min_keep: float = 0.05
    "smallest kept share of a row under ``tau``, in (0, 1]"
    max_keep: float = 1.0
    "largest kept share of a row under ``tau``, in (0, 1]"
    block_size: int | None = None
    "tokens in a query block and in a key block: 16, 32, 64, 128; None: 128"
    probe_tokens: int = 16
    "tokens sampled from each block by the probe, 1 to block_size"
    seed: int = 0
    "seed of the probe's sample, 0 to 2**31 - 1"
    order: str = "none"
    "token order inside the attention"
    grid: tuple[int, int, int] | None = None
    "token grid (T, H, W)"
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
    "path of a calibration file"

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        object.__setattr__(self, "protect", _ranges(self.protect))
        self._check_choices()
        self._check_numbers()
        self._check_combination()

    @property
    def block(self) -> int:
        """The block size in tokens."""
        return 128 if self.block_size is None else self.block_size

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all fields."""
        return _FIELD_NAMES

    @classmethod
    def of(cls, config: BladeConfig | Mapping[str, Any] | None) -> BladeConfig:
        """A config from itself, from a mapping of its fields, or the default."""
        if config is None:
            return cls()
        if isinstance(config, BladeConfig):
            return config
        if not isinstance(config, Mapping):
            raise ValueError(f"config is a {type(config).__name__}; expected a BladeConfig or a mapping of its fields.")
        for key in config:
            if key not in cls.names():
                raise ValueError(f"unknown option {key!r}{nearest(key, cls.names())}.")
        return cls(**config)

    def _check_choices(self) -> None:
        for name, choices in (("policy", get_args(Policy)), ("order", get_args(Order)), ("when", get_args(When))):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r}; valid are {', '.join(map(repr, choices))}.")
        if self.policy not in AVAILABLE_POLICIES:
            raise ValueError(
                f"policy={self.policy!r} is not available in this version; "
                f"use one of {', '.join(map(repr, AVAILABLE_POLICIES))}."
            )
        for name, inactive in (("order", "none"), ("grid", None), ("preset", None), ("calibration", None)):
            if getattr(self, name) != inactive:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not available in this version; leave it at {inactive!r}."
                )

    def _check_numbers(self) -> None:
        if self.block_size is not None and (type(self.block_size) is not int or self.block_size not in BLOCK_SIZES):
            raise ValueError(f"block_size={self.block_size!r}; valid are {', '.join(map(str, BLOCK_SIZES))} or None.")
        if self.sparsity is not None:
            _check_number("sparsity", self.sparsity, 0.0, 1.0, low_open=False, high_open=True)
        for name in _TAU_FIELDS:
            _check_number(name, getattr(self, name), 0.0, 1.0, low_open=True, high_open=False)
        if not isinstance(self.inline_kernels, bool):
            raise ValueError(f"inline_kernels={self.inline_kernels!r}; valid are True and False.")
        _check_integer("probe_tokens", self.probe_tokens, 1, self.block)
        _check_integer("seed", self.seed, 0, 2**31 - 1)
        _check_integer("min_tokens", self.min_tokens, 0, 2**62)
        if self.min_keep > self.max_keep:
            raise ValueError(f"min_keep={self.min_keep} is above max_keep={self.max_keep}; swap or equal them.")

    def _check_combination(self) -> None:
        if self.sparsity is None:
            return
        changed = [name for name, default in _TAU_FIELDS.items() if getattr(self, name) != default]
        if changed:
            raise ValueError(
                f"sparsity={self.sparsity} together with {', '.join(changed)}: sparsity fixes the budget, "
                "and these choose it; give one or the other."
            )


_FIELD_NAMES = tuple(field.name for field in dataclasses.fields(BladeConfig))  # a constant: Dynamo can't ask for fields


def nearest(key: str, names: Iterable[str]) -> str:
    """``; did you mean 'a' or 'b'?`` for an unknown key, or nothing."""
    close = difflib.get_close_matches(key, list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


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
