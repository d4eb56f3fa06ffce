"""`torchrun … -m oryx_megatron.train RUN.yaml [key=value …]`: pretrain, or resume where the run folder left off.

    oryx train configs/run/own-text.yaml --dry-run
    oryx train configs/run/own-text.yaml train.iterations=600 "evaluation.plans=[attention, ratio:0.1]"
    torchrun --nproc-per-node 2 -m oryx_megatron.train RUN.yaml parallel.tensor=2

The same command resumes. Ctrl-C saves and ends, a second one ends at once. `oryx config` prints all
fields.

Exit codes: 0 done, 2 an error of the user's, 75 stopped from outside with everything saved; torchrun itself ends with 0
or 1.
"""

from __future__ import annotations

import logging
import sys
import textwrap
import warnings

from oryx_megatron import ranks
from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.config import load_run, told_with_place, validate
from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.display import log_lines, number_of, shown
from oryx_megatron.train import ahead, collector
from oryx_megatron.train.signals import StopRequest, exit_code


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, validate and train; see --help."""
    parser = Parser("oryx_megatron.train", description=__doc__)
    parser.add_argument("config", help="run config (YAML)")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="fields to change, e.g. parallel.tensor=2"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the config for --world-size ranks, open what the run would, stop"
    )
    parser.add_argument("--config-only", action="store_true", help="with --dry-run: open no file but the config")
    parser.add_argument(
        "--world-size", type=int, help="ranks to check for (default: torchrun's, else 1); only with --dry-run"
    )
    arguments = parser.parse_intermixed_args(argv)  # overrides may stand before and after options
    for option in ("world_size", "config_only"):
        if getattr(arguments, option) not in (None, False) and not arguments.dry_run:
            parser.error(f"--{option.replace('_', '-')} needs --dry-run")
    world_size = arguments.world_size if arguments.world_size is not None else ranks.world_size()
    run = load_run(arguments.config, arguments.overrides)
    with told_with_place(arguments.config, arguments.overrides):
        layout = validate(run, world_size)
    if arguments.dry_run:
        sys.stdout.write(
            f"{arguments.config} is valid for {number_of(layout.world_size, 'rank')}:\n"
            f"  {layout}, {number_of(layout.microbatches, 'microbatch')} per step\n"
        )
        if run.train.batch_schedule:
            count = SampleCount.of(run.train)
            samples = count.samples_at(run.train.iterations)
            sys.stdout.write(
                f"batch sizes: {count}; {samples} samples, {samples * run.data.sequence_length:,} tokens in all\n"
            )
        if arguments.config_only:
            sys.stdout.write("checked: the config alone (--config-only)\n")
        else:
            _dry_run(run, layout)
        return 0
    _quiet()
    ahead.begin(run)
    stop = StopRequest(main=ranks.rank() == 0)
    with collector.put_off():
        from oryx_megatron.eval.router_recipe import recipe
        from oryx_megatron.train.session import fit  # needs torch and megatron-core: a config error costs no import

        return 0 if fit(run, layout, stop, recipe(run)) is None else exit_code()


def _dry_run(run: RunConfig, layout: Layout) -> None:
    """Open what the run would open, and say what was checked and what was not."""
    _quiet()
    from oryx_megatron import platform

    platform.install()
    from oryx_megatron.eval.router_recipe import recipe
    from oryx_megatron.train import preflight, remote

    remote.check(run)
    recipe(run)
    sys.stdout.write("checked on this machine:\n")
    for checked in preflight.checks(run, layout):
        if not checked.what:
            sys.stdout.write(f"{shown(checked.found)}\n")
            continue
        text = shown(f"{checked.what:<10} {checked.found}")
        lines = textwrap.wrap(text, 78, subsequent_indent=" " * 11, break_on_hyphens=False, break_long_words=False)
        sys.stdout.write("".join(f"  {line}\n" for line in lines))
    sys.stdout.write("not checked: memory of the GPUs (oryx plan), other nodes (oryx health),\n")
    sys.stdout.write("  bytes of checkpoints\n")


def _quiet() -> None:
    """Log our own messages, from rank 0; leave out warnings about optional packages, which start-up reports itself."""
    log_lines()
    logging.getLogger("oryx_megatron").setLevel(logging.INFO if ranks.rank() == 0 else logging.ERROR)
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\.")


if __name__ == "__main__":
    sys.exit(main())
