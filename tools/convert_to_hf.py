#!/usr/bin/env python3
"""Write a checkpoint as a Hugging Face folder that needs only torch and transformers.

    oryx convert to-hf RUN OUT --verify
    oryx convert to-hf RUN/checkpoints/iteration_0001000 OUT --dtype bf16 --shard-gb 2

RUN is a run folder (its newest checkpoint) or a checkpoint, written under any layout. One process suffices; memory
beyond the libraries' own stays far below the size of the model (--verify loads it whole).
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import argparse
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from oryx_megatron import storage
from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.config.plans import HELP as PLAN
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.display import shown
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import expand_arguments, is_url
from oryx_megatron.storage import Remote, named


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="run folder or checkpoint; also s3://…")
    parser.add_argument("output", help="folder to make; also s3://…")
    parser.add_argument(
        "--dtype", choices=("keep", "bf16", "fp32"), default="keep", help="format of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--weights", choices=("trained", "ema"), default="trained", help="ema: their average (default: %(default)s)"
    )
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file in GB (default: %(default)g)")
    parser.add_argument("--mode-plan", help=f"used where a caller gives none (default: attention); {PLAN}")
    parser.add_argument("--tokenizer", help="tokenizer folder (default: the run's)")
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    parser.add_argument("--license", metavar="ID", help="of the weights, as apache-2.0 (default: the run's `license`)")
    parser.add_argument(
        "--verify", action="store_true", help="compare logits and generation first; OUTPUT appears if they agree"
    )
    parser.add_argument("--push", metavar="REPO", help="then upload OUTPUT to this repository of the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make a new REPO private")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT, and the export in REPO")
    return parser


def check(arguments: Sequence[str], run: RunConfig) -> None:
    """Hold arguments without the checkpoint against the config of a run that is not trained yet.

    Raises:
        ConfigError: the conversion of such a run fails: an option, a mode plan, no average.
    """
    from oryx_megatron.config.plans import layer_plans, parse_runs, read_plan
    from oryx_megatron.hf.plans_oryx import routed_share

    output = [] if arguments and not arguments[0].startswith("-") else [f"{run.output_dir}/hf"]
    parsed = _parser().parse_args([run.output_dir, *output, *arguments])
    _check_options(parsed)
    if parsed.weights == "ema" and run.train.ema is None:
        raise ConfigError("--weights: ema, but the run keeps no average; set train.ema")
    if parsed.mode_plan is not None and routed_share(plan := read_plan(parsed.mode_plan)) is None:
        for part in layer_plans(plan, run.model.num_layers) or (plan,):
            parse_runs(part, 0, chunk=1, prompt=0, shorter=True)


def _check_options(arguments: argparse.Namespace) -> None:
    if not arguments.shard_gb > 0:
        raise ConfigError(f"--shard-gb: {arguments.shard_gb:g} should be above 0")
    if arguments.private and arguments.push is None:
        raise ConfigError("--private: has no effect without --push")
    if arguments.push is not None and is_url(arguments.output):
        raise ConfigError(f"--push: OUTPUT {arguments.output} is no local folder; export to one")


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, convert, verify, report."""
    arguments = _parser().parse_args(argv)
    expand_arguments(arguments, "checkpoint", "output", urls=True)
    expand_arguments(arguments, "--tokenizer")
    _check_options(arguments)
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    if arguments.push is not None:
        from oryx_megatron.hf.hub import check_push

        check_push(arguments.push, overwrite=arguments.overwrite)
    from oryx_megatron.config.plans import read_plan
    from oryx_megatron.hf.convert import export
    from oryx_megatron.hf.remote import check_free, publish
    from oryx_megatron.hf.verify import verify, verify_generation

    lines: list[str] = []

    def check(folder: Path) -> None:
        names = arguments.checkpoint, arguments.output
        for compare in (verify, verify_generation):
            lines.extend(map(str, compare(arguments.checkpoint, folder, weights=arguments.weights, names=names)))

    there = Remote(arguments.output) if is_url(arguments.output) else None
    target = arguments.output
    if there is not None:
        check_free(there, overwrite=arguments.overwrite)
        target = storage.entry("models", f"{there.url}#being made") / there.name
        shutil.rmtree(target, ignore_errors=True)
    done = export(
        arguments.checkpoint,
        target,
        dtype=arguments.dtype,
        weights=arguments.weights,
        shard_bytes=int(arguments.shard_gb * 1e9),
        mode_plan=None if arguments.mode_plan is None else read_plan(arguments.mode_plan),
        tokenizer=arguments.tokenizer,
        with_tokenizer=not arguments.no_tokenizer,
        license=arguments.license,
        overwrite=arguments.overwrite,
        check=check if arguments.verify else None,
    )
    if there is not None:
        publish(done.target, there)
        shutil.rmtree(done.target)
    what = f"{named(done.source)} → {arguments.output}: {done.model.name}"
    print(f"{shown(what)}, {done.tensors} tensors, {done.bytes / 1e6:.1f} MB")
    for line in lines:
        print(line)
    if arguments.push is not None:
        from oryx_megatron.hf.hub import push

        print(f"pushed: {push(done.target, arguments.push, private=arguments.private)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
