"""Weights & Biases: a reporter that needs a network and an account, neither of which a run depends on."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from oryx_megatron.data.files import write_json
from oryx_megatron.display import shown
from oryx_megatron.errors import first_line
from oryx_megatron.reading import parse_json, read_text
from oryx_megatron.train.callbacks.base import Callback, StepRecord
from oryx_megatron.train.evaluate import Evaluation

log = logging.getLogger(__name__)

KEPT = "wandb.json"
"""In the run's folder: the id under which W&B knows the run, and the path for which it was made."""
PATIENCE = {"WANDB_INIT_TIMEOUT": "60", "WANDB_FINISH_TIMEOUT": "60"}
"""Seconds that W&B may wait for its server, where the environment does not say otherwise; all ranks wait meanwhile."""
LONGEST_NAME = 128


class WeightsAndBiases(Callback):
    """The numbers of metrics.jsonl in a run of W&B, continued after a restart; a step is sent once.

    Whatever goes wrong there is told in one line, and training continues without it.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any]) -> None:
        self._run: Any = None
        self._sent = 0
        with self._optional():
            for name, seconds in PATIENCE.items():
                os.environ.setdefault(name, seconds)
            import wandb

            with _without_questions():
                self._run = wandb.init(
                    project=project,
                    name=folder.resolve().name[:LONGEST_NAME],
                    id=run_id(folder),
                    resume="allow",
                    config=config,
                )
            # Steps behind the last checkpoint are done again, and W&B takes none twice.
            self._sent = step if isinstance(step := getattr(self._run, "step", 0), int) else 0

    def on_step(self, record: StepRecord) -> None:
        self._send(record.iteration, {f"train/{k}": v for k, v in record.figures().items()})

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        averages = {f"{r.dataset}/{r.plan}/ema_loss": r.ema_loss for r in results if r.ema_loss is not None}
        self._send(iteration, {f"{r.dataset}/{r.plan}/loss": r.loss for r in results} | averages)

    def on_end(self) -> None:
        if self._run is not None:
            with self._optional():
                self._run.finish()
        self._run = None

    def _send(self, iteration: int, numbers: dict[str, Any]) -> None:
        if self._run is None or iteration < self._sent:
            return
        with self._optional():
            self._run.log(numbers, step=iteration)
            self._sent = iteration

    @contextlib.contextmanager
    def _optional(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - another's program, which must not end this run
            self._run = None
            log.warning(
                "Weights & Biases: %s; training continues without it (logging.wandb_project=null: off)",
                first_line(error),
            )


def run_id(folder: Path, clock: Callable[[], float] = time.time) -> str:
    """The id of a run's folder: made of its whole path and the time once, and kept in the folder.

    A folder that was moved keeps it. A copy, beside which the original still is, gets one of its own.

    Raises:
        OSError: it cannot be written.
    """
    kept, path = folder / KEPT, str(folder.resolve())
    if (found := _kept(kept)) is not None:
        identity, home = found
        if home == path or (_kept(Path(home) / KEPT) or ("", ""))[0] != identity:
            return identity
    made = clock()
    identity = hashlib.sha256(os.fsencode(f"{path}\n{made!r}")).hexdigest()[:16]
    write_json(kept, {"id": identity, "path": path, "time": made})
    return identity


def _kept(file: Path) -> tuple[str, str] | None:
    """Id and path in a wandb.json; None when there is none, or a damaged one, which the log says."""
    try:
        value = parse_json(read_text(file))
        identity, path = value["id"], value["path"]
        if not (isinstance(identity, str) and identity.isalnum() and len(identity) <= 64 and isinstance(path, str)):
            raise ValueError("no id")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s is damaged: Weights & Biases will show a new run", shown(file))
        return None
    return identity, path


@contextlib.contextmanager
def _without_questions() -> Iterator[None]:
    """No terminal to ask for an account at: the other ranks would wait for the answer."""
    before = sys.stdin
    with open(os.devnull, encoding="ascii") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before
