"""`torchrun … -m oryx_megatron.train RUN.yaml [key=value …]`: pretrain, or resume where the run folder left off.

Exit codes: 0 done, 2 an error of the user's, errors.REQUEUE_EXIT_CODE (75) stopped from outside with everything saved;
under torchrun see train/signals.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

from oryx_megatron import ranks
from oryx_megatron.cli import main_guard
from oryx_megatron.config import load_run, validate
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.display import log_lines, shown
from oryx_megatron.train.signals import StopRequest, exit_code


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, validate and train; see --help."""
    parser = argparse.ArgumentParser(prog="oryx_megatron.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="run config (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change, e.g. parallel.tensor=2")
    parser.add_argument("--dry-run", action="store_true", help="check the config for --world-size ranks and stop")
    parser.add_argument(
        "--world-size", type=int, help="ranks to check for (default: torchrun's, else 1); only with --dry-run"
    )
    arguments = parser.parse_intermixed_args(argv)  # overrides may stand before and after options
    if arguments.world_size is not None and not arguments.dry_run:
        parser.error("--world-size needs --dry-run")
    world_size = arguments.world_size if arguments.world_size is not None else ranks.world_size()
    run = load_run(arguments.config, arguments.overrides)
    layout = validate(run, world_size)
    if arguments.dry_run:
        sys.stdout.write(
            f"{arguments.config} is valid for {layout.world_size} ranks: tensor {layout.tp} × pipeline {layout.pp} × "
            f"context {layout.cp} × data {layout.dp}, {layout.microbatches} microbatches per step\n"
        )
        if run.init_from is not None:
            _preview(run)
        return 0
    _quiet()
    stop = StopRequest()
    # Everything below needs torch and megatron-core: a config error above costs no import.
    from oryx_megatron import platform

    platform.use_kernel_cache(run.kernels.cache_dir)
    platform.install()
    from oryx_megatron import parallel

    try:
        parallel.initialize(run.parallel, seed=run.seed)
        stop.install()  # not before: a rank that waits for one that died must end when torchrun tells it to
        from oryx_megatron.train import lock
        from oryx_megatron.train.trainer import Trainer

        try:
            stopped = Trainer(run, layout, stop=stop).fit()
        finally:
            lock.release()
    finally:
        parallel.destroy()
        stop.restore()
    return 0 if stopped is None else exit_code()


def _preview(run: RunConfig) -> None:
    """Say what the run would start from, and in what it differs."""
    _quiet()
    from oryx_megatron.train import init_from

    for line in init_from.preview(run, Path(run.output_dir) / "checkpoints"):
        sys.stdout.write(f"{shown(line)}\n")


def _quiet() -> None:
    """Log our own messages, from rank 0; leave out warnings about optional packages, which start-up reports itself."""
    launch = ranks.read()
    main_rank = launch is None or launch.rank == 0
    log_lines()
    logging.getLogger("oryx_megatron").setLevel(logging.INFO if main_rank else logging.ERROR)
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\.")


if __name__ == "__main__":
    sys.exit(main())
