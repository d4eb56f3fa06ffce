"""What a run says of itself at start: all that is needed to reproduce it."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
import textwrap

import psutil

from oryx_megatron import arch, platform
from oryx_megatron.checkpoint.manifest import package_versions
from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.schema import ModelConfig, RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.display import number_of
from oryx_megatron.ops import backends


def _parameters(model: ModelConfig) -> str:
    counts = arch.parameter_counts(model)
    active = f", {counts.active:,} active" if model.moe is not None else ""
    return f"{counts.total:,} parameters{active}"


def reproduction(run: RunConfig, layout: Layout) -> list[str]:
    """Everything one needs to do this run again, in lines for a terminal of 80 columns."""
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    facts = {
        "run": f"{run.output_dir}, config in {run.output_dir}/config.yaml, seed {run.seed}",
        "code": f"commit {platform.git_commit() or 'unknown'}",
        "versions": versions,
        "model": f"{run.model.name}, {_parameters(run.model)}, {run.precision.dtype}",
        "layout": f"{number_of(layout.world_size, 'rank')}: {layout}, "
        f"{number_of(layout.microbatches, 'microbatch')} per step",
        **({"batch sizes": str(SampleCount.of(run.train))} if run.train.batch_schedule else {}),
        "host": f"{socket.gethostname()}, {platform.describe()}",
        "kernels": backends.describe(backends.Workload(run.model, run.precision.dtype)),
    }
    lines = []
    for name, text in facts.items():
        lines += textwrap.wrap(f"{name}: {text}", 74, subsequent_indent="  ", break_on_hyphens=False)
    return [*_wrapped("command: ", command()), *lines]


def command() -> list[str]:
    """What started this run: this process's command, or that of torchrun's agent."""
    if "TORCHELASTIC_RUN_ID" in os.environ and (agent := psutil.Process().parent()) is not None:
        with contextlib.suppress(psutil.Error):
            return agent.cmdline()
    return list(sys.orig_argv)


def _wrapped(head: str, words: list[str]) -> list[str]:
    """A command that can be pasted, over lines of at most 74 columns where its words allow that."""
    lines = [head]
    for word in map(shlex.quote, words):
        if len(lines[-1]) + len(word) > 72 and lines[-1] != head:
            lines[-1] += "\\"
            lines.append("  ")
        lines[-1] += f"{word} "
    return [*lines[:-1], lines[-1].rstrip()]
