"""`oryx warmup RUN.yaml [key=value …]`: compile a run's kernels into a cache that all nodes share.

    oryx warmup configs/run/pretrain-1.4b-gdn.yaml kernels.cache_dir=/shared/kernels

Needs one GPU of the kind that the run will use, and no other rank: it builds one layer of one tensor-parallel rank's
share. Set kernels.cache_dir to a folder on a file system that every node sees.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
from pathlib import Path

from oryx_megatron import platform
from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.config import load_run, told_with_place, validate
from oryx_megatron.config.schema import LoggingConfig, ModelConfig, ParallelConfig, RunConfig
from oryx_megatron.display import shown
from oryx_megatron.errors import ConfigError


def share_of(run: RunConfig) -> RunConfig:
    """`run` for a single rank, with one layer of each kind of what one rank of `run` holds.

    Under context parallelism these are the heads of which it has whole sequences; kernels over its own rows of all
    heads, which compile in seconds, are left to the first step.
    """
    model, tensor = run.model, run.parallel.tensor
    heads = tensor * run.parallel.context
    share: ModelConfig = dataclasses.replace(
        model,
        num_layers=len(model.kinds),
        pattern=tuple(sorted(model.kinds)) if model.pattern else (),
        num_heads=model.num_heads // heads,
        num_kv_heads=model.kv_heads // heads,
        ffn_hidden_size=model.ffn_hidden_size // tensor,
        vocab_size=128,
        moe=None
        if model.moe is None
        else dataclasses.replace(
            model.moe,
            experts=1,
            top_k=1,
            shared_ffn_hidden_size=model.moe.shared_ffn_hidden_size // tensor,
            first_dense=0,
            frequency=1,
        ),
    )
    return dataclasses.replace(run, model=share, parallel=ParallelConfig())


def check(run: RunConfig) -> None:
    """Raise ConfigError where a run is wrong on any number of ranks, whatever this machine has."""
    layout = run.parallel
    ranks = layout.tensor * layout.context
    data = layout.expert // math.gcd(layout.expert, ranks)  # the fewest that its experts divide
    unprofiled = dataclasses.replace(run.logging, profile=None, profile_ranks=LoggingConfig().profile_ranks)
    validate(dataclasses.replace(run, logging=unprofiled), ranks * layout.pipeline * data)


def compile_share(share: RunConfig) -> None:
    """Compile the kernels of a run of one rank on this GPU, and say which they are and how long it took."""
    from oryx_megatron import parallel
    from oryx_megatron.model import build_model
    from oryx_megatron.model.warm import compile_kernels
    from oryx_megatron.ops import backends

    parallel.initialize(share.parallel, seed=share.seed)
    try:
        work = backends.Workload(share.model, share.precision.dtype)
        backends.select(share.kernels, work)
        sys.stdout.write(f"kernels: {backends.describe(work)}\n")
        chunks = build_model(share.model, share.parallel, share.precision, seed=share.seed)
        sys.stdout.write(f"compiled and loaded in {compile_kernels(share, chunks):.0f} s\n")
    finally:
        parallel.destroy()


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, compile, say what is in the cache; see --help."""
    parser = Parser("oryx_megatron.warmup", description=__doc__)
    parser.add_argument("config", help="run config (YAML)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="fields to change")
    arguments = parser.parse_intermixed_args(argv)
    run = load_run(arguments.config, arguments.overrides)
    with told_with_place(arguments.config, arguments.overrides):
        check(run)
    if not platform.has_gpu():
        raise ConfigError("warmup compiles kernels for the GPU it runs on, and there is none here")
    platform.use_kernel_cache(run.kernels.cache_dir)
    logging.basicConfig(level=logging.WARNING)
    compile_share(share_of(run))
    for variable in platform.KERNEL_CACHES:
        if folder := os.environ.get(variable):
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in files)
            sys.stdout.write(f"  {shown(folder)}: {len(files)} files, {size / 2**20:.1f} MiB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
