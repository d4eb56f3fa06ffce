"""`torchrun … -m oryx_megatron.train.replay RUN/faults/batch-0000123.json [key=value …]`: do a bad step again.

Resumes from the newest checkpoint before the step, does the steps in between as training did, then the recorded batch
under its recorded plans, and says what came of it. Writes nothing. With the layout of the run and no overrides it is
the same computation bit for bit: numbers that come out finite now point at the device and not at the data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from oryx_megatron import ranks
from oryx_megatron.cli import main_guard
from oryx_megatron.config import load_run, validate
from oryx_megatron.errors import CheckpointError, DataError
from oryx_megatron.paths import expand_arguments
from oryx_megatron.train.trainer import Trainer


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Replay; see --help."""
    parser = argparse.ArgumentParser(prog="oryx_megatron.train.replay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", help="RUN/faults/batch-….json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change")
    arguments = parser.parse_intermixed_args(argv)
    expand_arguments(arguments, "record")
    record = read_record(Path(arguments.record))
    run = load_run(Path(arguments.record).parent.parent / "config.yaml", arguments.overrides)
    layout = validate(run, ranks.world_size())
    from oryx_megatron import parallel

    try:
        parallel.initialize(run.parallel, seed=run.seed)
        trainer = Trainer(run, layout, before=record["iteration"], reports=False)
        again = replay(trainer, record)
        if parallel.is_main_rank():
            sys.stdout.write("".join(f"{line}\n" for line in report(record, again)))
    finally:
        parallel.destroy()
    return 0


def read_record(path: Path) -> dict[str, Any]:
    """A recorded bad step.

    Raises:
        DataError: missing or damaged.
    """
    try:
        record = json.loads(path.read_text())
        record["iteration"], record["consumed_samples"], record["skipped_samples"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no record of a step ({error}); give a RUN/faults/batch-….json") from None
    return record


def replay(trainer: Trainer, record: dict[str, Any]) -> dict[str, Any]:
    """Do the recorded step again on all ranks; gives loss, grad_norm and reason (None: the step was good).

    Raises:
        CheckpointError: no checkpoint is left from before the step with the data that the run then read.
    """
    goal = record["iteration"] - 1
    if trainer.guard.skipped != record["skipped_samples"]:
        trainer.guard.skipped = record["skipped_samples"]  # the run had gone back since that checkpoint
        trainer.stream.close()
        trainer.stream = trainer.open_stream()
    try:
        while trainer.iteration < goal:
            trainer.step()
        if trainer.stream.consumed != record["consumed_samples"]:
            raise CheckpointError(
                f"{trainer.checkpoints.root}: step {goal + 1} now begins at sample {trainer.stream.consumed}, recorded "
                f"was {record['consumed_samples']}; replay with the run's own config"
            )
        done = trainer.step()
    finally:
        trainer.stream.close()
    reason = trainer.bad_step["reason"] if done.skipped and trainer.bad_step else None
    return {"loss": done.loss, "grad_norm": done.grad_norm, "reason": reason, "details": trainer.bad_step}


def report(record: dict[str, Any], again: dict[str, Any]) -> list[str]:
    """Lines for a terminal of 80 columns."""
    lines = [
        f"step {record['iteration']}, {record['samples']} samples from {record['consumed_samples']} on",
        f"  recorded  loss {_number(record['loss'])}  grad norm {_number(record['grad_norm'])}",
        f"            {record['reason']}",
        f"  replayed  loss {_number(again['loss'])}  grad norm {_number(again['grad_norm'])}",
        f"            {again['reason'] or 'a good step: look at the devices of the recorded ranks'}",
    ]
    for rank in again["details"]["ranks"] if again["reason"] else record["ranks"]:
        found = rank["gradients_not_finite"]
        lines.append(f"  rank {rank['rank']} on {rank['host']}: {found['count']} gradients not finite")
        lines += [f"    {name}" for name in found["first"]]
        lines += [
            f"    samples {batch['samples'][0]}–{batch['samples'][-1]}: loss {_number(batch['loss'])}"
            for batch in rank["microbatches"]
            if batch["loss"] is not None
        ]
    return lines


def _number(value: float | str) -> str:
    return f"{float(value):.4f}"


if __name__ == "__main__":
    sys.exit(main())
