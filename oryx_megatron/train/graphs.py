"""Forward and backward of a microbatch as CUDA graphs: captured once for each shape, replayed for every later one.

A step of an Oryx model launches some 3,000 kernels, many from Python; below 30,000 tokens a microbatch the GPU waits
for the host. What is launched depends on a mode plan only through its number of attention rows (`Program.shape`); the
rest is data, copied into fixed buffers before a replay. So a run has at most length / chunk + 1 shapes.

`MicrobatchGraphs.forward_step` is a forward step for megatron-core's pipeline schedules, which stay as they are: it
returns an output whose backward pass replays the second graph. Each microbatch in flight (one, or under pipeline
parallelism as many as the schedule keeps) has a memory pool of its own, shared by all shapes: the tensors of one shape
are gone when another one's graph runs. Reductions of gradients and gatherings of parameters that megatron-core's hooks
start inside a pass (parallel.overlap) are captured with it.

The first step, and the first microbatch that needs another part of the model, are launched: that compiles, tunes and
allocates what lasts (FP8 copies of weights, optimizer state).
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from torch import Tensor

from oryx_megatron import compat, parallel, platform
from oryx_megatron.errors import first_line
from oryx_megatron.train import overlap
from oryx_megatron.train.step import Microbatch, Program, launch

log = logging.getLogger(__name__)


@dataclass
class _Slot:
    """Memory of one microbatch between its forward and its backward pass."""

    number: int
    pool: Any
    free: bool = True
    _buffers: dict[Hashable, Tensor] = field(default_factory=dict)

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """A tensor that all graphs of this slot use for one purpose, and whose memory they use for nothing else."""
        key = (name, like.shape, like.dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(like, requires_grad=False)
        return self._buffers[key]


@dataclass
class _Pair:
    """Both passes of microbatches of one shape through one model chunk, in one slot."""

    placed: Any
    source: Tensor | None
    """Output of the pipeline stage before; None in the first one."""
    source_gradient: Tensor | None
    output: Tensor
    output_gradient: Tensor
    report: Tensor | None
    """[≥ 4] loss, tokens, bytes, z-loss (Totals.sums), on the last stage."""
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    reduces: bool
    """Gradients are reduced inside `backward`."""
    first_runs: list[Any]
    """TransformerEngine's modules that run for the first time in their step: they cast weights (in FP8), and overwrite
    the weights' gradients instead of adding to them."""


class MicrobatchGraphs:
    """Captures and replays the microbatches of one engine.

    Args:
        program: How a microbatch runs.
        chunks: Model chunks in megatron-core's data-parallel wrapper, made outside the default stream.
    """

    def __init__(self, program: Program, chunks: list[Any]) -> None:
        self.program, self.chunks = program, chunks
        self.failed: str | None = None
        """Why microbatches are launched, once a capture has failed."""
        self._anchor = torch.zeros((), device=platform.device(), requires_grad=True)
        self._microbatches = 0
        parallel.hold(self)
        self._linears = [[m for m in chunk.modules() if hasattr(m, "is_first_microbatch")] for chunk in chunks]
        self.forget()

    @property
    def captured(self) -> int:
        """Pairs of graphs so far."""
        return len(self._pairs)

    def forget(self) -> None:
        """Drop all graphs: parameters, FP8 state or process groups are replaced. The next step is launched."""
        self._pairs: dict[Hashable, _Pair] = {}
        self._slots: list[_Slot] = []
        self._begun = [0] * len(self.chunks)
        """Microbatches of this step so far, by chunk."""
        self._seen: list[set[str]] = [set() for _ in self.chunks]
        """Parts of each chunk that were launched."""
        self._warm = False
        self._seconds = 0.0
        self._told = 0

    def begin(self, microbatches: int) -> None:
        """A step of so many microbatches begins."""
        self._warm = self._warm or self._begun[0] > 0
        self._microbatches, self._begun = microbatches, [0] * len(self.chunks)
        for slot in self._slots:
            slot.free = True
        if len(self._pairs) > self._told:
            level = logging.DEBUG if self._told else logging.INFO
            gib = torch.cuda.memory_reserved() / 2**30
            log.log(level, "graphs: %d captured in %.1f s, %.1f GiB reserved", len(self._pairs), self._seconds, gib)
            self._told = len(self._pairs)

    def forward_step(self, batches: Iterator[Microbatch], chunk: Any) -> tuple[Tensor, Any]:
        """megatron-core's forward step of a training microbatch."""
        number = self._number(chunk)
        position = self._begun[number]
        self._begun[number] += 1
        batch = next(batches)
        if self.failed or not self._launched(number, batch):
            return launch(self.program, iter([batch]), chunk)
        # Under virtual stages the schedule itself starts the reductions.
        reduces = chunk.ddp_config.overlap_grad_reduce and len(self.chunks) == 1 and position == self._microbatches - 1
        gathers = _gather_begun(chunk)
        slot = self._take_slot()
        key = (number, slot.number, self._first_runs(number), gathers, reduces, self.program.shape(batch))
        waiting = [module for module in self._linears[number] if module.is_first_microbatch]
        pair = self._pairs.get(key)
        if pair is None:
            try:
                pair = self._pairs[key] = self._capture(batch, chunk, slot, reduces=reduces)
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                self._give_up(error)
                overlap.give_up_reduction(chunk)
                for group in _groups(chunk):  # what a capture began was never sent
                    group.grad_reduce_handle = group.param_gather_handle = None
                    group.param_gather_dispatched = group.param_gather_dispatched and not gathers
                for module in waiting:
                    module.is_first_microbatch = True
                return launch(self.program, iter([batch]), chunk)
        else:
            self.program.refill(pair.placed, batch)
            for module in pair.first_runs:
                module.is_first_microbatch = False
        for group in _groups(chunk) if gathers else ():
            group.param_gather_dispatched = True
        source = self._anchor if pair.source is None else _stage_input(chunk)
        output = _Replay.apply(source, pair, slot, chunk)
        if pair.report is None:
            return output, None
        report = pair.report.clone()
        return output, lambda total: (total, report[1].int(), {"totals": report})

    def _launched(self, number: int, batch: Microbatch) -> bool:
        """Whether all that this microbatch computes in a chunk was launched before; else it will be now."""
        parts, seen = self.program.parts(batch), self._seen[number]
        if self._warm and parts <= seen:
            return True
        if not parts <= seen:
            seen |= parts
            self._release()  # else its activations would lie beside those of the graphs
        return False

    def _number(self, chunk: Any) -> int:
        return next(i for i, own in enumerate(self.chunks) if own is chunk)

    def _first_runs(self, number: int) -> tuple[bool, ...]:
        """Which modules of a chunk have not run in this step: those of a mode may first do so in a later microbatch."""
        return tuple(module.is_first_microbatch for module in self._linears[number])

    def _take_slot(self) -> _Slot:
        slot = next((slot for slot in self._slots if slot.free), None)
        if slot is None:
            gc.collect()  # cycles of the launched step hold activations
            slot = _Slot(len(self._slots), torch.cuda.graph_pool_handle())
            self._slots.append(slot)
        slot.free = False
        return slot

    def _capture(self, batch: Microbatch, chunk: Any, slot: _Slot, *, reduces: bool) -> _Pair:
        begun, groups = time.perf_counter(), _groups(chunk)
        model, given = unwrap_model(chunk), _stage_input(chunk)
        source = None
        placed = self.program.place(batch, chunk)
        waiting = [module for module in self._linears[self._number(chunk)] if module.is_first_microbatch]
        last = [group.is_last_microbatch for group in groups]
        forward, backward = _graph(), _graph()
        how: dict[str, Any] = {
            "pool": slot.pool,
            "stream": torch.cuda.current_stream(),
            "capture_error_mode": "thread_local",  # other threads may save a checkpoint or watch NCCL meanwhile
        }
        try:
            if given is not None:
                # All pairs of the slot read one buffer, each by a leaf with a gradient of its own.
                source = slot.buffer("source", given).detach().requires_grad_()
                model.set_input_tensor([source])
            with torch.cuda.graph(forward, **how):
                result, loss = self.program.forward(placed, chunk)
                report = None
                if model.post_process:
                    result, _, reports = loss(result)
                    report = reports["totals"]
                _join(groups, "param_gather_handle")
                output = slot.buffer("output", result).copy_(result.detach())
                output_gradient = slot.buffer("output gradient", result)
            for group in groups:
                group.is_last_microbatch = reduces
            with torch.cuda.graph(backward, **how):
                compat.torch.run_backward(result, output_gradient)
                _join(groups, "grad_reduce_handle")
                gradient = None
                if source is not None and source.grad is not None:
                    gradient = slot.buffer("source gradient", source).copy_(source.grad)
                    source.grad = None
        finally:
            for group, was in zip(groups, last):
                group.is_last_microbatch, group.per_param_grad_ready_counts = was, {}
            if given is not None:
                model.set_input_tensor([given])
        first_runs = [module for module in waiting if not module.is_first_microbatch]
        self._seconds += time.perf_counter() - begun
        return _Pair(placed, source, gradient, output, output_gradient, report, forward, backward, reduces, first_runs)

    def _release(self) -> None:
        """Give back all graphs with their memory; a slot that is made anew has a pool of its own."""
        if self._slots:
            torch.cuda.synchronize()
            self._pairs.clear()
            self._slots.clear()
            torch.cuda.empty_cache()

    def _give_up(self, error: Exception) -> None:
        torch.cuda.synchronize()
        self.failed = first_line(error)
        self._release()
        # Generators still count for the capture that failed.
        generator, tracker = torch.cuda.default_generators[torch.cuda.current_device()], get_cuda_rng_tracker()
        generator.graphsafe_set_state(generator.clone_state())
        tracker.set_states({name: state.clone_state() for name, state in tracker.get_states().items()})
        gc.collect()
        torch.cuda.empty_cache()
        log.warning("graphs: capture failed (%s); kernels are launched one by one instead", self.failed)


class _Replay(torch.autograd.Function):
    """The two graphs of a pair as one differentiable function of the stage's input."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, pair: _Pair, slot: _Slot, chunk: Any) -> Tensor:
        ctx.pair, ctx.slot, ctx.chunk = pair, slot, chunk
        if pair.source is not None:
            pair.source.copy_(source)
        pair.forward.replay()
        return pair.output.clone()  # the next replay overwrites it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        pair = ctx.pair
        pair.output_gradient.copy_(gradients[0])
        pair.backward.replay()
        ctx.slot.free = True
        for group in _groups(ctx.chunk) if pair.reduces else ():
            group.grad_reduce_handle = _Joined()
        gradient = pair.source_gradient
        return (None if gradient is None else gradient.clone()), None, None, None


def _graph() -> torch.cuda.CUDAGraph:
    """One that knows megatron-core's generators, which are forked around dropout even where there is none."""
    graph = torch.cuda.CUDAGraph()
    for state in get_cuda_rng_tracker().get_states().values():
        graph.register_generator_state(state)
    return graph


class _Joined:
    """Handle of a reduction that ended inside a graph."""

    def wait(self) -> None:
        """Nothing to wait for."""


def _groups(chunk: Any) -> list[Any]:
    return chunk.bucket_groups + chunk.expert_parallel_bucket_groups


def _join(groups: list[Any], name: str) -> None:
    """Let the captured stream wait for communication that began in it."""
    for group in groups:
        if (handle := getattr(group, name)) is not None:
            handle.wait()
            setattr(group, name, None)


def _gather_begun(chunk: Any) -> bool:
    """Whether this pass gathers the parameters; gatherings under way are waited for."""
    if not (chunk.ddp_config.overlap_param_gather and chunk.ddp_config.use_distributed_optimizer):
        return False
    groups = _groups(chunk)
    if all(not group.param_gather_dispatched for group in groups):
        return True
    for group in groups:
        group.finish_param_sync(skip_next_bucket_dispatch=True)
    return False


def _stage_input(chunk: Any) -> Tensor | None:
    model = unwrap_model(chunk)
    return None if model.pre_process else model.decoder.input_tensor
