"""The callbacks of a run, as its config asks for them."""

from __future__ import annotations

import importlib.util
import socket
import sys
from pathlib import Path

from oryx_megatron import platform
from oryx_megatron.config import to_dict, to_yaml
from oryx_megatron.config.schema import LoggingConfig, RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import is_url
from oryx_megatron.storage import Remote
from oryx_megatron.train import metrics
from oryx_megatron.train.callbacks.base import Callback, Callbacks
from oryx_megatron.train.callbacks.display import Display
from oryx_megatron.train.callbacks.events import History
from oryx_megatron.train.callbacks.metrics_file import MetricsFile
from oryx_megatron.train.callbacks.profile import Profile
from oryx_megatron.train.callbacks.tensorboard import TensorBoard
from oryx_megatron.train.callbacks.weights_and_biases import WeightsAndBiases
from oryx_megatron.train.clock import Clock


def check_installed(logging: LoggingConfig) -> None:
    """Raise ConfigError for a reporter whose package is missing."""
    for field, wanted, package, off in (
        ("tensorboard", logging.tensorboard, "tensorboard", "false"),
        ("wandb_project", logging.wandb_project, "wandb", "null"),
    ):
        if wanted and package not in sys.modules and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"logging.{field}: {package} is not installed; `pip install {package}`, or set it to {off}"
            )


def profiler(run: RunConfig, rank: int, folder: Path) -> Callbacks:
    """What profiles this rank into `folder`, if it is to be."""
    window, ranks = run.logging.profile, run.logging.profile_ranks
    if window is None or rank not in ranks:
        return Callbacks()
    there = Remote(run.output_dir) if is_url(run.output_dir) else None
    return Callbacks([Profile(folder, *window, out=sys.stdout if rank == min(ranks) else None, remote=there)])


def reporters(run: RunConfig, layout: Layout, clock: Clock, folder: Path) -> Callbacks:
    """What reports a run into `folder`, on rank 0; its config.yaml is written first."""
    peak = platform.peak_flops()
    with replacing(folder / "config.yaml") as temporary:
        temporary.write_text(to_yaml(run))
    facts = {"host": socket.gethostname(), "ranks": layout.world_size, "commit": platform.git_commit()}
    found: list[Callback] = [
        # first: it looks at when the others last wrote, before they do
        History(folder, clock, peak_flops=peak and peak * layout.world_size, facts=facts),
        MetricsFile(folder / metrics.NAME),
        Display(folder, clock, run.logging.interval, run.train.iterations),
    ]
    if run.logging.tensorboard:
        found.append(TensorBoard(folder / "tensorboard"))
    if run.logging.wandb_project:
        found.append(WeightsAndBiases(run.logging.wandb_project, folder, to_dict(run)))
    return Callbacks(found)
