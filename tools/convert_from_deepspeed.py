#!/usr/bin/env python
"""Make a checkpoint that every layout and tool reads of one that engine deepspeed wrote, optimizer state included.

    oryx convert from-deepspeed runs/zero3 runs/zero3-megatron
    oryx convert to-hf runs/zero3-megatron exported

OUTPUT becomes a run folder: `output_dir=OUTPUT engine=megatron` resumes the training. Works on CPUs, with as many
processes as there were ranks; under torchrun, with those that it starts.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import os
import subprocess
import sys
import warnings
from pathlib import Path

from oryx_megatron import ranks
from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.display import shown
from oryx_megatron.errors import ConversionError
from oryx_megatron.paths import expand_arguments


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Start the ranks, convert; see --help."""
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint, or a run folder (its newest checkpoint is taken)")
    parser.add_argument("output", type=Path, help="run folder to make")
    arguments = parser.parse_args(argv)
    expand_arguments(arguments, "checkpoint", "output")
    warnings.simplefilter("ignore")
    from oryx_megatron.checkpoint import find_checkpoint, list_checkpoints, read_manifest
    from oryx_megatron.checkpoint.store import by_another_engine

    folder = find_checkpoint(arguments.checkpoint)
    if not by_another_engine(folder):
        raise ConversionError(f"{folder} was not written by DeepSpeed: there is nothing to convert")
    manifest = read_manifest(folder)
    wanted = manifest.layout["tp"] * manifest.layout["dp"]
    if (launch := ranks.read()) is None:
        if list_checkpoints(arguments.output / "checkpoints"):
            raise ConversionError(f"{arguments.output} holds checkpoints already; choose another output")
        return _start(wanted, folder, arguments.output)
    if launch.size != wanted:
        raise ConversionError(
            f"{folder} was written by {wanted} ranks, not {launch.size}: start {wanted}, or no torchrun"
        )
    from oryx_megatron import parallel

    run = manifest.run()
    parallel.initialize(run.parallel, seed=run.seed)
    try:
        from oryx_megatron.train.deepspeed import convert

        saved = convert(folder, arguments.output)
        if parallel.is_main_rank():
            print(shown(saved))
    finally:
        parallel.destroy()
    return 0


def _start(count: int, folder: Path, output: Path) -> int:
    """This command again, as so many processes; of what they say of an error, the one line that is meant for users."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), str(Path(__file__).resolve()), str(folder), str(output)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    sys.stderr.write(f"{errors[0]}\n" if done.returncode and errors else done.stderr)
    return 2 if done.returncode and errors else done.returncode


if __name__ == "__main__":
    sys.exit(main())
