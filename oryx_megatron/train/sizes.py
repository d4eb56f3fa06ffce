"""Sizes in a run config that no memory holds: one line before anything is read or allocated.

Each bound is far below what training takes, so that nothing is refused that could work.
"""

from __future__ import annotations

from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.platform import memory

SAMPLE = 10
"""Bytes that the order of samples holds for each: number of the dataset, and of the sample in it."""


def check_sizes(run: RunConfig, layout: Layout) -> None:
    """Raise ConfigError when samples or a microbatch cannot be held by this machine."""
    train, sequence = run.train, run.data.sequence_length
    largest = max(train.global_batch_size, *(stage.global_batch_size for stage in train.batch_schedule), 0)
    steps = f"train.iterations {train.iterations} of train.global_batch_size {largest}"
    rows = f"train.micro_batch_size {train.micro_batch_size} of data.sequence_length {sequence}"
    host = memory.host_bytes()
    memory.check(
        f"{steps}: the numbers of their samples",
        SAMPLE * SampleCount.of(train).samples_at(train.iterations),
        host,
        "lower one of them",
    )
    width = 4 if run.precision.dtype == "fp32" else 2
    memory.check(
        f"{rows}: the activations between two layers",
        width * run.model.hidden_size * train.micro_batch_size * sequence // (layout.cp * layout.tp),
        memory.device_bytes(),
        "lower one of them, or raise parallel.context",
    )
    memory.check(
        f"{rows}: the tokens of a microbatch",
        8 * train.micro_batch_size * sequence,
        host,
        "lower one of them",
    )
