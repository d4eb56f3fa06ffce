"""The training loop."""

from __future__ import annotations

import logging
import random
import time
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from oryx_megatron import arch, parallel, platform
from oryx_megatron.checkpoint import Manifest
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.data.loader import build_datasets
from oryx_megatron.data.stream import SampleStream
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.errors import ConfigError
from oryx_megatron.ops import backends
from oryx_megatron.platform import memory
from oryx_megatron.train import banner, collector, init_from, manifests, remote, resume, signals
from oryx_megatron.train.agreement import Agreement
from oryx_megatron.train.bad_steps import BadSteps
from oryx_megatron.train.batches import next_samples, open_stream, training_batches
from oryx_megatron.train.callbacks import Callbacks, StepRecord, check_installed, profiler, reporters
from oryx_megatron.train.clock import Clock, Updates
from oryx_megatron.train.engine import Taken, build_engine, run_step
from oryx_megatron.train.evaluate import Evaluation, evaluate
from oryx_megatron.train.guard import Guard, Prolonged
from oryx_megatron.train.intervals import Intervals, last_step
from oryx_megatron.train.routing import routing_of
from oryx_megatron.train.saving import Saver
from oryx_megatron.train.sizes import check_sizes
from oryx_megatron.train.stragglers import Stragglers
from oryx_megatron.train.watchdog import Watchdog

log = logging.getLogger(__name__)

CLOSING = 120.0
"""Seconds, on top of hang_timeout, that reports may take to end: one may wait for a server."""


class Trainer:
    """One pretraining run on this rank. Process groups must exist (`parallel.initialize`).

    Args:
        run: Validated config.
        layout: From `validate(run, world_size)`.
        stop: Where signals leave their notes; None: only the time limit stops the run early.
        before: Resume from the newest checkpoint before this iteration.
        reports: False leaves no trace in the run's folder: no metrics, no events, no terminal.

    Raises:
        ConfigError, DataError, CheckpointError: what the user can fix, on every rank alike.
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
        self.folder = remote.run_folder(run)
        self.data_rank = parallel_state.get_data_parallel_rank()
        request = stop or signals.StopRequest()
        request.limit_time(run.faults)
        check_installed(run.logging)
        self.lock = remote.hold(run, self.folder) if reports else None
        self.main = reports and parallel.is_main_rank()
        """Whether this rank reports."""
        random.seed(run.seed)
        np.random.seed(run.seed % 2**32)
        backends.select(run.kernels, backends.Workload(run.model, run.precision.dtype))
        files = remote.run_files(run, self.folder) if self.main else ()
        if self.main:
            signals.remove_marker(self.folder)
            for line in banner.reproduction(run, layout):
                log.info(line)
        self.tokenizer = load_tokenizer(run.data.tokenizer)
        self.start = init_from.find(run, self.folder / "checkpoints", before)
        self.datasets = build_datasets(run, self.tokenizer, count=self.start.count)
        if self.main and len(self.datasets) == 1:
            log.warning("data.split %s and data.validation leave nothing to evaluate", list(run.data.split))
        self.engine = build_engine(run, layout)
        collector.settle()
        self.chunks = self.engine.chunks
        self.checkpoints = self.engine.checkpoints(self.folder / "checkpoints")
        self.clock, self.updates = Clock(), Updates()
        self.callbacks = Callbacks()
        self.guard = Guard(run.faults)
        self.bad_steps = BadSteps(run, layout, self.guard, self.callbacks, main=self.main)
        self.agreement = Agreement(request, self.clock)
        self.stragglers = Stragglers(self.chunks, run.faults.slow_rank)
        self.watchdog = Watchdog(self.folder, run.faults.hang_timeout)
        self.saver = Saver(self.checkpoints, run.checkpoint.timeout, self.clock, self.watchdog, self.callbacks)
        self.intervals, self.iteration = Intervals(run), 0
        self.evaluations: list[dict[str, Any]] = []
        self.changes: list[tuple[str, Any, Any]] = []
        """Fields that differ from those of the checkpoint: name, value there, value here."""
        if manifest := self._load(before):
            self.changes = resume.tell(manifest, run, self.checkpoints.name)
        else:
            self._start()
        self.stream = self.open_stream()
        if self.main:
            self.callbacks.extend([*reporters(run, layout, self.clock, self.folder), *files])
        if reports:
            self.callbacks.extend(profiler(run, torch.distributed.get_rank(), self.folder))

    def fit(self) -> signals.Stop | None:
        """Train until train.iterations (or train.exit_after), evaluating and saving on the way and at the end.

        Returns:
            None at the end; where and why it stopped when asked to stop before, with everything saved.

        Raises:
            CheckpointError: the last checkpoint could not be written. (Failures before are reported only.)
            TrainingError: bad steps without end.
        """
        run = self.run
        last = last_step(run)
        self.callbacks.call("on_start", run, self.iteration)
        if self.changes:
            self.callbacks.call("on_change", self.iteration, self.changes)
        with self.watchdog:
            try:
                self._loop(last)
                return self._finish(last)
            finally:
                # No collectives here: after an error, other ranks may never arrive.
                self.stream.close()
                self.watchdog.beat("closing its reports", more=CLOSING)
                self.callbacks.call("on_end")
                if self.lock is not None:
                    self.lock.release()

    def _loop(self, last: int) -> None:
        run, stop = self.run, self.agreement
        stop.poll()
        if self._missed_evaluation():
            self.evaluate()
        if self.iteration in run.checkpoint.steps and stop.reason is None:
            self.save()
        while self.iteration < last and stop.reason is None:
            self.callbacks.call("before_step", self.iteration + 1)
            record = self.step()
            self.callbacks.call("on_step", record)
            if self.iteration % run.logging.interval == 0 and (text := self.stragglers.compare()) is not None:
                self.callbacks.call("on_slow", self.iteration, text)
            if record.skipped and self._rolled_back():
                continue
            saving = self.intervals.save(self.iteration, last) and (not self.guard.row or self.iteration == last)
            if self.intervals.evaluate(self.iteration, saving=saving) and stop.reason is None:
                self.evaluate()
            if saving:
                self.save()
            self.saver.poll()

    def _finish(self, last: int) -> signals.Stop | None:
        """Save what is not yet saved; where and why the run stopped, if it was asked to."""
        stop = self.agreement
        if stop.reason is not None and self.iteration and not self.guard.row:
            self.save()
        self.saver.finish()
        if self.iteration >= last and not self._missed_evaluation():
            stop.reason = None  # told to stop in the last step: nothing is left to do
        stopped = signals.Stop(stop.reason, self.iteration) if stop.reason else None
        if stopped and self.main:
            with self.callbacks.writing("the marker for requeueing"):
                signals.write_marker(self.folder, stopped)
        paused = "train.exit_after" if last < self.run.train.iterations else None
        self.callbacks.call("on_finish", self.iteration, stop.reason or paused, self.saver.whole)
        return stopped

    def step(self) -> StepRecord:
        """One optimizer step; all ranks leave its update out when it is bad."""
        run, started = self.run, time.perf_counter()
        self.watchdog.beat(f"in step {self.iteration + 1}", first=not self.agreement.started)
        self.stragglers.start()
        waited, consumed = self.stream.wait_seconds, self.stream.consumed
        batches = training_batches(
            next_samples(self.stream),
            run.modes,
            seed=run.seed,
            iteration=self.iteration,
            data_rank=self.data_rank,
            data_size=self.layout.dp,
            layers=run.model.reads_plans,
        )
        plans = [batch.plan for batch in batches]
        share = sum(plan.attention_share for plan in plans) / len(plans)
        flops = arch.mean_training_flops(run.model, run.data.sequence_length, [plan.layer_shares for plan in plans])
        taken = run_step(
            self.engine,
            batches,
            limit=self.guard.limit(),
            exchange=lambda bad: self.agreement.exchange(bad, share, flops),
            on_bad=lambda totals, norm: self.bad_steps.describe(
                self.chunks,
                batches,
                totals,
                norm,
                iteration=self.iteration + 1,
                consumed=consumed,
                samples=len(self.datasets["train"]),
                data_rank=self.data_rank,
            ),
        )
        share, flops = self.agreement.conclude(taken.exchanged)
        if not taken.bad:
            self.guard.good(taken.totals.mean_loss)
        self.iteration += 1
        tokens = (self.stream.consumed - consumed) * run.data.sequence_length
        seconds = self.clock.step(
            data=self.stream.wait_seconds - waited,
            forward_backward=platform.seconds_between(taken.begun, taken.reduced),
            optimizer=self.updates.seconds(taken.reduced, taken.updated),
            step=time.perf_counter() - started,
        )
        return StepRecord(
            iteration=self.iteration,
            attention_share=share,
            tokens=tokens,
            consumed_samples=self.stream.consumed,
            seconds=seconds["step"],
            data_seconds=seconds["data"],
            forward_backward_seconds=seconds["forward_backward"],
            optimizer_seconds=seconds["optimizer"],
            model_flops=tokens * flops,
            **_outcome(taken, run, len(batches) * self.layout.dp),
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
                averaged=self.engine.averaged,
            )
        self.evaluations = [{"iteration": self.iteration, **result.to_dict()} for result in results]
        self.callbacks.call("on_evaluation", self.iteration, results)
        return results

    def save(self) -> None:
        """Write a checkpoint; a failed one is reported and training continues with the last good one."""
        iteration, evaluations = self.iteration, self.evaluations
        stream, guard = self.stream.state(), self.guard.state()
        self.saver.save(
            iteration,
            lambda files: manifests.make(
                files,
                self.run,
                self.layout,
                self.start,
                iteration=iteration,
                samples=self._samples(iteration),
                stream=stream,
                tokenizer=self.tokenizer.describe(),
                evaluations=evaluations,
                guard=guard,
            ),
        )

    def open_stream(self) -> SampleStream:
        """The samples from where this iteration begins."""
        blend, skipped = self.datasets["train"], self.guard.skipped
        return open_stream(
            self.run,
            self.layout,
            Prolonged(blend, skipped) if skipped else blend,
            data_rank=self.data_rank,
            eod=self.tokenizer.eod_id,
            vocab_size=self.tokenizer.vocab_size,
            consumed=self._samples(self.iteration) + skipped,
            microbatches=self.layout.microbatches_from(self.iteration, self.start.count, self.run.train),
            num_workers=self.run.data.num_workers,
        )

    # ------------------------------------------------------------------------------------------------- internals

    def _start(self) -> None:
        """Take what init_from names, if anything."""
        begun = self.start.take(self.run, self.checkpoints, self.datasets["train"], self.tokenizer, self.guard)
        if begun is not None:
            self.iteration = begun
            self.engine.rewind(begun)

    def _samples(self, iteration: int) -> int:
        """Samples read when that many steps are done, less those skipped."""
        return self.start.count.samples_at(iteration)

    def _load(self, before: int | None = None) -> Manifest | None:
        """Resume from the newest whole checkpoint (before an iteration), if there is one; its manifest."""
        manifest = self.checkpoints.load(self._check, before=before)
        if manifest is None:
            return None
        self.iteration = manifest.iteration
        self.saver.loaded(manifest.iteration)
        self.engine.rewind(manifest.iteration)
        self.evaluations = manifest.evaluations
        self.guard.load_state(manifest.guard)
        return manifest

    def _check(self, manifest: Manifest) -> None:
        count, blend = self.start.count, self.datasets["train"]
        name, root = self.checkpoints.name, self.checkpoints.root
        manifests.check(manifest, self.run, name=name, root=root, count=count, blend=blend)

    def _rolled_back(self) -> bool:
        """Keep the batch of a bad step, and after several in a row roll back to before them; True when rolled back."""
        self.bad_steps.keep()
        before = self.bad_steps.roll_back_before()
        if before is None:
            return False
        consumed = self.stream.consumed
        self.saver.wait()
        self.stream.close()
        if not self._load(before):
            raise self.bad_steps.nothing_before()
        self.bad_steps.rolled_back(self.iteration, consumed - self._samples(self.iteration))
        self.stream = self.open_stream()
        return True

    def _missed_evaluation(self) -> bool:
        """Whether the process before stopped when this iteration's evaluation was due."""
        done = any(result["iteration"] == self.iteration for result in self.evaluations)
        return self.intervals.evaluate(self.iteration) and not done and len(self.datasets) > 1


def _outcome(taken: Taken, run: RunConfig, microbatches: int) -> dict[str, Any]:
    """Fields of StepRecord that a step alone decides; `microbatches` over all data-parallel ranks."""
    return {
        "loss": taken.totals.mean_loss,
        "grad_norm": taken.grad_norm,
        "lr": taken.lr,
        "skipped": taken.bad,
        "routing": routing_of(taken.totals.routed, run.model, microbatches),
        "logit_z_loss": taken.totals.mean_z_loss if run.train.z_loss else None,
        "mtp_losses": taken.totals.mtp_losses,
        "memory_bytes": memory.used_bytes(),
        "loss_by_mode": taken.by_mode,
    }
