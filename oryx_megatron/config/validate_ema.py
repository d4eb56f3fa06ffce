"""Rules of the average of the weights (train.ema) across fields."""

from __future__ import annotations

from oryx_megatron.config.schema import RunConfig
from oryx_megatron.errors import ConfigError


def check_ema(run: RunConfig) -> None:
    """Raise ConfigError where an average cannot be kept, or a start from one cannot be had."""
    ema, settings = run.train.ema, run.init_from
    if settings is not None and settings.weights == "ema" and settings.optimizer:
        raise ConfigError(
            "init_from.optimizer: its state belongs to the trained weights, not to init_from.weights ema; set it to "
            "false"
        )
    if ema is None:
        return
    if ema.start > run.train.iterations:
        raise ConfigError(f"train.ema.start: {ema.start} is after train.iterations {run.train.iterations}; lower it")
    for name, wrong in (
        ("optimizer.cpu_offload", run.optimizer.cpu_offload),  # its masters are copies in host memory
        ("precision.fp8_params", run.precision.fp8_params),  # an average in FP8 could not be swapped in and out exactly
    ):
        if wrong:
            raise ConfigError(f"train.ema: not with {name}; set that to false, or remove train.ema")
