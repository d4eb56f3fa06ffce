"""Muon sharded by whole parameters: the losses of whole Muon, less memory, checkpoints for any layout."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from oryx_megatron.config import validate
from oryx_megatron.config.schema import ParallelConfig, PrecisionConfig, RunConfig
from oryx_megatron.planner import Work, memory_bytes, parameters_per_gpu
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.layouts import Worlds, session, tiny_run, train_and_resume

LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "one": (1, ParallelConfig()),
    "data": (2, ParallelConfig()),
    "data whole": (2, ParallelConfig(distributed_optimizer=False)),
    "overlap": (2, ParallelConfig(overlap=True)),
    "tensor and data": (4, ParallelConfig(tensor=2)),
    "tensor and data whole": (4, ParallelConfig(tensor=2, distributed_optimizer=False)),
    "pipeline and data": (4, ParallelConfig(pipeline=2)),
    "context and data": (4, ParallelConfig(context=2)),
}
BF16 = ("one", "data", "data whole", "tensor and data", "pipeline and data")
BEFORE, AFTER = 2, 3


def run_of(name: str, dtype: str) -> RunConfig:
    """Without clipping in bf16, so that the order in which a norm is summed changes no digit of a weight."""
    clip = 1.0 if dtype == "fp32" else 0.0
    return tiny_run(
        "gdn",
        parallel=LAYOUTS[name][1],
        precision=PrecisionConfig(dtype=dtype),  # type: ignore[arg-type]
        optimizer__name="muon",
        optimizer__clip_grad=clip,
    )


def state_elements(optimizer: Any) -> int:
    """Elements of moments on this rank."""
    singles = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [state for single in singles for state in single.optimizer.state.values()]
    return sum(t.numel() for state in states for t in state.values() if torch.is_tensor(t) and t.dim())


def under_layouts(root: str) -> dict[str, Any]:
    worlds, found = Worlds(), {}
    for size in (4, 2, 1):
        cases = [(name, "fp32") for name, (n, _) in LAYOUTS.items() if n == size]
        cases += [(name, "bf16") for name in BF16 if LAYOUTS[name][0] == size]
        for number, (name, dtype) in enumerate(worlds.share(size, cases)):
            with worlds.of(size, f"{size} {number}"):
                with session(run_of(name, dtype)) as opened:
                    steps = opened.steps(BEFORE + AFTER)
                    found[f"{name} {dtype}"] = steps, state_elements(opened.optimizer)
                if name in ("data", "tensor and data"):
                    folder = [tempfile.mkdtemp(dir=root)]
                    torch.distributed.broadcast_object_list(folder)
                    found[f"resume {name} {dtype}"] = train_and_resume(
                        run_of(name, dtype), Path(folder[0]), before=BEFORE, after=AFTER
                    )
                    if torch.distributed.get_rank() == 0:
                        (Path(root) / f"{name} {dtype}").symlink_to(folder[0])
    return found


def other_layouts(root: str) -> dict[str, Any]:
    """What four ranks wrote, read by others."""
    worlds, found = Worlds(), {}
    for size, source, target in ((4, "data", "pipeline and data"), (2, "tensor and data", "data")):
        for dtype in worlds.share(size, ("fp32", "bf16")):
            with worlds.of(size, f"{size} {dtype}"), session(run_of(target, dtype), iteration=BEFORE) as opened:
                assert opened.checkpoints(Path(root) / f"{source} {dtype}").load() is not None
                found[f"{source} to {target} {dtype}"] = opened.steps(AFTER)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = str(tmp_path_factory.mktemp("checkpoints"))
    results: dict[str, Any] = {}
    for function in (under_layouts, other_layouts):
        for rank in run_distributed(function, 4, root, timeout=500):
            for name, value in rank.items():
                results.setdefault(name, []).append(value)
    return results


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_losses_are_those_of_whole_muon(found: dict[str, Any], dtype: str) -> None:
    """Of whole Muon under the same layout, bit for bit without clipping; of one rank, to the digits of the format."""
    for sharded in ("data", "tensor and data") if dtype == "fp32" else ("data",):  # BF16 has one of them
        whole = f"{sharded} whole"
        ours, theirs = found[f"{sharded} {dtype}"][0][0], found[f"{whole} {dtype}"][0][0]
        assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in theirs], rel=1e-5)
        if dtype == "bf16":
            assert [loss for loss, _ in ours] == [loss for loss, _ in theirs]
        assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in theirs], rel=1e-6)
    ((one, _),) = found[f"one {dtype}"]
    assert one[-1][0] < one[0][0]
    for name in LAYOUTS if dtype == "fp32" else BF16:
        for steps, _ in found[f"{name} {dtype}"]:
            tolerance = 2e-4 if dtype == "fp32" else 1e-2
            assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in one], rel=tolerance), name


def test_every_element_of_state_is_on_one_data_parallel_rank(found: dict[str, Any]) -> None:
    """Every element of state is on one data-parallel rank, half on each; AdamW would hold twice a matrix's."""
    ((_, whole), *_) = found["data whole fp32"]
    shares = [elements for _, elements in found["data fp32"]]
    assert sum(shares) == whole
    assert max(shares) < 0.6 * whole
    run = run_of("data", "fp32")
    layout = validate(run, 2)
    planned = memory_bytes(run.model, layout, Work(32, 4, muon=True), 1, "none", 0)["optimizer"]
    masters = 4 * parameters_per_gpu(run.model, layout, 0) / 2
    assert planned - masters == pytest.approx(4 * max(shares), rel=0.1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_checkpoints(found: dict[str, Any], dtype: str) -> None:
    """Exact under one layout; under others the losses of the run that never stopped."""
    for name in ("data", "tensor and data"):
        for going, resumed in found[f"resume {name} {dtype}"]:
            assert going[BEFORE:] == resumed
    for source, target in (("data", "pipeline and data"), ("tensor and data", "data")):
        (going, _), *_ = found[f"resume {source} {dtype}"]
        for steps in found[f"{source} to {target} {dtype}"]:
            tolerance = 2e-4 if dtype == "fp32" else 1e-2
            assert [loss for loss, _ in steps] == pytest.approx(going[BEFORE:], rel=tolerance)
