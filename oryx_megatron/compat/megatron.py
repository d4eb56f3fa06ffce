"""megatron-core (0.16.1): what it loads in vain, and what of its optimizers and checkpoints does not hold here.

| patch | why |
|---|---|
| `AROUND`: megatron.core.jit's `jit_fuser` is torch.compile | loads dynamo and inductor; put off to the first call of a fused function beside a GPU, on a CPU they run as written |
| `AROUND`: megatron.core.timers loads torch's TensorBoard writer | never used: our own writes TensorBoard's files |
| `AROUND`: nccl_allocator and unified_memory load torch's C++ builder | put off to a build (compat/torch.py) |
| `AROUND`: moe_utils lacks `te_general_gemm` without TransformerEngine | every router asks for it |
| `AROUND`: moe_utils leaves sizes of an exchange between CPUs in tensors | torch takes numbers |
| `numbering_all_parameters` | saving an optimizer that is not sharded looks parameters up by their number among those in bf16 |
| `fp32_apart` | DistributedOptimizer saves and loads the state of parameters in fp32 as another's where a group has bf16 ones, too |
| `allocate_torch_state` | describing what to load fails on torch's AdamW that never stepped |
| `own_steps` | loading gives all parameters of torch's AdamW one step tensor, which each increases |
| `keep_groups`, `lists_of_groups` | an empty group's list of masters does not come back from a checkpoint |
| `without_classes` | groups of the offloading optimizer hold classes, which no safe reader builds |
| `count_fp32_as_copied` | the offloading optimizer does not load what it saved of parameters in fp32 |
| `without_gradients` | with them, views of fp32 parameters are no leaves, and the offloading optimizer takes no others |
| `quiet_layers` | TransformerLayer warns of an MLP of another class than its own, once for every layer |
| `InOrder` | gradient buckets are reduced as they are complete, in an order that depends on the mode plan |
| `destroy_groups` | process groups are only forgotten; each gloo group would keep its threads |

On GPUs the fused functions are compiled by the same torch.compile as before.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from oryx_megatron.compat.hook import Around, instead, made_on_first_use
from oryx_megatron.compat.torch import late_builder

# ------------------------------------------------------------------------------------------------------------ imports


@contextlib.contextmanager
def _without_tensorboard(module: ModuleType) -> Iterator[None]:
    with instead("torch.utils.tensorboard", None):
        yield


@contextlib.contextmanager
def _with_late_compilation(module: ModuleType) -> Iterator[None]:
    yield
    module.jit_fuser = compiled_on_first_use  # type: ignore[attr-defined]


def compiled_on_first_use(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled by torch.compile at its first call beside a GPU; as it is on a CPU.

    megatron-core's fused activations are a GPU matter: compiling them takes minutes and a C++ compiler on a CPU.
    """

    def compiled() -> Callable[..., Any]:
        import torch

        return torch.compile(function) if torch.cuda.is_available() else function

    return made_on_first_use(function, compiled)


@contextlib.contextmanager
def _with_experts_on_cpus(module: ModuleType) -> Iterator[None]:
    """Of moe_utils, before the token dispatcher takes names from it."""
    yield
    vars(module).setdefault("te_general_gemm", None)
    original = module.maybe_move_tensor_to_cpu
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = original(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and hasattr(moved, "numpy") else moved

    module.maybe_move_tensor_to_cpu = move  # type: ignore[attr-defined]
    if dispatcher := sys.modules.get("megatron.core.transformer.moe.token_dispatcher"):
        dispatcher.maybe_move_tensor_to_cpu = move  # type: ignore[attr-defined]


AROUND: dict[str, Around] = {
    "megatron.core.transformer.moe.moe_utils": _with_experts_on_cpus,
    "megatron.core.jit": _with_late_compilation,
    "megatron.core.timers": _without_tensorboard,
    "megatron.core.nccl_allocator": late_builder,
    "megatron.core.inference.unified_memory": late_builder,
}

# ------------------------------------------------------------------------------------------------------------- layers


def quiet_layers() -> None:
    """No warning for an MLP of another class than megatron-core's own: `params` of its spec give its width."""
    logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
        lambda record: "Unknown MLP type" not in record.getMessage()
    )


# --------------------------------------------------------------------------------------------------------- optimizers


MASTERS = "fp32_from_fp16_params"
"""Name of the masters of an optimizer that is not sharded, in its state."""


def singles(optimizer: Any) -> list[Any]:
    """The optimizers that are chained in one, or the one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def fp32_apart(overrides: dict[Any, Any], names: tuple[str, ...]) -> None:
    """Give parameters of these names, which stay fp32 in a bf16 model, a group of their own, without weight decay.

    `is_decoupled_lr` only tells the groups of a checkpoint apart.
    """
    from megatron.core.optimizer import ParamKey

    overrides[ParamKey(name=names)] = {"wd_mult": 0.0, "is_decoupled_lr": True}


def without_gradients() -> contextlib.AbstractContextManager[Any]:
    """Around making an optimizer: views of fp32 parameters become leaves, as torch's optimizers want them."""
    import torch

    return torch.no_grad()


def count_fp32_as_copied() -> None:
    """Let the offloading optimizer load what it saved; harmless when called again.

    After loading it looks up the fp32 copy of every parameter, and finds none of those that are fp32 themselves: their
    copies in host memory count as such from here on.
    """
    import torch
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    plain = HybridDeviceOptimizer._get_sub_optimizer_param_groups
    if hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def groups(self: Any, fraction: float) -> Any:
        *others, copies, originals, fp32 = plain(self, fraction)
        fp32.update({parameter: copy for parameter, copy in copies.items() if parameter.dtype == torch.float32})
        return *others, copies, originals, fp32

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = groups


def allocate_torch_state(optimizer: Any) -> None:
    """Give torch's AdamW, the one used without TransformerEngine, its state before the first step.

    megatron-core reads the step from it when it describes what to load, and fails on an optimizer that never stepped.
    """
    import torch

    for single in singles(optimizer):
        inner = single.optimizer
        if type(inner) is not torch.optim.AdamW or inner.state:
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                zeros = (torch.zeros_like(parameter) for _ in range(2))
                inner.state[parameter] = {"step": torch.tensor(0.0), **dict(zip(("exp_avg", "exp_avg_sq"), zeros))}


def own_steps(optimizer: Any) -> None:
    """After loading: a step tensor for each parameter of torch's AdamW, where all were given one."""
    import torch

    if type(optimizer) is torch.optim.AdamW:
        for values in optimizer.state.values():
            values["step"] = values["step"].clone()


# ----------------------------------------------------------------------------------------- checkpoints of an optimizer


@contextlib.contextmanager
def numbering_all_parameters(optimizer: Any) -> Iterator[None]:
    """Let megatron-core find the state of each parameter in an optimizer that is not sharded.

    It looks parameters up by their number among those in bf16, where torch counts those that stay in fp32 too. Each
    group has parameters of one kind only (`fp32_apart`).
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    kept = {}
    for single in singles(optimizer):
        if isinstance(single, Float16OptimizerWithFloat16Params):
            kept[single] = single.float16_groups
            groups = zip(single.float16_groups, single.fp32_from_fp32_groups, strict=True)
            single.float16_groups = [halves or whole for halves, whole in groups]
    try:
        yield
    finally:
        for single, groups in kept.items():
            single.float16_groups = groups


def keep_groups(state: dict[str, Any]) -> None:
    """Before saving: name the lists of masters by their group."""
    if MASTERS in state:
        state[MASTERS] = {i: dict(enumerate(group)) for i, group in enumerate(state[MASTERS]) if group}


def lists_of_groups(state: dict[str, Any]) -> None:
    """After reading: the lists that `keep_groups` named, empty ones too."""
    if MASTERS in state:
        count = len(state["optimizer"]["param_groups"])
        state[MASTERS] = [list(state[MASTERS].get(i, {}).values()) for i in range(count)]


def without_classes(state: Any) -> Any:
    """`state` less its entries that are classes: groups of the offloading optimizer name some."""
    if isinstance(state, dict):
        return {key: without_classes(value) for key, value in state.items() if not isinstance(value, type)}
    return [without_classes(value) for value in state] if isinstance(state, list) else state


# -------------------------------------------------------------------------------------------------------------- groups


class InOrder:
    """Starts the reduction of a complete bucket when all that a backward pass completes before it have started.

    megatron-core starts it when the bucket is complete, which under mode plans is in another order on other ranks.

    Args:
        chunk: megatron-core's DistributedDataParallel.
    """

    def __init__(self, chunk: Any) -> None:
        place = {parameter: i for i, parameter in enumerate(chunk.module.parameters())}
        for own in (chunk.bucket_groups, chunk.expert_parallel_bucket_groups):  # megatron-core waits in this order
            own.sort(key=lambda group: -min(place[parameter] for parameter in group.params))
        groups = chunk.bucket_groups + chunk.expert_parallel_bucket_groups
        self._starts = [group.start_grad_sync for group in groups]
        self.reset()
        for number, group in enumerate(groups):
            group.start_grad_sync = functools.partial(self._complete, number)

    def reset(self) -> None:
        """A backward pass was given up: the next one begins with the first bucket."""
        self._turn = 0
        self._waiting: dict[int, dict[str, Any]] = {}
        """Arguments of the calls that wait for their turn, by place of their bucket."""

    def _complete(self, number: int, **keywords: Any) -> None:
        self._waiting[number] = keywords
        while self._turn in self._waiting:
            self._starts[self._turn](**self._waiting.pop(self._turn))
            self._turn = (self._turn + 1) % len(self._starts)


def destroy_groups() -> None:
    """Give up all process groups but the default one, with their threads."""
    import torch
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    parallel_state.destroy_model_parallel()
    default = distributed_c10d._get_default_group()
    for group in [group for group in distributed_c10d._world.pg_map if group is not default]:
        torch.distributed.destroy_process_group(group)
