"""A run in this process from its start to its end: platform, process groups, trainer, and all of them put away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from oryx_megatron import parallel, platform
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.train import collector, lock, signals


def fit(
    run: RunConfig,
    layout: Layout,
    stop: signals.StopRequest | None = None,
    after: Callable[[RunConfig, Layout], None] | None = None,
) -> signals.Stop | None:
    """Train, or resume, until the run ends; None at its end, else where and why it stopped.

    Args:
        run: Validated config.
        layout: From `validate(run, world_size)`.
        stop: Takes signals while the run is under way; None leaves them to the caller.
        after: Called at the end of the run, on all ranks, which are in one process group still.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: see `Trainer`.
    """
    platform.use_kernel_cache(run.kernels.cache_dir)
    platform.install()
    held = parallel.exist()  # by a model that was loaded before
    try:
        parallel.initialize(run.parallel, seed=run.seed)
        if stop is not None:
            stop.install()  # not before: a rank that waits for one that died must end when torchrun tells it to
        from oryx_megatron.train.trainer import Trainer

        try:
            stopped = Trainer(run, layout, stop=stop).fit()
        finally:
            lock.release()
            collector.thaw()
        if stopped is None and after is not None:
            if stop is not None:
                stop.restore()
            with contextlib.ExitStack() as left:
                if parallel.is_main_rank():
                    ended = signals.Stop("router not trained yet", run.train.iterations)
                    left.enter_context(signals.resumable(Path(run.output_dir), ended))
                after(run, layout)
        return stopped
    finally:
        if not held:
            parallel.destroy()
        if stop is not None:
            stop.restore()
