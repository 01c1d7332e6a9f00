"""From the user's configuration to the plain values that the passes take."""

from __future__ import annotations

from .config import BladeConfig
from .passes.decide import Settings


def settings_of(config: BladeConfig) -> Settings:
    """The passes' settings of a configuration."""
    return Settings(
        policy=config.policy,
        sparsity=config.sparsity,
        tau=config.tau,
        min_keep=config.min_keep,
        max_keep=config.max_keep,
        block_size=config.block,
        probe_tokens=config.probe_tokens,
        seed=config.seed,
        protect=config.protect,
        when=config.when,
        min_tokens=config.min_tokens,
        include=config.include,
        exclude=config.exclude,
        inline_kernels=config.inline_kernels,
    )
