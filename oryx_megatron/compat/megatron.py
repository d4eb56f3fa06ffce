"""megatron-core 0.16.1 and 0.19.2: imports that nothing here uses, what does not hold here, and what differs between the two.

0.16.1 is the last version for Python 3.11; requirements.txt chooses by the version of Python. Training is bit-equal
under both, and each reads the other's checkpoints (docs/architecture.md).

| patch | why |
|---|---|
| `AROUND`: megatron.core.jit's `jit_fuser` is torch.compile | loads dynamo and inductor; put off to the first call of a fused function beside a GPU, on a CPU they run as written |
| `AROUND`: moe.router (0.19) compiles a method of inference | put off to its first call |
| `AROUND`: megatron.core.timers loads torch's TensorBoard writer | never used: our own writes TensorBoard's files |
| `AROUND`: kv_block_allocator (0.19) has an invalid escape sequence | Python would warn of it at the first start |
| `AROUND`: nccl_allocator, unified_memory and (0.19) tensor_parallel.random load torch's C++ builder | put off to a build (compat/torch.py) |
| `AROUND`: moe_utils of 0.16 lacks `te_general_gemm` without TransformerEngine | every router asks for it |
| `AROUND`: moe_utils leaves sizes of an exchange between CPUs in tensors | torch takes numbers |
| `numbering_all_parameters` | saving an optimizer that is not sharded looks parameters up by their number among those in bf16 |
| `fp32_apart` | DistributedOptimizer saves and loads the state of parameters in fp32 as another's where a group has bf16 ones, too |
| `allocate_torch_state` | describing what to load fails on torch's AdamW that never stepped |
| `own_steps` | loading gives all parameters of torch's AdamW one step tensor, which each increases |
| `note_step` | a rank whose parameters are all frozen has no number of updates to save, and rank 0 writes it for all |
| `keep_groups`, `lists_of_groups` | an empty group's list of masters does not come back from a checkpoint |
| `without_classes` | groups of the offloading optimizer hold classes, which no safe reader builds |
| `count_fp32_as_copied` | the offloading optimizer does not load what it saved of parameters in fp32 |
| `without_gradients` | with them, views of fp32 parameters are no leaves, and the offloading optimizer takes no others |
| `quiet` | it warns of an MLP of another class than its own for every layer, and (0.19) of every model that is no HybridModel |
| `identify_groups` | 0.19 finds the optimizer's groups in a checkpoint by their learning rates, too: a run that resumes with another raises KeyError |
| `main_grad_of`, `added_to_main_grad` | its hook adds every gradient to a weight's fp32 buffer in a pass of its own; what was added before must say so, and it waits for a gradient all the same |
| `InOrder` | gradient buckets are reduced as they are complete, in an order that depends on the mode plan |
| `forget_models` | a second model in a process adds its losses to those of the first, by layer: IndexError where it has more |
| `destroy_groups` | process groups are only forgotten; each gloo group would keep its threads |
| `read_checkpoints_by` | three places of a checkpoint are unpickled without weights_only |
| `keep_common_failures`, `common_failure` | 0.16 raises on rank 0 alone, between two collectives, and leaves the others waiting in the second |
| `keep_causes` | 0.19 reports the class of what a writer ran into, not the error: nobody would learn of a full disk |
| `as_rank_0` | GPTDataset builds its indices on rank 0 alone; where each machine has its own copies, the first rank of each builds |
| `report_to` | the queue that writers report to is a server process per rank with all of torch, and outlives a killed rank |

Of two forms, by version: `mlp`, `hybrid_model`, `mtp_layer`, `mtp_inputs`, `router_loss_factor`,
`split_tensor_factory`, `save`, `gradients_for_norm`.

On GPUs the fused functions are compiled by the same torch.compile as before.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from oryx_megatron.compat.hook import Around, instead, made_on_first_use
from oryx_megatron.compat.torch import late_builder, late_compile


@functools.cache
def since(*release: int) -> bool:
    """Whether the installed megatron-core is of this release or later, e.g. since(0, 19)."""
    numbers = importlib.metadata.version("megatron-core").split(".")
    return tuple(int(number) for number in numbers[: len(release)]) >= release


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
    """Patch moe_utils, before the token dispatcher takes names from it."""
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


@contextlib.contextmanager
def _without_syntax_warnings(module: ModuleType) -> Iterator[None]:
    """Its docstring has an invalid escape sequence, of which Python warns when it compiles the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        yield


AROUND: dict[str, Around] = {
    "megatron.core.transformer.moe.moe_utils": _with_experts_on_cpus,
    "megatron.core.jit": _with_late_compilation,
    "megatron.core.transformer.moe.router": late_compile,
    "megatron.core.timers": _without_tensorboard,
    "megatron.core.nccl_allocator": late_builder,
    "megatron.core.inference.unified_memory": late_builder,
    "megatron.core.tensor_parallel.random": late_builder,
    "megatron.core.inference.contexts.kv_block_allocator": _without_syntax_warnings,
}

# ------------------------------------------------------------------------------------------------------------- layers


QUIET = {
    "transformer.transformer_layer": "Unknown MLP type",
    "models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "distributed.distributed_data_parallel": "full_param_layout not provided",
    "dist_checkpointing.strategies.torch": "async save is deprecated",
}
"""Logger under megatron.core → what it need not say. `params` of an MLP's spec give its width. GPTModel: attention and
MLP are separate layers in HybridModel, which changes names in checkpoints (docs/architecture.md)."""


def quiet() -> None:
    """Leave out warnings that a user can do nothing about."""
    for name, text in QUIET.items():
        logging.getLogger(f"megatron.core.{name}").addFilter(
            lambda record, text=text: text not in record.getMessage()  # type: ignore[misc]
        )


def mlp(module: Any, submodules: Any, **params: Any) -> Any:
    """What builds an MLP of class `module` in a layer spec."""
    if since(0, 19):
        return functools.partial(module.as_mlp_submodule, submodules=submodules, **params)
    from megatron.core.transformer.spec_utils import ModuleSpec

    return ModuleSpec(module=module, submodules=submodules, params=params)


def hybrid_model(pattern: str, stack: Any = None, **fields: Any) -> Any:
    """megatron-core's model of Mamba-2 (M), attention (*) and MLP (-) layers, as its benchmarks take it.

    Args:
        stack: Spec of the layers; None: its own.
        fields: Further arguments of HybridModel, which 0.16 calls MambaModel.
    """
    if since(0, 19):
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        return HybridModel(hybrid_stack_spec=stack or hybrid_stack_spec, hybrid_layer_pattern=pattern, **fields)
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.core.models.mamba.mamba_model import MambaModel

    return MambaModel(mamba_stack_spec=stack or mamba_stack_spec, hybrid_override_pattern=pattern, **fields)


def mtp_layer() -> str:
    """What a head of multi-token prediction calls the layer inside, as its attribute and in its submodules."""
    return "mtp_model_layer" if since(0, 19) else "transformer_layer"


def mtp_inputs(given: dict[str, Any], embedded: Any) -> tuple[Any, ...]:
    """What such a head's `_get_embeddings` returns, made of its arguments and the embedding of its tokens.

    0.19 has a padding mask before the embedding.
    """
    names = ("input_ids", "position_ids", *(("padding_mask",) if since(0, 19) else ()))
    return (*(given.get(name) for name in names), embedded, given["hidden_states"])


def router_loss_factor(ranks: int) -> int:
    """By what a router's z-loss and load-balancing loss are to be multiplied, where `ranks` share a microbatch.

    0.16 weighs them by the tokens of a rank and divides by those of all that share the microbatch, which would
    make them the weaker the more ranks share it; 0.19 multiplies by their number itself.
    """
    return 1 if since(0, 19) else ranks


def split_tensor_factory(tensor: Any, sections: list[int], names: list[str], dim: int) -> Any:
    """What stores a ShardedTensor as several, of `sections` rows along `dim`, under names of their own."""
    if since(0, 19):
        from megatron.core.ssm.utils import _split_tensor_factory
    else:
        from megatron.core.ssm.gated_delta_net import _split_tensor_factory
    return _split_tensor_factory(tensor, sections, names, dim)


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


GROUP_KEYS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What a group of parameters is; the rest are settings."""


def identify_groups() -> None:
    """Find the groups of an optimizer in a checkpoint by what they are; their settings are the run's own."""
    from megatron.core.optimizer import distrib_optimizer, optimizer

    optimizer.param_group_identifier_keys = distrib_optimizer.param_group_identifier_keys = GROUP_KEYS


def gradients_for_norm(optimizer: Any) -> list[Any]:
    """Gradients of a DistributedOptimizer that count for the norm."""
    return optimizer.get_grads_for_grad_norm() if since(0, 19) else optimizer.get_main_grads_for_grad_norm()


def main_grad_of(weight: Any) -> Any | None:
    """The fp32 buffer of a weight's gradient, of the weight's shape, where data parallelism has one."""
    return getattr(weight, "main_grad", None) if hasattr(weight, "grad_added_to_main_grad") else None


def added_to_main_grad(weight: Any) -> Any:
    """Say that this gradient is in the buffer; what autograd is to be given in its place."""
    weight.grad_added_to_main_grad = True
    return weight.new_empty(weight.shape)


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


def note_step(state: dict[str, Any], single: Any, step: int) -> None:
    """Add the number of updates to an optimizer's state, where this rank has none of its own to tell."""
    inner = state.get("optimizer", state)
    if step and type(single.optimizer).__name__ == "FusedAdam":  # TransformerEngine's has one for each group
        for group in inner["param_groups"]:
            group.setdefault("step", step)
    elif step and not inner.get("state", True):  # the offloading optimizer has its state elsewhere
        inner["state"]["common_step"] = step


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


def forget_models() -> None:
    """Let go of what is kept for the process of a model's experts and heads: losses by layer, their groups, a scale."""
    moe = sys.modules.get("megatron.core.transformer.moe.moe_utils")
    heads = sys.modules.get("megatron.core.transformer.multi_token_prediction")
    if moe is not None:
        moe.MoEAuxLossAutoScaler.main_loss_backward_scale = None
        if since(0, 19):
            importlib.import_module("megatron.core.transformer.moe.moe_logging").destroy_moe_metrics_tracker()
        else:
            moe.get_moe_layer_wise_logging_tracker().clear()
    if heads is not None:
        heads.MTPLossLoggingHelper.tracker = {}


def destroy_groups() -> None:
    """Give up all process groups but the default one, with their threads."""
    import torch
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    forget_models()
    parallel_state.destroy_model_parallel()
    default = distributed_c10d._get_default_group()
    for group in [group for group in distributed_c10d._world.pg_map if group is not default]:
        torch.distributed.destroy_process_group(group)


# ----------------------------------------------------------------------------------- reading and writing checkpoints


def read_checkpoints_by(
    reader: Callable[[Any], Any], load_bytes: Callable[..., None], load_common: Callable[[Any], dict[str, Any]]
) -> None:
    """Read metadata, objects and common state of a checkpoint by these functions, process-wide.

    Args:
        reader: Folder → torch's StorageReader.
        load_bytes: In place of a load planner's method of this name.
        load_common: Folder → the state that is neither tensor nor sharded.
    """
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    def get(folder: Any, *unused: Any, **ignored: Any) -> Any:
        return reader(folder)

    strategies._get_filesystem_reader = get
    strategies.MCoreLoadPlanner.load_bytes = load_bytes
    if since(0, 19):
        serialization._get_filesystem_reader = get
        serialization.load_common_state_dict = load_common
        return
    from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    class CommonLoad(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
            return load_common(checkpoint_dir)

    register_default_strategy(StrategyAction.LOAD_COMMON, "torch", 1, CommonLoad())


_common_failures: list[Exception] = []


def keep_common_failures() -> None:
    """Let what fails on rank 0 in writing the common state wait in `common_failure` until all ranks can be told.

    Since 0.19 the writers write it with everything else.
    """
    if since(0, 19):
        return
    import torch
    from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonSaveStrategy

    class CommonSave(TorchCommonSaveStrategy):
        def save_common(self, common_state_dict: dict[str, Any], checkpoint_dir: Any) -> None:
            _common_failures.clear()
            try:
                super().save_common(common_state_dict, checkpoint_dir)
                if torch.distributed.get_rank() == 0:
                    with open(Path(checkpoint_dir, COMMON_STATE_FNAME), "rb") as file:
                        os.fsync(file.fileno())
            except (OSError, RuntimeError) as error:  # torch.save makes some RuntimeErrors of OSErrors
                _common_failures.append(error)

    register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, CommonSave("torch", 1))


def common_failure() -> Exception | None:
    """Why the common state of the save that was just started is not written."""
    return _common_failures[-1] if _common_failures else None


def save(state: dict[str, Any], folder: Path, strategy: Any, *, validate: bool) -> Any:
    """Start a save by writers that the caller schedules.

    The writers are megatron-core's own: those of nvidia-resiliency-ext, the default since 0.19, are another package.
    """
    from megatron.core import dist_checkpointing

    writers = {"async_strategy": "mcore"} if since(0, 19) else {}
    return dist_checkpointing.save(
        state, str(folder), strategy, async_sharded_save=True, validate_access_integrity=validate, **writers
    )


def report_to(make: Callable[[], Any]) -> None:
    """Give the next saves a new queue for their writers' reports."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if hasattr(filesystem_async._results_queue, "close"):
        filesystem_async._results_queue.close()
    filesystem_async._results_queue = make()


@contextlib.contextmanager
def as_rank_0() -> Iterator[None]:
    """Let GPTDataset build its indices here; see the table. It makes no collective then."""
    import torch

    real = torch.distributed.get_rank
    torch.distributed.get_rank = lambda group=None: 0
    try:
        yield
    finally:
        torch.distributed.get_rank = real


def keep_causes() -> None:
    """Let a writer's report say what it ran into; harmless when called again."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    plain = FileSystemWriterAsync.write_preloaded_data
    if not since(0, 19) or hasattr(plain, "raises"):
        return

    @functools.wraps(plain)
    def write(*arguments: Any, **keywords: Any) -> Any:
        output = plain(*arguments, **keywords)
        if keywords.get("results_queue") is None and output is not None and isinstance(output[1], Exception):
            raise output[1]  # else its caller asserts that it is a list, and reports that
        return output

    write.raises = True  # type: ignore[attr-defined]
    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
