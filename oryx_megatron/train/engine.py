"""What moves parameters in a training run: megatron-core, or another module of train/ behind the same methods."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.utils import get_model_config
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.checkpoint import CheckpointManager
from oryx_megatron.checkpoint.manager import Checkpoints
from oryx_megatron.checkpoint.remote import RemoteCheckpoints
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.config.validate import Layout
from oryx_megatron.model import build_model
from oryx_megatron.model.experts import routers
from oryx_megatron.model.warm import compile_in_turn
from oryx_megatron.paths import is_url
from oryx_megatron.train import ahead
from oryx_megatron.train.ema import WeightAverage
from oryx_megatron.train.freeze import freeze
from oryx_megatron.train.graphs import MicrobatchGraphs
from oryx_megatron.train.intervals import retention
from oryx_megatron.train.optimizer import (
    apply_gradients,
    build_optimizer,
    connect,
    gradient_norm,
    wrap,
)
from oryx_megatron.train.schedule import Schedule
from oryx_megatron.train.step import (
    REPORTED,
    ForwardStep,
    Microbatch,
    OryxProgram,
    Program,
    Totals,
    forward_backward,
    launch,
)
from oryx_megatron.train.update import FusedUpdate

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Model, optimizer and learning rate of one run on this rank. Every method is collective."""

    chunks: list[Any]
    """Model chunks that `forward_backward(…, forward_only=True)` can evaluate."""

    def gradients(self, batches: list[Microbatch]) -> Totals:
        """Forward and backward pass of a step's microbatches."""

    def gradient_norm(self) -> Tensor:
        """[] L2 norm of those gradients, over all ranks, before clipping."""

    def update(self, norm: float) -> None:
        """Clip gradients of this norm and apply them."""

    def discard(self) -> None:
        """Drop the gradients instead of applying them."""

    def learning_rate(self) -> float:
        """Learning rate of the next update."""

    def advance(self) -> None:
        """Move the learning rate on by a step, whether or not it was applied."""

    def rewind(self, iteration: int) -> None:
        """Set the learning rate to where `iteration` steps are done."""

    def averaged(self) -> AbstractContextManager[bool]:
        """The model holds the average of its weights inside, if there is one (train.ema): whether it does."""

    def checkpoints(self, root: Path) -> Checkpoints:
        """The checkpoints of this engine under `root`."""


def build_engine(run: RunConfig, layout: Layout) -> Engine:
    """The engine that the config names; one but megatron-core's is the module of that name, with `build`."""
    if run.engine == "megatron":
        return MegatronEngine(run)
    return importlib.import_module(f"oryx_megatron.train.{run.engine}").build(run, layout)


class MegatronEngine:
    """megatron-core's data-parallel wrapper, optimizer and pipeline schedules.

    Args:
        run: Validated config.
        model: Model chunks of this rank; None builds the run's Oryx model.
        program: How they run a microbatch.
    """

    def __init__(self, run: RunConfig, *, model: list[Any] | None = None, program: Program | None = None) -> None:
        self.run, self.program = run, program or OryxProgram(run.model)
        launched = why_launched(run)
        if launched is None:
            platform.leave_default_stream()
        built = model or build_model(run.model, run.parallel, run.precision, seed=run.seed, z_loss=run.train.z_loss)
        self.frozen = freeze(run, built)
        self.chunks: list[Any] = wrap(run, built)
        if launched is None and program is None and not get_model_config(self.chunks[0]).fused_mixer:
            launched = "kernels.mixer is not fused"  # the kernels of separate steps depend on the plan
        self.graphs = None if launched else MicrobatchGraphs(self.program, self.chunks)
        if platform.has_gpu():
            log.info("graphs: %s", f"off, {launched}" if launched else "microbatches are captured as shapes come")
        warm(run, self.chunks)
        self.optimizer = build_optimizer(run, self.chunks, self.frozen)
        self.schedule = Schedule(run, self.optimizer)
        connect(run, self.chunks, self.optimizer)
        self.fused_update = FusedUpdate(self.optimizer) if FusedUpdate.serves(run, self.optimizer) else None
        if self.fused_update is not None:
            self.fused_update.connect(get_model_config(self.chunks[0]))
        ema = run.train.ema
        self.average = None if ema is None else WeightAverage(ema, self.chunks, self.optimizer)
        self._totals = Totals(torch.ones(REPORTED))
        """Of the step whose gradients these are."""
        self._router_biases: list[tuple[Tensor, Tensor]] = []
        """Those of the routers, and their values before this step, whose backward pass moved them."""

    def gradients(self, batches: list[Microbatch]) -> Totals:
        """See Engine."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.fused_update is not None:
            ranks = parallel_state.get_data_parallel_world_size()
            self.fused_update.begin(len(batches) * batches[0].tokens.numel() * ranks)
        biases = [router.expert_bias for router in routers(self.chunks) if router.expert_bias is not None]
        self._router_biases = [(bias, bias.clone()) for bias in biases]
        if self.graphs is None:
            step: ForwardStep = partial(launch, self.program)
        else:
            self.graphs.begin(len(batches))
            step = self.graphs.forward_step
        self._totals = forward_backward(self.chunks, batches, forward_only=False, forward_step=step)
        self.frozen.zero_gradients()
        return self._totals

    def gradient_norm(self) -> Tensor:
        """See Engine."""
        if self.fused_update is not None:
            return self.fused_update.norm(self._totals.sums[1])
        return torch.tensor(gradient_norm(self.optimizer), device=platform.device())

    def update(self, norm: float) -> None:
        """See Engine."""
        if self.fused_update is not None:
            self.fused_update.apply(norm, self._totals.tokens)
        else:
            apply_gradients(self.optimizer, norm)
        if self.average is not None:
            self.average.update(self.schedule.num_steps + 1)

    def discard(self) -> None:
        """See Engine: the next step begins by clearing them. Of what they did, only routers' biases are undone."""
        for bias, before in self._router_biases:
            bias.copy_(before)

    def learning_rate(self) -> float:
        """See Engine."""
        return float(get_canonical_lr_for_logging(self.optimizer.param_groups) or 0.0)

    def advance(self) -> None:
        """See Engine."""
        self.schedule.step(increment=1)

    def rewind(self, iteration: int) -> None:
        """See Engine."""
        if self.graphs is not None:
            self.graphs.forget()  # loading may have replaced FP8 state
        self.schedule.rewind(iteration)

    def averaged(self) -> AbstractContextManager[bool]:
        """See Engine."""
        return nullcontext(False) if self.average is None else self.average.in_place()

    def checkpoints(self, root: Path) -> CheckpointManager:
        """See Engine."""
        url = f"{self.run.output_dir}/checkpoints"
        kept = RemoteCheckpoints(url, root) if is_url(url) else None
        return CheckpointManager(root, retention(self.run), self.chunks, self.optimizer, kept, self.average)


@dataclass(frozen=True)
class Taken:
    """Result of one optimizer step."""

    totals: Totals
    grad_norm: float
    """Before clipping."""
    lr: float
    """Learning rate of this step."""
    bad: bool
    """Whether its update was left out."""
    exchanged: list[float]
    """What `exchange` gave, after its first number."""
    begun: Any
    reduced: Any
    updated: Any
    """Time marks of the device (platform.mark): before the first microbatch, gradients reduced, after the update."""
    by_mode: dict[str, float]
    """See `loss_by_mode`."""


def run_step(
    engine: Engine,
    batches: list[Microbatch],
    *,
    limit: float | None = None,
    exchange: Callable[[Tensor], Tensor] = lambda bad: bad,
    on_bad: Callable[[Totals, float], None] = lambda totals, norm: None,
) -> Taken:
    """One optimizer step; its update is left out when it is bad.

    Args:
        engine: Model and optimizer.
        batches: The microbatches of this rank.
        limit: Loss above which the step is bad (Guard.limit).
        exchange: From whether this rank sees a bad step, [] on the device, to [n]: how many ranks see one, and more
            that ranks tell each other. Alone, every rank decides for itself, from equal numbers.
        on_bad: Called with totals and gradient norm of a bad step, while its gradients are there.
    """
    begun = platform.mark()
    totals = engine.gradients(batches)
    lr = engine.learning_rate()
    reduced = platform.mark()
    norm = engine.gradient_norm()
    found = exchange(totals.bad(norm, limit))
    own = norm.new_empty(0) if totals.local is None else totals.local[:, :2]
    # The one moment at which the host waits for the device.
    (bad, *exchanged), (grad_norm,), of_batches = totals.read(found, norm, own)
    if bad > 0:
        on_bad(totals, grad_norm)
        engine.discard()
    else:
        engine.update(grad_norm)
    updated = platform.mark()
    engine.advance()
    by_mode = loss_by_mode(batches, of_batches)
    return Taken(totals, grad_norm, lr, bad > 0, exchanged, begun, reduced, updated, by_mode)


def loss_by_mode(batches: list[Microbatch], sums: list[float]) -> dict[str, float]:
    """Mean loss of this rank's microbatches read by attention, by the recurrence, and by both (`mixed`).

    Args:
        batches: The microbatches.
        sums: Loss in nats and counted labels of each, one after the other; none where another pipeline rank has them.
    """
    found: dict[str, tuple[float, float]] = {}
    for batch, loss, tokens in zip(batches if sums else (), sums[::2], sums[1::2], strict=True):
        mode = {1.0: "attention", 0.0: "recurrent"}.get(batch.plan.attention_share, "mixed")
        before = found.get(mode, (0.0, 0.0))
        found[mode] = before[0] + loss, before[1] + tokens
    return {mode: loss / tokens for mode, (loss, tokens) in found.items() if tokens}


def take_step(engine: Engine, batches: list[Microbatch]) -> tuple[float, float]:
    """`run_step` without a Trainer, for tests and benchmarks: mean loss and gradient norm."""
    taken = run_step(engine, batches)
    return taken.totals.mean_loss, taken.grad_norm


def why_launched(run: RunConfig) -> str | None:
    """Why kernels are launched one by one, or None where microbatches may be captured as CUDA graphs."""
    if run.kernels.graphs == "off":
        return "kernels.graphs is off"
    if not platform.has_gpu():
        return "there is no GPU"
    if run.precision.fp8 == "mxfp8" or run.precision.fp4 != "none":
        return f"not with precision {run.precision.fp4 if run.precision.fp8 == 'none' else run.precision.fp8}"
    if run.modes.align == "documents":
        return "not with modes.align documents, whose plans have any number of attention rows: each is a shape"
    drawn = run.modes.p_layers or any(stage.p_layers for stage in run.modes.schedule)
    if drawn and run.modes.fixed is None:
        return "not with modes.p_layers, whose groups of layers have any numbers of attention rows: each is a shape"
    if run.model.moe is not None:
        return "not with model.moe: how many tokens an expert takes is known only when the router has run"
    return None


def warm(run: RunConfig, chunks: list[Any]) -> None:
    """Compile the kernels of this run's model, where kernels are compiled."""
    if platform.has_gpu():
        log.info("kernels ready after %.0f s", compile_in_turn(run, chunks))
        ahead.end()
