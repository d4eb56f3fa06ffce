"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import random
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from oryx_megatron import arch, parallel, platform
from oryx_megatron.checkpoint import Manifest
from oryx_megatron.checkpoint.manifest import package_versions
from oryx_megatron.config import to_dict, to_yaml
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.data.loader import Batch, SampleStream, build_datasets, check_resume
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.errors import WEIGHTS_ALONE, CheckpointError, ConfigError, DataError, TrainingError
from oryx_megatron.ops import backends
from oryx_megatron.train import init_from, lock, resume, signals
from oryx_megatron.train.batches import training_batches
from oryx_megatron.train.callbacks import (
    Callback,
    Display,
    History,
    MetricsFile,
    StepRecord,
    TensorBoard,
    check_installed,
)
from oryx_megatron.train.clock import Clock
from oryx_megatron.train.engine import Engine, MegatronEngine
from oryx_megatron.train.evaluate import Evaluation, evaluate
from oryx_megatron.train.guard import Guard, Prolonged, bad_step, record_path, write_record
from oryx_megatron.train.sizes import check_sizes
from oryx_megatron.train.step import Microbatch, Totals
from oryx_megatron.train.stragglers import Stragglers
from oryx_megatron.train.watchdog import Watchdog
from oryx_megatron.train.weights_and_biases import WeightsAndBiases

log = logging.getLogger(__name__)


class Trainer:
    """One pretraining run on this rank. Process groups must exist (`parallel.initialize`).

    Args:
        run: Validated config.
        layout: From `validate(run, world_size)`.
        stop: Where signals leave their notes; None: only the time limit stops the run early.
        before: Resume from the newest checkpoint before this iteration.
        reports: False leaves no trace in the run's folder: no metrics, no events, no terminal.

    Raises:
        ConfigError, DataError, CheckpointError: what the user can mend, on every rank alike.
    """

    def __init__(
        self,
        run: RunConfig,
        layout: Layout,
        *,
        stop: signals.StopRequest | None = None,
        before: int | None = None,
        reports: bool = True,
    ) -> None:
        if layout.world_size != (world := torch.distributed.get_world_size()):
            raise ConfigError(f"layout for {layout.world_size} ranks, but {world} run: samples would be left out")
        check_sizes(run, layout)
        self.run, self.layout = run, layout
        self.folder = Path(run.output_dir)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.stop_request = stop or signals.StopRequest()
        self.stop_request.limit_time(run.faults)
        check_installed(run.logging)
        self.lock = lock.hold(self.folder) if reports else None
        reports = reports and parallel.is_main_rank()
        if reports:
            signals.remove_marker(self.folder)
        random.seed(run.seed)
        np.random.seed(run.seed % 2**32)
        backends.select(run.kernels, backends.Workload(run.model, run.precision.dtype))
        if reports:
            for line in _reproduction(run, layout):
                log.info(line)
        self.tokenizer = load_tokenizer(run.data.tokenizer)
        self.start = init_from.find(run, self.folder / "checkpoints", before)
        self.datasets = build_datasets(run, self.tokenizer, origin=self.start.origin)
        if reports and len(self.datasets) == 1:
            log.warning("data.split %s and data.validation leave nothing to evaluate", list(run.data.split))
        self.engine = _build_engine(run, layout)
        self.chunks = self.engine.chunks
        self.checkpoints = self.engine.checkpoints(self.folder / "checkpoints")
        self.clock = Clock()
        self.guard = Guard(run.faults)
        self.stragglers = Stragglers(self.chunks, run.faults.slow_rank)
        self.watchdog = Watchdog(self.folder, run.faults.hang_timeout)
        self.iteration = 0
        self.evaluations: list[dict[str, Any]] = []
        self._saved: int | None = None
        self._save_error: CheckpointError | None = None
        self._stop: str | None = None
        """Why to stop after this step, as all ranks agreed."""
        self._started = False
        self._update: tuple[Any, Any] | None = None
        """When the last update began and ended."""
        self._mute: set[str] = set()
        self.bad_step: dict[str, Any] | None = None
        """The last one, as it is recorded."""
        if manifest := self._load(before):
            resume.tell(manifest, run, self.checkpoints.root)
        else:
            self._start()
        self.stream = self.open_stream()
        self.callbacks: Sequence[Callback] = _reporters(run, layout, self.folder, self.clock) if reports else ()

    def fit(self) -> signals.Stop | None:
        """Train until train.iterations (or train.exit_after), evaluating and saving on the way and at the end.

        Returns:
            None at the end; where and why it stopped when asked to stop before, with everything saved.

        Raises:
            CheckpointError: the last checkpoint could not be written. (Failures before are reported only.)
            TrainingError: bad steps without end.
        """
        run = self.run
        last = min(run.train.iterations, run.train.exit_after or run.train.iterations)
        self._call("on_start", run, self.iteration)
        with self.watchdog:
            return self._fit(last)

    def _fit(self, last: int) -> signals.Stop | None:
        run = self.run
        try:
            # A signal may have come while the model was built.
            self._conclude(self._exchange(0.0, torch.tensor(False)).tolist())
            if self._missed_evaluation():
                self.evaluate()
            while self.iteration < last and self._stop is None:
                record = self.step()
                self._call("on_step", record)
                if self.iteration % run.logging.interval == 0 and (text := self.stragglers.compare()) is not None:
                    log.warning("step %d: %s", self.iteration, text)
                    self._call("on_slow", self.iteration, text)
                if record.skipped and self._handle_bad_step():
                    continue
                if _due(self.iteration, run.evaluation.interval, run.train.iterations) and self._stop is None:
                    self.evaluate()
                in_order = not self.guard.row or self.iteration == last
                if _due(self.iteration, run.checkpoint.interval, last) and in_order:
                    self.save()
                self._complete_save(self.checkpoints.poll, more=0.0)  # a look, which takes no time of its own
            if self._stop is not None and self.iteration and not self.guard.row:
                self.save()
            self._complete_save(self.checkpoints.wait)
            if self._save_error is not None:
                raise self._save_error
            if self.iteration >= last and not self._missed_evaluation():
                self._stop = None  # told to stop in the last step: nothing is left to do
            stopped = signals.Stop(self._stop, self.iteration) if self._stop else None
            if stopped and self.callbacks:
                with self._reporting("the marker for requeueing"):
                    signals.write_marker(self.folder, stopped)
            self._call("on_finish", self.iteration, self._stop)
        finally:
            # No collectives here: after an error, other ranks may never arrive.
            self.stream.close()
            self.watchdog.beat("closing its reports", more=CLOSING)
            self._call("on_end")
            if self.lock is not None:
                self.lock.release()
        return stopped

    def step(self) -> StepRecord:
        """One optimizer step; all ranks leave its update out when it is bad."""
        self.watchdog.beat(f"in step {self.iteration + 1}", first=not self._started)
        self.stragglers.start()
        started, waited, consumed = time.perf_counter(), self.stream.wait_seconds, self.stream.consumed
        batches = training_batches(
            self._next_samples(),
            self.run.modes,
            seed=self.run.seed,
            iteration=self.iteration,
            data_rank=self.data_rank,
            data_size=self.layout.dp,
        )
        begun = platform.mark()
        totals = self.engine.gradients(batches)
        lr = self.engine.learning_rate()
        reduced = platform.mark()
        norm = self.engine.gradient_norm()
        found = self._exchange(
            sum(batch.plan.attention_share for batch in batches) / len(batches),
            bad_step(totals, norm, self.guard.limit()),
        )
        *exchanged, grad_norm = totals.read(found, norm)  # the one moment at which the device waits for the host
        share, bad = self._conclude(exchanged)
        if bad:
            reason = self.guard.reason(totals.mean_loss if math.isfinite(totals.loss) else totals.loss, grad_norm)
            self.bad_step = self._describe(batches, totals, grad_norm, reason, consumed)
            self.engine.discard()
        else:
            self.engine.update(grad_norm)
            self.guard.good(totals.mean_loss)
        updated = platform.mark()
        self.engine.advance()
        self.iteration += 1
        self._started = True
        forward_seconds = platform.seconds_between(begun, reduced)
        optimizer_seconds = self._update_seconds(reduced, updated)
        ended = time.perf_counter()
        data_seconds = self.stream.wait_seconds - waited
        for part, seconds in (
            ("data", data_seconds),
            ("forward_backward", forward_seconds),
            ("optimizer", optimizer_seconds),
            ("step", ended - started),
        ):
            self.clock.add(part, seconds)
        tokens = self.run.train.global_batch_size * self.run.data.sequence_length
        flops = 3 * sum(arch.flops_per_token(self.run.model, self.run.data.sequence_length, share).values())
        return StepRecord(
            iteration=self.iteration,
            loss=totals.mean_loss,
            grad_norm=grad_norm,
            lr=lr,
            attention_share=share,
            tokens=tokens,
            consumed_samples=self.stream.consumed,
            seconds=ended - started,
            data_seconds=data_seconds,
            forward_backward_seconds=forward_seconds,
            optimizer_seconds=optimizer_seconds,
            model_flops=flops * tokens,
            skipped=bad,
        )

    def evaluate(self) -> list[Evaluation]:
        """Evaluate on all validation sets under all plans of the config."""
        self.watchdog.beat("evaluating", first=True)
        datasets = {name: blend for name, blend in self.datasets.items() if name != "train"}
        with self.clock.time("evaluation"):
            results = evaluate(
                self.run,
                self.layout,
                self.chunks,
                datasets,
                self.tokenizer,
                data_rank=self.data_rank,
                progress=lambda: self.watchdog.beat("evaluating"),
            )
        self.evaluations = [{"iteration": self.iteration, **result.to_dict()} for result in results]
        self._call("on_evaluation", self.iteration, results)
        return results

    def save(self) -> None:
        """Write a checkpoint; a failed one is reported and the run goes on with the last good one."""
        if self._saved == self.iteration:
            return
        self._complete_save(self.checkpoints.wait)
        self._saved = self.iteration
        self._complete_save(lambda: self.checkpoints.save(self.iteration, self._manifest()))

    def open_stream(self) -> SampleStream:
        """The samples from where this iteration begins."""
        blend, skipped = self.datasets["train"], self.guard.skipped
        return SampleStream(
            Prolonged(blend, skipped) if skipped else blend,
            micro_batch_size=self.run.train.micro_batch_size,
            microbatches=self.layout.microbatches,
            data_rank=self.data_rank,
            data_size=self.layout.dp,
            consumed=self._samples(self.iteration) + skipped,
            isolated=self.run.data.documents == "isolated",
            eod=self.tokenizer.eod_id,
            vocab_size=self.tokenizer.vocab_size,
            num_workers=self.run.data.num_workers,
        )

    # ------------------------------------------------------------------------------------------------- internals

    def _complete_save(self, complete: Callable[[], Path | None], *, more: float | None = None) -> None:
        """Make or finish a checkpoint, or report that it failed; `more`: seconds on top of hang_timeout."""
        self.watchdog.beat("with a checkpoint", more=self.run.checkpoint.timeout if more is None else more)
        try:
            with self.clock.time("checkpoint"):
                path = complete()
        except CheckpointError as error:
            log.error("%s; the run goes on, the last good checkpoint stays", error)
            self._save_error = error
            return
        if path is not None:
            self._save_error = None
            self._call("on_checkpoint", path)

    def _start(self) -> None:
        """Take what init_from names, if anything."""
        begun = self.start.take(self.run, self.checkpoints, self.datasets["train"], self.tokenizer, self.guard)
        if begun is not None:
            self.iteration = begun
            self.engine.rewind(begun)

    def _samples(self, iteration: int) -> int:
        """Samples read when that many steps are done, less those skipped."""
        return self.start.origin.samples_at(iteration, self.run.train.global_batch_size)

    def _load(self, before: int | None = None) -> Manifest | None:
        """Go on from the newest whole checkpoint (before an iteration), if there is one; its manifest."""
        manifest = self.checkpoints.load(self._check_manifest, before=before)
        if manifest is None:
            return None
        self.iteration = self._saved = manifest.iteration
        self.engine.rewind(manifest.iteration)
        self.evaluations = manifest.evaluations
        self.guard.load_state(manifest.guard)
        return manifest

    def _exchange(self, share: float, bad: torch.Tensor) -> torch.Tensor:
        """The one exchange of a step, on the device: attention share, whether a rank saw a bad step or is to stop.

        Every rank of the model counts its share, so the mean over all is that over data-parallel ranks.
        """
        notes = self.stop_request.notes(longest=self.clock.longest_stop, started=self._started)
        own = platform.to_device(torch.tensor([share, 0.0, *notes], dtype=torch.float64))
        own[1] = bad
        world = torch.distributed.get_world_size()
        if world > 1:
            torch.distributed.all_reduce(own)
            own[0] /= world
        return own

    def _conclude(self, exchanged: list[float]) -> tuple[float, bool]:
        """Take note of what all ranks said; mean attention share, and whether the step was bad."""
        share, faults, *votes = exchanged
        self._stop = signals.decide(votes)
        return share, faults > 0

    def _update_seconds(self, begun: Any, ended: Any) -> float:
        """Time of the update: on a GPU, which is still at it, of the one before."""
        last, self._update = self._update, (begun, ended)
        if not platform.has_gpu():
            last = self._update
        return platform.seconds_between(*last) if last is not None else 0.0

    def _missed_evaluation(self) -> bool:
        """Whether the process before stopped when this iteration's evaluation was due."""
        due = self.iteration and _due(self.iteration, self.run.evaluation.interval, self.run.train.iterations)
        missed = all(result["iteration"] != self.iteration for result in self.evaluations)
        return bool(due) and missed and len(self.datasets) > 1

    def _describe(
        self, batches: list[Microbatch], totals: Totals, norm: float, reason: str | None, consumed: int
    ) -> dict[str, Any]:
        """A bad step for its record: what each rank read, under which plans, and what came of it."""
        run, world = self.run, torch.distributed.get_world_size()
        losses = None if totals.local is None else (totals.local[:, 0] / totals.local[:, 1].clamp(min=1)).tolist()
        micro, size = run.train.micro_batch_size, len(self.datasets["train"])
        bad = [
            name
            for chunk in self.chunks
            for name, parameter in chunk.named_parameters()
            if (gradient := getattr(parameter, "main_grad", None)) is not None and not bool(gradient.isfinite().all())
        ]
        mine = {
            "rank": torch.distributed.get_rank(),
            "host": socket.gethostname(),
            "data_rank": self.data_rank,
            "microbatches": [
                {
                    "samples": [
                        (consumed + (m * self.layout.dp + self.data_rank) * micro + i) % size for i in range(micro)
                    ],
                    "plan": str(batch.plan),
                    "loss": None if losses is None else losses[m],
                }
                for m, batch in enumerate(batches)
            ],
            "gradients_not_finite": {"count": len(bad), "first": bad[:4]},
        }
        ranks: list[Any] = [None] * world
        torch.distributed.all_gather_object(ranks, {"reason": reason, **mine})
        # The reason of the rank that saw it first serves all, so that all take the same way from here.
        return {
            "iteration": self.iteration + 1,
            "reason": next(rank["reason"] for rank in ranks if rank["reason"] is not None),
            "loss": totals.mean_loss,
            "grad_norm": norm,
            "seed": run.seed,
            "consumed_samples": consumed,
            "skipped_samples": self.guard.skipped,
            "samples": run.train.global_batch_size,
            "ranks": ranks,
        }

    def _handle_bad_step(self) -> bool:
        """Keep the batch; after faults.bad_steps in a row roll back to before them. True after a rollback."""
        assert self.bad_step is not None
        if self.callbacks:
            path = record_path(self.folder, self.iteration)
            with self._reporting(path.name):
                write_record(path, self.bad_step)
            self._call("on_skip", self.iteration, self.bad_step["reason"], path)
        if not self.guard.bad():
            return False
        faults, guard = self.run.faults, self.guard
        here, consumed, row, rollbacks = self.iteration, self.stream.consumed, guard.row, guard.rollbacks + 1
        what = f"step {here}: {self.bad_step['reason']}, {row} steps in a row"
        records = f"their batches are in {self.folder}/faults (replay: python -m oryx_megatron.train.replay)"
        if rollbacks > faults.max_rollbacks:
            raise TrainingError(
                f"{what}, again after {faults.max_rollbacks} rollbacks (faults.max_rollbacks); {records}: look for a "
                "broken device, lower optimizer.lr, or fix the data"
            )
        self._complete_save(self.checkpoints.wait)
        self.stream.close()
        # A second time without a good step in between, that checkpoint is to blame itself: take the one before.
        before = here - row + 1 if guard.rolled_back_to is None else guard.rolled_back_to
        if not self._load(before):
            raise TrainingError(f"{what}, and no checkpoint before them for a rollback; {records}")
        guard.rollbacks, guard.rolled_back_to = rollbacks, self.iteration
        guard.skipped = consumed - self._samples(self.iteration)
        self.stream = self.open_stream()
        log.warning(
            "%s: rollback to the checkpoint of step %d, skipping the %d samples read since; %s",
            what, self.iteration, guard.skipped, records,
        )  # fmt: skip
        self._call("on_return", here, self.iteration, guard.skipped)
        return True

    def _check_manifest(self, manifest: Manifest) -> None:
        """Refuse to go on from the checkpoint of another model, or of other data or batches so far."""
        root, run = self.checkpoints.root, self.run
        written = manifest.run()
        then, now = written.model, run.model
        names = tuple(field.name for field in dataclasses.fields(now) if field.name not in _OF_NO_MATTER)
        if changed := [
            f"{name} (there {before}, here {after})" for name, before, after in init_from.unlike(then, now, names)
        ]:
            raise CheckpointError(
                f"{root}: belongs to model {then.name}, which differs in {', '.join(changed)}; "
                f"{_own_config(manifest, root)}choose another output_dir"
            )
        skipped = int(manifest.guard.get("skipped_samples", 0))
        if manifest.consumed_samples != self._samples(manifest.iteration) + skipped:
            raise CheckpointError(
                f"{root}: its {manifest.iteration} iterations read {manifest.consumed_samples} samples, which "
                f"train.global_batch_size {run.train.global_batch_size} does not give; set it back"
            )
        if (trained_on := manifest.trained_on) is None:  # a conversion: of weights alone, read from no data
            return
        if (why := init_from.foreign_optimizer(written, run)) is not None:
            raise CheckpointError(f"{root}: {why}; set it back, or {WEIGHTS_ALONE}")
        check_resume(trained_on, self.datasets["train"])

    def _manifest(self) -> Any:
        iteration, evaluations, stream = self.iteration, self.evaluations, self.stream.state()
        layout, guard = self.layout, self.guard.state()

        def make(files: dict[str, dict[str, Any]]) -> Manifest:
            return Manifest(
                iteration=iteration,
                consumed_samples=self._samples(iteration) + guard["skipped_samples"],
                config=to_dict(self.run),
                layout={"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp, "dp": layout.dp},
                rng={"seed": self.run.seed, "state": "none: every draw is a function of seed, iteration, microbatch"},
                data={"train": stream, "tokenizer": self.tokenizer.describe()},
                evaluations=evaluations,
                versions=package_versions(),
                commit=platform.git_commit(),
                files=files,
                guard=guard,
                init_from=self.start.record,
                origin=list(dataclasses.astuple(self.start.origin)),
            )

        return make

    def _next_samples(self) -> list[Batch]:
        try:
            return self.stream.next_batches()
        except DataError as error:
            error.rank_local = True  # only this rank read the sample at fault
            raise

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            with self._reporting(type(callback).__name__):
                getattr(callback, hook)(*arguments)

    @contextlib.contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        """A full disk costs reports, not the run; each kind is told once until it works again."""
        try:
            yield
        except OSError as error:
            if what not in self._mute:
                log.error("%s cannot write (%s); the run goes on without it until there is room", what, error)
            self._mute.add(what)
        else:
            self._mute.discard(what)


def _own_config(manifest: Manifest, root: Path) -> str:
    """Advice where a conversion wrote the config that its checkpoint belongs to."""
    path = root.parent / "config.yaml"
    return f"train {path}, or " if manifest.trained_on is None and path.is_file() else ""


def _reproduction(run: RunConfig, layout: Layout) -> list[str]:
    """Everything one needs to do this run again, in lines for a terminal of 80 columns."""
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    facts = {
        "run": f"{run.output_dir}, config in {run.output_dir}/config.yaml, seed {run.seed}",
        "command": " ".join(sys.argv),
        "code": f"commit {platform.git_commit() or 'unknown'}",
        "versions": versions,
        "model": f"{run.model.name}, {arch.parameter_counts(run.model).total:,} parameters, {run.precision.dtype}",
        "layout": f"{layout.world_size} ranks: tensor {layout.tp} × pipeline {layout.pp} × context {layout.cp} × data "
        f"{layout.dp}, {layout.microbatches} microbatches per step",
        "host": f"{socket.gethostname()}, {platform.describe()}",
        "kernels": backends.describe(),
    }
    lines = []
    for name, text in facts.items():
        lines += textwrap.wrap(f"{name}: {text}", 74, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def _build_engine(run: RunConfig, layout: Layout) -> Engine:
    if run.engine == "deepspeed":
        from oryx_megatron.train.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(run, layout)
    return MegatronEngine(run)


def _reporters(run: RunConfig, layout: Layout, folder: Path, clock: Clock) -> list[Callback]:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".config.tmp"
    temporary.write_text(to_yaml(run))
    os.replace(temporary, folder / "config.yaml")
    reporters: list[Callback] = [
        MetricsFile(folder / "metrics.jsonl"),
        Display(run.logging.interval, run.train.iterations),
    ]
    peak = platform.peak_flops()
    facts = {"host": socket.gethostname(), "ranks": layout.world_size, "commit": platform.git_commit()}
    history = History(folder, clock, peak_flops=peak and peak * layout.world_size, facts=facts)
    if run.logging.tensorboard:
        reporters.append(TensorBoard(folder / "tensorboard"))
    if run.logging.wandb_project:
        reporters.append(WeightsAndBiases(run.logging.wandb_project, run, to_dict(run)))
    return [history, *reporters]  # it looks at when the others last wrote, before they do


CLOSING = 120.0
"""Seconds, on top of hang_timeout, that reports may take to end: one may wait for a server."""
_OF_NO_MATTER = ("name", "recurrence_chunk", "init_std", "decay_init", "dt_init")
"""Fields of a model that may change on the way: they alter neither its parameters nor what it computes."""


def _due(iteration: int, interval: int, last: int) -> bool:
    return iteration == last or (interval > 0 and iteration % interval == 0)
