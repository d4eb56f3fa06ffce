"""`torchrun … -m oryx_megatron.train.replay RUN/faults/batch-0000123.json [key=value …]`: do a bad step again.

    oryx replay runs/mine/faults/batch-0000123.json

Resumes from the newest checkpoint before the step, does the steps in between as training did, then the recorded batch
under its recorded plans, and says what came of it. Writes nothing. With the layout of the run and no overrides it is
the same computation bit for bit: numbers that come out finite now point at the device and not at the data.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oryx_megatron import ranks
from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.config import load_run, told_with_place, validate
from oryx_megatron.display import shown
from oryx_megatron.errors import CheckpointError, DataError
from oryx_megatron.paths import expand_arguments
from oryx_megatron.reading import parse_json, read_text, reason
from oryx_megatron.train.history import read_events
from oryx_megatron.train.records import is_number, is_text, is_whole

if TYPE_CHECKING:
    from oryx_megatron.train.trainer import Trainer


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Replay; see --help."""
    parser = Parser("oryx_megatron.train.replay", description=__doc__)
    parser.add_argument("record", help="RUN/faults/batch-….json")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="fields to change")
    arguments = parser.parse_intermixed_args(argv)
    expand_arguments(arguments, "record")
    record = read_record(Path(arguments.record))
    config = Path(arguments.record).parent.parent / "config.yaml"
    run = load_run(config, arguments.overrides)
    with told_with_place(config, arguments.overrides):
        layout = validate(run, ranks.world_size())
    from oryx_megatron import parallel, platform
    from oryx_megatron.train.trainer import Trainer

    try:
        platform.use_kernel_cache(run.kernels.cache_dir)
        parallel.initialize(run.parallel, seed=run.seed)
        trainer = Trainer(run, layout, before=record["iteration"], reports=False)
        again = replay(trainer, record)
        if parallel.is_main_rank():
            sys.stdout.write("".join(f"{shown(line)}\n" for line in report(record, again)))
    finally:
        parallel.destroy()
    return 0


def read_record(path: Path) -> dict[str, Any]:
    """A recorded bad step.

    Raises:
        DataError: missing or damaged.
    """
    try:
        record = parse_json(read_text(path, _LARGEST))
        if not (isinstance(record, dict) and _is_record(record)):
            raise ValueError("a field is missing or damaged")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise DataError(f"{path}: is no record of a step ({why}); give a RUN/faults/batch-….json") from None
    return record


OTHER_SAMPLES = "  not as in the run: it rolled back since, to a checkpoint that is gone"
"""Of steps before the recorded one."""
_LARGEST = 1 << 28
"""Bytes of a record: some thousand ranks with their microbatches."""


def _is_record(record: dict[str, Any]) -> bool:
    """Whether all that `replay` and `report` use is there and of its type; KeyError or TypeError when not."""

    def figure(value: Any) -> bool:  # as train/bad_steps.py writes them: what is not finite is text
        return is_number(value) or value in ("nan", "inf", "-inf")

    return (
        all(is_whole(record[name]) for name in ("iteration", "consumed_samples", "skipped_samples", "samples"))
        and record["iteration"] > 0
        and all(figure(record[name]) for name in ("loss", "grad_norm"))
        and is_text(record["reason"])
        and all(
            is_whole(rank["rank"])
            and is_text(rank["host"])
            and is_whole(rank["gradients_not_finite"]["count"])
            and all(map(is_text, rank["gradients_not_finite"]["first"]))
            and all(
                (batch["loss"] is None or figure(batch["loss"]))
                and batch["samples"]
                and all(map(is_whole, batch["samples"]))
                for batch in rank["microbatches"]
            )
            for rank in record["ranks"]
        )
    )


def replay(trainer: Trainer, record: dict[str, Any]) -> dict[str, Any]:
    """Do the recorded step again on all ranks; gives loss, grad_norm and reason (None: the step was good).

    Raises:
        CheckpointError: no checkpoint is left from before the step with the data that the run then read.
    """
    from oryx_megatron.train.remote import run_folder

    goal, start = record["iteration"] - 1, trainer.iteration
    other = _other_samples(run_folder(trainer.run), record, start, trainer.guard.skipped)
    if trainer.guard.skipped != record["skipped_samples"]:
        trainer.guard.skipped = record["skipped_samples"]  # the run had rolled back since that checkpoint
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
    details = trainer.bad_steps.last
    return {
        "loss": done.loss,
        "grad_norm": done.grad_norm,
        "reason": details["reason"] if done.skipped else None,
        "details": details,
        "start": start,
        "other_samples": other,
    }


def _other_samples(folder: Path, record: dict[str, Any], start: int, skipped: int) -> bool:
    """Whether steps after `start` read other samples than in the run: it rolled back to a checkpoint that is gone.

    `skipped`: samples that the run had skipped when it saved the one of `start`.
    """
    if skipped == record["skipped_samples"]:
        return False
    there = [event for event in read_events(folder) if event["event"] in ("rollback", "return")]
    return start not in [event.get("to") for event in there if event.get("samples") == record["skipped_samples"]][-1:]


def report(record: dict[str, Any], again: dict[str, Any]) -> list[str]:
    """Lines for a terminal of 80 columns."""
    lines = [
        f"step {record['iteration']}, {record['samples']} samples from {record['consumed_samples']} on",
        f"  from {'the checkpoint of step ' + str(again['start']) if again['start'] else 'the beginning of the run'}",
        *([OTHER_SAMPLES] if again["other_samples"] else []),
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
