"""The ranks' own parts of the optimizer state and megatron-core's gathered form: each reads what the other wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import unwrap_model

from oryx_megatron import compat, parallel
from oryx_megatron.checkpoint import safe, shards
from oryx_megatron.checkpoint.state import load_sharded_state, sharded_state
from oryx_megatron.checkpoint.writers import SaveStrategy, renew_reports
from oryx_megatron.compat.megatron import allocate_torch_state
from oryx_megatron.config.schema import ParallelConfig, RunConfig
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.layouts import Session, Worlds, session, tiny_run

RANKS = 4


def _run() -> RunConfig:
    """bf16 weights with fp32 masters and some fp32 weights; sizes whose quarters end inside of rows."""
    sizes = {"model__hidden_size": 40, "model__ffn_hidden_size": 56, "model__num_layers": 2}
    return tiny_run("gdn", precision__dtype="bf16", **sizes)


def _single(opened: Session) -> DistributedOptimizer:
    (single,) = shards.own_shards(opened.optimizer)
    return single


def _gathered(opened: Session, *, loading: bool) -> dict[str, Any]:
    """The state in megatron-core's way."""
    (chunk,) = opened.chunks
    model = unwrap_model(chunk).sharded_state_dict(metadata={})
    metadata = {"distrib_optim_sharding_type": shards.FORM}
    optimizer = opened.optimizer.sharded_state_dict(dict(model), is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def _load_gathered(opened: Session, folder: Path) -> None:
    single = _single(opened)
    allocate_torch_state(single)
    loaded = dist_checkpointing.load(_gathered(opened, loading=True), str(folder))
    unwrap_model(opened.chunks[0]).load_state_dict(loaded["model"], strict=True)
    parameters = loaded["optimizer"].pop("param_state")
    single.load_state_dict(loaded["optimizer"])
    steps = {parameter: values.pop("step") for parameter, values in single.optimizer.state.items()}
    single.load_parameter_state_from_fully_reshardable(parameters)
    for parameter, step in steps.items():
        single.optimizer.state[parameter]["step"] = step.clone()


def _both_ways(root: Path) -> dict[str, Any]:
    worlds, results = Worlds(), dict[str, Any]()
    with worlds.of(RANKS, "all"):
        rank = torch.distributed.get_rank()
        with session(_run()) as opened:
            opened.steps(2)
            own, gathered = sharded_state(opened.chunks, opened.optimizer), _gathered(opened, loading=False)
            states = {"own": own, "gathered": gathered}
            for name, state in states.items():
                if rank == 0:
                    (root / name).mkdir()
                torch.distributed.barrier()
                dist_checkpointing.save(state, str(root / name))
            results["cut"] = sum(
                len(list(shards.boxes(tuple(parameter.shape), start, stop))) > 1
                for parameter, start, stop in shards.owned_ranges(_single(opened))
            )
            manager = opened.checkpoints(root / "managed")
            results["managed"] = manager.save(2, opened.manifest) or manager.wait()
            results["expected"] = opened.steps(2)
        with session(_run(), iteration=2) as opened:
            opened.checkpoints(root / "managed").load()
            results["managed, read"] = opened.steps(2)
        with session(_run(), iteration=2) as opened:
            load_sharded_state(root / "gathered", opened.chunks, opened.optimizer)
            results["gathered, read as own"] = opened.steps(2)
        with session(_run(), iteration=2) as opened:
            _load_gathered(opened, root / "own")
            results["own, read as gathered"] = opened.steps(2)
        for name in states:
            found = dist_checkpointing.load_plain_tensors(str(root / name))
            results[name] = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    return results


def test_own_parts_and_the_gathered_form(tmp_path: Path) -> None:
    results = run_distributed(_both_ways, RANKS, tmp_path)
    own, gathered = results[0]["own"], results[0]["gathered"]
    assert own.keys() == gathered.keys()
    assert {key.split(".")[2] for key in own if key.startswith("optimizer.state.")} == set(shards.STATES)
    for key, tensor in gathered.items():
        assert own[key].dtype == tensor.dtype
        assert torch.equal(own[key], tensor), key
    assert sum(part["cut"] for part in results) >= 3  # ranges that begin or end inside of a row
    for part in results:
        assert part["gathered, read as own"] == part["expected"]
        assert part["own, read as gathered"] == part["expected"]
        assert part["managed, read"] == part["expected"]
    # Every rank writes some of the weights, which all of them hold.
    places = safe.read_metadata(results[0]["managed"]).storage_data.items()
    writers = {place.relative_path for index, place in places if not index.fqn.startswith("optimizer.")}
    assert {int(name.split("_")[2]) for name in writers} == set(range(RANKS))


def _saves(root: Path) -> list[tuple[bool, dict[str, list[int]]]]:
    """What is read back of six saves, the structure changing on one rank before the fifth; and if its plan was kept."""
    parallel.initialize(ParallelConfig(), seed=1)
    safe.install()
    renew_reports()
    rank, strategy, queue, found = torch.distributed.get_rank(), SaveStrategy(), AsyncCallsQueue(), []
    for i in range(6):
        values = {"a": torch.tensor([10 * i + rank]), "b": torch.tensor([20 * i + rank, 30 * i + rank])}
        state = {name: ShardedTensor.from_rank_offsets(name, value, (0, rank, 2)) for name, value in values.items()}
        if rank == 1 and i >= 4:
            state["c"] = ShardedTensor.from_rank_offsets("c", torch.tensor([i]))
        folder = root / str(i)
        if rank == 0:
            folder.mkdir()
        torch.distributed.barrier()
        request = compat.megatron.save(state, folder, strategy, validate=True)
        kept = strategy.validated_cache_reuse
        for tensor in values.values():
            tensor.zero_()  # after the call, the state may change
        queue.schedule_async_request(request)
        queue.maybe_finalize_async_calls(blocking=True)
        if rank == 0:
            strategy.describe()
        torch.distributed.barrier()
        read = dist_checkpointing.load_plain_tensors(str(folder))
        found.append((kept, {name: value.tolist() for name, value in sorted(read.items())}))
    return found


def test_a_kept_plan(tmp_path: Path) -> None:
    """Saves by a kept plan hold what was there at each; a change of structure on one rank makes a new one on all."""
    for found in run_distributed(_saves, 2, tmp_path):
        for i, (kept, read) in enumerate(found):
            expected = {"a": [10 * i, 10 * i + 1], "b": [20 * i, 30 * i, 20 * i + 1, 30 * i + 1]}
            assert read == expected | ({"c": [i]} if i >= 4 else {})
            assert kept == (i not in (0, 4))
