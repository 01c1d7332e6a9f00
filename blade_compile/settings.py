"""From the user's configuration to the plain values that the passes take."""

from __future__ import annotations

from . import budgets
from .config import BladeConfig
from .passes.decide import Settings


def settings_of(config: BladeConfig) -> Settings:
    """The passes' settings of a configuration."""
    return Settings(
        policy=config.policy,
        sparsity=config.budget,
        tau=config.mass,
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
        policy_options=config.policy_options,
        schedule=config.schedule.to_json(),
        order=config.inner_order,
        grid=config.grid,
        budgets=() if config.calibration is None else budgets.budgets(config.calibration),
    )
