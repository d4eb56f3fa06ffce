"""The training loop."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from oryx_megatron import arch, parallel, platform
from oryx_megatron.checkpoint import CheckpointManager, Manifest
from oryx_megatron.checkpoint.manifest import git_commit, package_versions
from oryx_megatron.config import to_dict, to_yaml
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.data.loader import Batch, SampleStream, build_datasets, check_resume
from oryx_megatron.data.tokenizer import load_tokenizer
from oryx_megatron.errors import CheckpointError, DataError
from oryx_megatron.model import build_model
from oryx_megatron.model.warm import compile_in_turn
from oryx_megatron.ops import backends
from oryx_megatron.train.batches import training_batches
from oryx_megatron.train.callbacks import (
    Callback,
    Display,
    MetricsFile,
    StepRecord,
    TensorBoard,
    WeightsAndBiases,
    check_installed,
)
from oryx_megatron.train.evaluate import Evaluation, evaluate
from oryx_megatron.train.optimizer import build_optimizer, build_schedule, connect, optimizer_step, wrap
from oryx_megatron.train.step import Microbatch, forward_backward

log = logging.getLogger(__name__)


class Trainer:
    """One pretraining run on this rank. Process groups must exist (`parallel.initialize`).

    Args:
        run: Validated config.
        layout: From `validate(run, world_size)`.

    Raises:
        ConfigError, DataError, CheckpointError: what the user can mend, on every rank alike.
    """

    def __init__(self, run: RunConfig, layout: Layout) -> None:
        self.run, self.layout = run, layout
        self.folder = Path(run.output_dir)
        self.data_rank = parallel_state.get_data_parallel_rank()
        check_installed(run.logging)
        random.seed(run.seed)
        np.random.seed(run.seed % 2**32)
        backends.select(run.kernels, backends.Workload(run.model, run.precision.dtype))
        for line in textwrap.wrap(f"kernels: {backends.describe()}", 74, subsequent_indent="  "):
            log.info(line)
        self.tokenizer = load_tokenizer(run.data.tokenizer)
        self.datasets = build_datasets(run, self.tokenizer)
        self.chunks = wrap(run, build_model(run.model, run.parallel, run.precision, seed=run.seed))
        if platform.has_gpu():
            log.info("kernels ready after %.0f s", compile_in_turn(run, self.chunks))
        self.optimizer = build_optimizer(run, self.chunks)
        self.schedule = build_schedule(run, self.optimizer)
        connect(run, self.chunks, self.optimizer)
        self.checkpoints = CheckpointManager(self.folder / "checkpoints", run.checkpoint, self.chunks, self.optimizer)
        self.iteration = 0
        self.evaluations: list[dict[str, Any]] = []
        self._saved: int | None = None
        self._save_error: CheckpointError | None = None
        self._resume()
        self.stream = SampleStream(
            self.datasets["train"],
            micro_batch_size=run.train.micro_batch_size,
            microbatches=layout.microbatches,
            data_rank=self.data_rank,
            data_size=layout.dp,
            consumed=self.iteration * run.train.global_batch_size,
            isolated=run.data.documents == "isolated",
            eod=self.tokenizer.eod_id,
            vocab_size=self.tokenizer.vocab_size,
            num_workers=run.data.num_workers,
        )
        self.callbacks: Sequence[Callback] = _reporters(run, self.folder) if parallel.is_main_rank() else ()

    def fit(self) -> None:
        """Train until train.iterations (or train.exit_after), evaluating and saving on the way and at the end.

        Raises:
            CheckpointError: the last checkpoint could not be written. (Failures before are reported only.)
        """
        run = self.run
        last = min(run.train.iterations, run.train.exit_after or run.train.iterations)
        self._call("on_start", run, self.iteration)
        try:
            while self.iteration < last:
                self._call("on_step", self.step())
                if _due(self.iteration, run.evaluation.interval, run.train.iterations):
                    self.evaluate()
                if _due(self.iteration, run.checkpoint.interval, last):
                    self.save()
                self._complete_save(self.checkpoints.poll)
            self._complete_save(self.checkpoints.wait)
            if self._save_error is not None:
                raise self._save_error
        finally:
            # No collectives here: after an error, other ranks may never arrive.
            self.stream.close()
            self._call("on_end")

    def step(self) -> StepRecord:
        """One optimizer step."""
        started, waited = time.perf_counter(), self.stream.wait_seconds
        batches = training_batches(
            self._next_samples(),
            self.run.modes,
            seed=self.run.seed,
            iteration=self.iteration,
            data_rank=self.data_rank,
            data_size=self.layout.dp,
        )
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        totals = forward_backward(self.chunks, batches, forward_only=False)
        lr = float(get_canonical_lr_for_logging(self.optimizer.param_groups) or 0.0)
        applied, norm = optimizer_step(self.optimizer, loss=totals.loss)
        self.schedule.step(increment=1)
        self.iteration += 1
        share = self._attention_share(batches)
        platform.synchronize()
        tokens = self.run.train.global_batch_size * self.run.data.sequence_length
        flops = 3 * sum(arch.flops_per_token(self.run.model, self.run.data.sequence_length, share).values())
        return StepRecord(
            iteration=self.iteration,
            loss=totals.mean_loss,
            grad_norm=norm,
            lr=lr,
            attention_share=share,
            tokens=tokens,
            consumed_samples=self.stream.consumed,
            seconds=time.perf_counter() - started,
            data_seconds=self.stream.wait_seconds - waited,
            model_flops=flops * tokens,
            skipped=not applied,
        )

    def evaluate(self) -> list[Evaluation]:
        """Evaluate on all validation sets under all plans of the config."""
        datasets = {name: blend for name, blend in self.datasets.items() if name != "train"}
        results = evaluate(
            self.run, self.layout, self.chunks, datasets, self.tokenizer, data_rank=self.data_rank
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

    # ------------------------------------------------------------------------------------------------- internals

    def _complete_save(self, complete: Callable[[], Path | None]) -> None:
        """Make or finish a checkpoint, or report that it failed."""
        try:
            path = complete()
        except CheckpointError as error:
            log.error("%s; the run goes on, the last good checkpoint stays", error)
            self._save_error = error
            return
        if path is not None:
            self._save_error = None
            self._call("on_checkpoint", path)

    def _resume(self) -> None:
        manifest = self.checkpoints.load(self._check_manifest)
        if manifest is None:
            return
        self.iteration = self._saved = manifest.iteration
        self.schedule.step(increment=manifest.iteration)
        self.evaluations = manifest.evaluations
        log.info("resumed from iteration %d of %s", manifest.iteration, self.checkpoints.root)

    def _check_manifest(self, manifest: Manifest) -> None:
        """Refuse to go on from the checkpoint of another model, or of other data or batches so far."""
        root, run = self.checkpoints.root, self.run
        written = manifest.run()
        then, now = written.model, run.model
        changed = [
            f"{field.name} (there {getattr(then, field.name)}, here {getattr(now, field.name)})"
            for field in dataclasses.fields(now)
            if field.name not in _OF_NO_MATTER and getattr(then, field.name) != getattr(now, field.name)
        ]
        if changed:
            raise CheckpointError(
                f"{root}: belongs to model {then.name}, which differs in {', '.join(changed)}; "
                "choose another output_dir"
            )
        if manifest.consumed_samples != manifest.iteration * run.train.global_batch_size:
            raise CheckpointError(
                f"{root}: its {manifest.iteration} iterations read {manifest.consumed_samples} samples, which "
                f"train.global_batch_size {run.train.global_batch_size} does not give; set it back"
            )
        if (sharded := written.parallel.distributed_optimizer) != run.parallel.distributed_optimizer:
            raise CheckpointError(
                f"{root}: written with parallel.distributed_optimizer {str(sharded).lower()}, whose state the other "
                "optimizer cannot read; set it back"
            )
        if manifest.data["train"] is not None:  # a converted checkpoint knows of no data
            check_resume(manifest.data["train"], self.datasets["train"])

    def _manifest(self) -> Any:
        iteration, evaluations, stream = self.iteration, self.evaluations, self.stream.state()
        layout = self.layout

        def make(files: dict[str, dict[str, Any]]) -> Manifest:
            return Manifest(
                iteration=iteration,
                consumed_samples=iteration * self.run.train.global_batch_size,
                config=to_dict(self.run),
                layout={"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp, "dp": layout.dp},
                rng={"seed": self.run.seed, "state": "none: every draw is a function of seed, iteration, microbatch"},
                data={"train": stream, "tokenizer": self.tokenizer.describe()},
                evaluations=evaluations,
                versions=package_versions(),
                commit=git_commit(),
                files=files,
            )

        return make

    def _next_samples(self) -> list[Batch]:
        try:
            return self.stream.next_batches()
        except DataError as error:
            error.rank_local = True  # only this rank read the sample at fault
            raise

    def _attention_share(self, batches: list[Microbatch]) -> float:
        """Mean over the whole global batch."""
        share = torch.tensor(
            sum(batch.plan.attention_share for batch in batches) / len(batches), device=platform.device()
        )
        if self.layout.dp > 1:
            torch.distributed.all_reduce(share, group=parallel_state.get_data_parallel_group())
        return float(share) / self.layout.dp

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*arguments)


def _reporters(run: RunConfig, folder: Path) -> list[Callback]:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".config.tmp"
    temporary.write_text(to_yaml(run))
    os.replace(temporary, folder / "config.yaml")
    reporters: list[Callback] = [
        MetricsFile(folder / "metrics.jsonl"),
        Display(run.logging.interval, run.train.iterations),
    ]
    if run.logging.tensorboard:
        reporters.append(TensorBoard(folder / "tensorboard"))
    if run.logging.wandb_project:
        reporters.append(WeightsAndBiases(run.logging.wandb_project, run, to_dict(run)))
    return reporters


_OF_NO_MATTER = ("name", "recurrence_chunk", "init_std", "decay_init", "dt_init")
"""Fields of a model that may change on the way: they alter neither its parameters nor what it computes."""


def _due(iteration: int, interval: int, last: int) -> bool:
    return iteration == last or (interval > 0 and iteration % interval == 0)
