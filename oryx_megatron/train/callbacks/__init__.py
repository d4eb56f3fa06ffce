"""Hooks into the training loop, one callback a file; `reporters` makes those of a run."""

from oryx_megatron.train.callbacks.base import Callback, Callbacks, StepRecord
from oryx_megatron.train.callbacks.display import Display
from oryx_megatron.train.callbacks.events import History
from oryx_megatron.train.callbacks.metrics_file import MetricsFile
from oryx_megatron.train.callbacks.reporters import check_installed, profiler, reporters
from oryx_megatron.train.callbacks.tensorboard import TensorBoard
from oryx_megatron.train.callbacks.weights_and_biases import WeightsAndBiases

__all__ = [
    "Callback",
    "Callbacks",
    "Display",
    "History",
    "MetricsFile",
    "StepRecord",
    "TensorBoard",
    "WeightsAndBiases",
    "check_installed",
    "profiler",
    "reporters",
]
