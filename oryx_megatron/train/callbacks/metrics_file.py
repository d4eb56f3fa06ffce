"""RUN/metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from oryx_megatron.config.schema import RunConfig
from oryx_megatron.data.files import replacing
from oryx_megatron.train.callbacks.base import Callback, StepRecord
from oryx_megatron.train.evaluate import Evaluation
from oryx_megatron.train.metrics import read_lines


class MetricsFile(Callback):
    """metrics.jsonl: a line for every step and every evaluation result, and at logging.interval the experts' load."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._interval = 1

    def on_start(self, run: RunConfig, iteration: int) -> None:
        self._interval = run.logging.interval
        self._open(iteration)

    def on_rollback(self, iteration: int, to: int, skipped: int) -> None:
        self.on_end()
        self._open(to)

    def _open(self, iteration: int) -> None:
        # Steps after the checkpoint are done again: keep each step once.
        kept = [line for line in read_lines(self.path) if line["iteration"] <= iteration]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", buffering=1)

    def on_step(self, record: StepRecord) -> None:
        self._write({"kind": "step", **record.figures()})
        if record.routing is not None and record.iteration % self._interval == 0:
            self._write(record.routing.line(record.iteration))

    def on_evaluation(self, iteration: int, results: list[Evaluation]) -> None:
        for result in results:
            self._write({"kind": "evaluation", "iteration": iteration, **result.to_dict()})

    def on_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
