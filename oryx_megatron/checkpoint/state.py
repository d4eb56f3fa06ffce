"""Between a model with its optimizer and megatron-core's sharded state."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from oryx_megatron import compat, platform
from oryx_megatron.checkpoint import average, safe, scales, shards
from oryx_megatron.checkpoint.manifest import Manifest
from oryx_megatron.checkpoint.optimizers import HeldPart, kind_of
from oryx_megatron.checkpoint.store import check_files, check_format
from oryx_megatron.config.schema import WeightsKind
from oryx_megatron.errors import CheckpointError, ConfigError
from oryx_megatron.parallel.wait import on_all_ranks

log = logging.getLogger(__name__)

EMA = "ema"
"""Part of a sharded state."""


def sharded_state(
    chunks: list[Any],
    optimizer: MegatronOptimizer | None,
    *,
    loading: bool = False,
    averages: list[HeldPart] | None = None,
) -> dict[str, Any]:
    """Sharded state of all model chunks of this rank and, if given, of the optimizer and of the average of weights."""
    models = [unwrap_model(chunk) for chunk in chunks]
    state: dict[str, Any] = {_name(i): model.sharded_state_dict(metadata={}) for i, model in enumerate(models)}
    for i, model in enumerate(models):
        scales.unpickle(model, state[_name(i)])
    if optimizer is not None:
        model_state = state if len(models) > 1 else state[_name(0)]
        step = shards.common_step(optimizer)  # rank 0 writes it for all
        kind = kind_of(optimizer)
        state["optimizer"] = kind.sharded_state(model_state, step, loading=loading)
        model_states = [state[_name(i)] for i in range(len(models))]
        if models[0].config.freezes:
            state["frozen"] = shards.frozen_layers(state["optimizer"], models, model_states, in_ranges=kind.in_ranges)
        if averages is not None:
            state[EMA] = average.sharded_average(averages, kind, models, model_states)
    return state


def load_sharded_state(
    folder: Path,
    chunks: list[Any],
    optimizer: MegatronOptimizer | None,
    *,
    weights_only: bool = False,
    averages: list[HeldPart] | None = None,
    weights: WeightsKind = "trained",
    new_heads: bool = False,
) -> bool:
    """Fill model and, if given, optimizer from a checkpoint written under any layout; whether `averages` were filled.

    A checkpoint of weights alone (a conversion) leaves the optimizer with its initial state, as `weights_only` does:
    only its copies of the weights are filled.

    Args:
        folder: The checkpoint.
        chunks: Model chunks of this rank.
        optimizer: Their optimizer.
        weights_only: Leave the optimizer's state, and averages, alone.
        averages: Of the weights, to be filled where the checkpoint has them.
        weights: Fill the model with the weights as trained, or with their average.
        new_heads: The model may have heads of multi-token prediction that the checkpoint lacks; they stay as they are.

    Raises:
        CheckpointError: its tensors do not fit the model or the optimizer, or it has no average.
    """
    safe.install()
    check_format(folder)
    written = set(safe.read_metadata(folder).state_dict_metadata)
    kept = None if weights_only else optimizer
    if kept is not None and not has_optimizer(written):
        log.warning("%s has no optimizer state: the optimizer starts anew", folder)
        kept = None
    if kept is not None:
        compat.megatron.allocate_torch_state(kept)
    averaged = average.has_average(written)
    if weights == "ema" and not averaged:
        raise CheckpointError(f"{folder} {average.NO_AVERAGE}; take its trained weights")
    if averaged and averages is None and kept is not None:
        log.info("train.ema is off: the average of the weights in %s is dropped", folder)
    state = sharded_state(chunks, kept, loading=True, averages=averages if averaged else None)
    if weights == "ema":
        state |= {_name(i): average.as_average(state[_name(i)]) for i in range(len(chunks))}

    def absent_scale(name: str, entry: Any) -> bool:
        # Other linears wrote it: megatron-core's on CPUs, TransformerEngine's and ours on GPUs, or a conversion.
        return name.endswith(scales.SUFFIX) and isinstance(entry, ShardedObject) and entry.unique_key not in written

    def absent_head(name: str, entry: Any) -> bool:
        return new_heads and name.startswith("mtp.") and any(part.key not in written for part in shards.built(entry))

    unscaled = _take_out(state, len(chunks), absent_scale)
    heads = _take_out(state, len(chunks), absent_head)
    loaded = _read(folder, state)
    for i, chunk in enumerate(chunks):
        own = loaded[_name(i)] | dict.fromkeys(unscaled[_name(i)])
        model = unwrap_model(chunk)
        if new := heads[_name(i)]:
            initial = model.state_dict()
            own |= {name: initial[name] for name in new}
        scales.restore(model, own, folder)
        model.load_state_dict(own, strict=True)
    if kept is not None:
        with own_settings(*_inner(kept)):
            kind_of(kept).load(loaded["optimizer"])
        # In fp32 each rank's share of the weights are its masters, which a run in bf16 wrote with more digits.
        gather_weights(chunks, always=True)
    elif optimizer is not None:
        optimizer.reload_model_params()
    if averages is None or EMA not in state:
        return False
    average.fill(averages, loaded[EMA])
    return True


def _read(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The tensors that a sharded state asks for; CheckpointError when they do not fit or cannot be read."""
    try:
        return dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    except CheckpointingException as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"{folder} does not fit this model: {why[:300]}") from error
    except CheckpointException as error:  # of all ranks; the last line is the cause
        raise CheckpointError(f"{folder} cannot be loaded: {str(error).strip().splitlines()[-1]}") from error


def _inner(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that update this rank's parameters."""
    singles = compat.megatron.singles(optimizer)
    return [single.optimizer for single in singles if single.optimizer is not None]


def has_stepped(optimizer: MegatronOptimizer) -> bool:
    """Whether an optimizer holds state on any rank; collective."""
    own = any(inner.state for inner in _inner(optimizer))
    stepped = platform.to_device(torch.tensor(float(own)))
    torch.distributed.all_reduce(stepped, torch.distributed.ReduceOp.MAX)
    return stepped.item() > 0


def has_optimizer(written: Iterable[str]) -> bool:
    """Whether the names in a checkpoint are not of weights alone."""
    return any(name.startswith("optimizer.") for name in written)


def gather_weights(chunks: list[Any], *, always: bool = False) -> None:
    """Bring the weights up to date on every data-parallel rank; collective.

    With overlapped gathering a rank learns of the other ranks' share of an optimizer step only in the next forward
    pass: until then its weights are those of before. `always`: without it, too.
    """
    for chunk in chunks:
        if not isinstance(chunk, DistributedDataParallel) or not chunk.ddp_config.use_distributed_optimizer:
            continue
        if chunk.ddp_config.overlap_param_gather:
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                group.finish_param_sync(skip_next_bucket_dispatch=True)
        elif always:
            chunk.start_param_sync()


def load_model_weights(folder: Path, chunks: list[Any], weights: WeightsKind = "trained") -> None:
    """Fill the model only, for evaluation, generation and conversion.

    Raises:
        CheckpointError: it has no average.
        ConfigError: no such kind of weights.
    """
    if weights not in (known := get_args(WeightsKind)):
        raise ConfigError(f"weights: {weights!r} is none of {', '.join(known)}")
    load_sharded_state(folder, chunks, None, weights=weights)


def check_whole(folder: Path, manifest: Manifest) -> None:
    """Compare the files of a checkpoint with its manifest, each rank a share of them; collective.

    Raises:
        CheckpointError: on every rank, when any file is missing or differs.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = sorted(manifest.files)[rank::world]
    on_all_ranks(lambda: check_files(folder, manifest, share))


def _take_out(state: dict[str, Any], chunks: int, absent: Callable[[str, Any], bool]) -> dict[str, list[str]]:
    """Take what a checkpoint lacks (`absent`, by name and entry) out of the state of each chunk; the names by chunk."""
    taken = {}
    for chunk in map(_name, range(chunks)):
        taken[chunk] = [name for name, entry in state[chunk].items() if absent(name, entry)]
        for name in taken[chunk]:
            del state[chunk][name]
    return taken


@contextlib.contextmanager
def own_settings(*optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Learning rates, betas and the like of the groups stay as they are, where a checkpoint brings those of before."""
    settings = [
        {name: value for name, value in group.items() if name not in ("params", "step")}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    yield
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)  # new ones, in the same order
    for group, own in zip(groups, settings, strict=True):
        group.update(own)


def _name(chunk: int) -> str:
    return "model" if chunk == 0 else f"model{chunk}"
