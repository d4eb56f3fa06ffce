"""DeepSpeed (0.19.8): its import on machines as they are, and what ZeRO's optimizers must do under mode plans.

| patch | why |
|---|---|
| `AROUND`: its Muon compiles three functions at import | loads dynamo and inductor; put off to their first call |
| `import_deepspeed` | it takes a machine without a GPU for a CUDA one or fails without LOCAL_RANK, compiles a kernel for inference at the first start between CPU ranks, and lets the linker print |
| `always_zero` | in stage 1 of bf16 it takes an optimizer of its own that cannot leave out an update |
| `reduce_in_order` | ZeRO 1 and 2 fill their buckets as gradients come, in an order that depends on the mode plan |
| `discard_when` | there is no call that drops gradients: what drops those that overflowed does it |
| `keep_clip_grad` | ZeRO 1 and 2 take `gradient_clipping` from a checkpoint instead of the config |
| `only_read_by` | it unpickles whatever the files of a checkpoint hold |
| `keep_failures` | a save that fails on one rank leaves the others waiting at a barrier |
| `forget_groups` | `destroy` leaves references to process groups behind |
"""  # noqa: E501

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from oryx_megatron.compat.hook import Around, made_on_first_use

# ------------------------------------------------------------------------------------------------------------- import


@contextlib.contextmanager
def _with_a_late_compiler(module: ModuleType) -> Iterator[None]:
    """DeepSpeed's Muon: its functions are compiled as it says, when they are called."""
    compiler = importlib.import_module("deepspeed.runtime.compiler")
    original = compiler.compile

    def compile(**options: Any) -> Callable[..., Any]:
        return lambda function: made_on_first_use(function, lambda: original(**options)(function))

    compiler.compile = compile  # type: ignore[attr-defined]
    try:
        yield
    finally:
        compiler.compile = original  # type: ignore[attr-defined]


AROUND: dict[str, Around] = {"deepspeed.runtime.zero.muon.original_muon": _with_a_late_compiler}


def import_deepspeed() -> Any:
    """The deepspeed package, set up for this machine."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists, also without torchrun
    with _quiet_linker():
        import deepspeed

        # Between CPU ranks it would compile an all-reduce through shared memory, for inference, at every first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


@contextlib.contextmanager
def _quiet_linker() -> Iterator[None]:
    """No standard error of this process and its children: importing deepspeed tries what the linker can find."""
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


# --------------------------------------------------------------------------------------------------------------- ZeRO


@contextlib.contextmanager
def always_zero() -> Iterator[None]:
    """Around `initialize`: ZeRO's own optimizer in stage 1 of bf16 too, where another cannot `discard_when`."""
    from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION
    from deepspeed.runtime.engine import DeepSpeedEngine as Engine

    choose = Engine._do_optimizer_sanity_check
    Engine._do_optimizer_sanity_check = lambda *arguments: (
        ZERO_OPTIMIZATION if (chosen := choose(*arguments)) == BFLOAT16 else chosen
    )
    try:
        yield
    finally:
        Engine._do_optimizer_sanity_check = choose


def reduce_in_order(engine: Any) -> None:
    """Let ZeRO 1 and 2 reduce gradients in one order on all ranks, whatever the order in which they are made.

    They fill their buckets as gradients come, but data-parallel ranks run different plans, under which a mixer's
    parameters get theirs in different orders; then a bucket's elements would be of different parameters. ZeRO 3 reduces
    a mixer at a time, its parameters in order.
    """
    reduce = getattr(engine.optimizer, "process_gradients", None)
    if reduce is None:
        return
    order = [id(parameter) for parameter in engine.module.parameters()][::-1]
    waiting: dict[int, tuple[Any, int]] = {}
    position = 0

    def reduce_in_order(parameter: Any, group: int) -> None:
        nonlocal position
        waiting[id(parameter)] = parameter, group
        while position < len(order) and order[position] in waiting:
            reduce(*waiting.pop(order[position]))
            position += 1
        if position == len(order):
            position = 0

    engine.optimizer.process_gradients = reduce_in_order


def discard_when(engine: Any, when: Callable[[], bool]) -> None:
    """Let a step drop its gradients where `when` says so, by the way in which those that overflowed are dropped.

    Every ZeRO optimizer calls this between its own check and what follows from it.
    """
    optimizer = engine.optimizer
    update_scale = optimizer._update_scale

    def update_scale_or_discard(overflow: bool = False) -> None:
        optimizer.overflow = bool(overflow) or when()
        update_scale(optimizer.overflow)

    optimizer._update_scale = update_scale_or_discard


# -------------------------------------------------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def keep_clip_grad(engine: Any) -> Iterator[None]:
    """Around loading: gradients are clipped as configured; ZeRO 1 and 2 take that from the file."""
    clip_grad = getattr(engine.optimizer, "clip_grad", None)
    yield
    if clip_grad is not None:
        engine.optimizer.clip_grad = clip_grad


def only_read_by(engine: Any, load: Callable[..., Any]) -> None:
    """Read every file of a checkpoint by `load`(path, map_location)."""
    engine.checkpoint_engine.load = load


def keep_failures(engine: Any, kept: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Pass what a save writes through `kept`: what fails on one rank must not keep it from the barriers of a save."""
    engine.checkpoint_engine.save = kept(engine.checkpoint_engine.save)
    engine._copy_recovery_script = kept(engine._copy_recovery_script)


def forget_groups() -> None:
    """Let go of process groups, so that others can follow in this process."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    groups._release_process_group_references()
