"""Experts under layouts: equal losses, gradient norms and figures of the routers; checkpoints between them; resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from oryx_megatron import compat
from oryx_megatron.arch import moment_bytes, parameter_counts
from oryx_megatron.checkpoint import whole
from oryx_megatron.config.schema import MoEConfig, ParallelConfig, PrecisionConfig, RunConfig
from oryx_megatron.model.experts import routers
from oryx_megatron.planner import Work, memory_bytes
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.layouts import Session, Worlds, session, tiny_run, train_and_resume
from oryx_megatron.train.routing import routing_of

RANKS, HALF, STEPS = 4, 2, 4
MODELS = {
    "losses": MoEConfig(
        experts=8, ffn_hidden_size=24, shared_ffn_hidden_size=16, first_dense=1, frequency=2, aux_loss=0.1, z_loss=0.01
    ),
    "bias": MoEConfig(experts=4, top_k=3, ffn_hidden_size=20, score="sigmoid", aux_loss=0.0, bias_update_rate=0.05),
    "capacity": MoEConfig(experts=4, ffn_hidden_size=20, capacity_factor=0.75, aux_loss_over="sequence"),
    "muon": MoEConfig(experts=4, ffn_hidden_size=20, shared_ffn_hidden_size=24, first_dense=1, aux_loss=0.1),
}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "expert 2": ("losses", 2, {"expert": 2}),
    "tensor 2": ("losses", 2, {"tensor": 2}),
    "tensor 2, expert 2": ("losses", 2, {"tensor": 2, "expert": 2, "recompute": "full"}),
    "context 2, expert 2": ("losses", 2, {"context": 2, "expert": 2}),
    "pipeline 2": ("losses", 2, {"pipeline": 2}),
    "tensor 2, context 2, expert 4": ("losses", 4, {"tensor": 2, "context": 2, "expert": 4}),
    "expert 2, overlap": ("bias", 2, {"expert": 2, "overlap": True}),
    "expert 2, whole optimizer": ("bias", 2, {"expert": 2, "distributed_optimizer": False}),
    "expert 4, whole optimizer": ("bias", 4, {"expert": 4, "distributed_optimizer": False}),
    "tensor 2, expert 2, data 2": ("bias", 4, {"tensor": 2, "expert": 2}),
    "virtual pipeline, expert 2": ("bias", 4, {"pipeline": 2, "virtual_pipeline": 2, "expert": 2}),
    "capacity, expert 2": ("capacity", 2, {"expert": 2}),
    "capacity, expert 4": ("capacity", 4, {"expert": 4, "overlap": True}),
    "muon, data 2": ("muon", 2, {}),
    "muon, expert 2": ("muon", 2, {"expert": 2, "overlap": True}),
    "muon, expert 2, whole": ("muon", 2, {"expert": 2, "distributed_optimizer": False}),
    "muon, tensor 2": ("muon", 2, {"tensor": 2}),
    "muon, tensor 2, whole": ("muon", 2, {"tensor": 2, "distributed_optimizer": False}),
    "muon, pipeline 2": ("muon", 2, {"pipeline": 2}),
    "muon, tensor 2, expert 2, data 2": ("muon", 4, {"tensor": 2, "expert": 2}),
    "muon, context 2, expert 2, data 2": ("muon", 4, {"context": 2, "expert": 2}),
    "muon, pipeline 2, expert 2": ("muon", 4, {"pipeline": 2, "expert": 2}),
    "muon, tensor 2, context 2, expert 4": ("muon", 4, {"tensor": 2, "context": 2, "expert": 4}),
    "muon, expert 4, whole": ("muon", 4, {"expert": 4, "distributed_optimizer": False}),
}
"""Model, ranks, layout. Capacity counts the tokens of a rank: those layouts leave a microbatch whole."""
RESHARDED = {
    "expert 2": "losses one",
    "tensor 2, context 2, expert 4": "losses tensor 2, expert 2",
    "expert 2, overlap": "bias one",
    "virtual pipeline, expert 2": "bias one",
    "tensor 2, expert 2, data 2": "bias expert 2, overlap",
    "expert 4, whole optimizer": "bias expert 2, whole optimizer",
    "muon, tensor 2": "muon one",
    "muon, tensor 2, context 2, expert 4": "muon muon, expert 2",
    "muon, pipeline 2, expert 2": "muon muon, tensor 2",
    "muon, expert 4, whole": "muon muon, expert 2, whole",
}
"""By layout: whose checkpoint of half the steps it continues."""


def _run(model: str, layout: dict[str, Any]) -> RunConfig:
    changes = {"data__documents": "isolated" if model == "losses" else "joined"}
    if model == "muon":
        changes |= {"optimizer__name": "muon"}
    return tiny_run(parallel=ParallelConfig(**layout), model__moe=MODELS[model], **changes)


def _steps(opened: Session, count: int) -> list[tuple[float, ...]]:
    """Loss, gradient norm and the figures of the routers, of each step."""
    found = []
    for _ in range(count):
        loss, norm = opened.step()
        run, totals = opened.run, opened.engine._totals
        routing = routing_of(totals.routed, run.model, opened.layout.microbatches * opened.layout.dp)
        assert routing is not None
        found.append((loss, norm, *routing.scalars().values(), *routing.load[-1]))
    return found


def _save(opened: Session, root: Path, name: str) -> None:
    manager = opened.checkpoints(root / name)
    assert manager.save(opened.iteration, opened.manifest) or manager.wait()


def _state(opened: Session) -> tuple[float, int, int]:
    """Bytes of masters and means of the fullest rank as planned and as they are, and their sum over all ranks."""
    own = 0
    for single in compat.megatron.singles(opened.optimizer):
        means = [mean for state in single.optimizer.state.values() for mean in state.values() if torch.is_tensor(mean)]
        own += sum(tensor.numel() for tensor in [*means, *(master for _, master in whole.masters(single))])
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, 4 * own)
    run, layout = opened.run, opened.layout
    stages = [
        memory_bytes(run.model, layout, Work(32, 4, muon=True), 1, "none", stage)["optimizer"]
        for stage in range(layout.pp)
    ]
    return max(stages), max(ranks), sum(ranks)


def _discarded(opened: Session) -> bool:
    """Whether a step that is dropped moves the biases of routers, and leaves none of that."""
    before = [router.expert_bias.clone() for router in routers(opened.chunks)]
    update = opened.engine.update
    opened.engine.update = lambda norm: opened.engine.discard()  # type: ignore[method-assign]
    gradients = opened.engine.gradients
    moved = []

    def watched(batches: Any) -> Any:
        totals = gradients(batches)
        moved.extend(not torch.equal(a, r.expert_bias) for a, r in zip(before, routers(opened.chunks), strict=True))
        return totals

    opened.engine.gradients = watched  # type: ignore[method-assign]
    opened.step()
    opened.engine.update, opened.engine.gradients = update, gradients  # type: ignore[method-assign]
    return all(moved) and all(torch.equal(a, r.expert_bias) for a, r in zip(before, routers(opened.chunks)))


def _everything(root: str) -> dict[str, Any]:
    worlds, results = Worlds(), dict[str, Any]()
    for model in worlds.share(1, MODELS):
        with worlds.of(1, model), session(_run(model, {})) as opened:
            results[f"{model} one"] = _steps(opened, HALF)
            _save(opened, Path(root), f"{model} one")
            results[f"{model} one"] += _steps(opened, STEPS - HALF)
            if model == "bias":
                results["discarded"] = _discarded(opened)
    for size in (2, 4):
        with worlds.of(RANKS, f"all before {size}"):
            torch.distributed.barrier()
        for name in worlds.share(size, [name for name, case in LAYOUTS.items() if case[1] == size]):
            model, _, layout = LAYOUTS[name]
            run = _run(model, layout)
            with worlds.of(size, name), session(run) as opened:
                results[name] = _steps(opened, HALF)
                if model == "muon":
                    results[f"{name} state"] = _state(opened)
                if f"{model} {name}" in RESHARDED.values():
                    _save(opened, Path(root), f"{model} {name}")
                results[name] += _steps(opened, STEPS - HALF)
        for name in worlds.share(size, [name for name in RESHARDED if LAYOUTS[name][1] == size]):
            model, _, layout = LAYOUTS[name]
            with worlds.of(size, f"{name} loaded"), session(_run(model, layout), iteration=HALF) as opened:
                assert opened.checkpoints(Path(root) / RESHARDED[name]).load() is not None
                results[f"{name} loaded"] = _steps(opened, STEPS - HALF)
        for name in worlds.share(size, ["expert 2, overlap"] if size == 2 else []):
            model, _, layout = LAYOUTS[name]
            with worlds.of(size, f"{name} resumed"):
                results["resumed"] = train_and_resume(_run(model, layout), Path(root) / "resumed", before=2, after=2)
            layout = {"tensor": 2, "expert": 2, "distributed_optimizer": False}
            run = dataclasses.replace(_run(model, layout), precision=PrecisionConfig(dtype="bf16"))
            with worlds.of(size, f"{name} in bf16"):
                results["resumed bf16"] = train_and_resume(run, Path(root) / "bf16", before=2, after=2)
        for layout in ({"expert": 2}, {"tensor": 2, "expert": 2}) if size == 2 else ():
            for dtype in worlds.share(size, ("fp32", "bf16")):
                name = f"muon resumed {dtype} {layout}"
                run = dataclasses.replace(_run("muon", layout), precision=PrecisionConfig(dtype=dtype))
                with worlds.of(size, name):
                    results[name] = train_and_resume(run, Path(root) / name, before=2, after=2)
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in run_distributed(_everything, RANKS, str(tmp_path_factory.mktemp("experts")), timeout=800):
        merged |= part
    return merged


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_routing_do_not_depend_on_the_layout(name: str, trained: dict[str, Any]) -> None:
    wanted = trained[f"{LAYOUTS[name][0]} one"]
    assert len(wanted) == STEPS
    assert trained[name][0] == pytest.approx(wanted[0], rel=1e-6, abs=1e-7)  # no update has enlarged a rounding yet
    for found, expected in zip(trained[name], wanted, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", RESHARDED)
def test_checkpoint_continues_under_another_layout(name: str, trained: dict[str, Any]) -> None:
    for found, expected in zip(trained[f"{name} loaded"], trained[f"{LAYOUTS[name][0]} one"][HALF:], strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_resume_is_exact(trained: dict[str, Any]) -> None:
    """The biases of the routers are part of the state."""
    going, resumed = trained["resumed"]
    assert going[2:] == resumed
    assert going == [step[0] for step in trained["expert 2, overlap"]]
    going, resumed = trained["resumed bf16"]
    assert going[2:] == resumed
    assert going == pytest.approx([step[0] for step in trained["bias one"]], rel=5e-3)


def test_muon_resumes_exactly(trained: dict[str, Any]) -> None:
    cases = [name for name in trained if name.startswith("muon resumed")]
    assert len(cases) == 4
    for name in cases:
        going, resumed = trained[name]
        assert going[2:] == resumed
        assert going == pytest.approx([step[0] for step in trained["muon one"]], rel=2e-2 if "bf16" in name else 1e-4)


def test_each_state_of_muon_is_on_one_rank(trained: dict[str, Any]) -> None:
    """Over the ranks that hold the weight, which for experts are others; the fullest has what `plan` says."""
    sums = set()
    for name, (model, ranks, layout) in LAYOUTS.items():
        if model != "muon" or not layout.get("distributed_optimizer", True):
            continue
        planned, fullest, everything = trained[f"{name} state"]
        assert planned == pytest.approx(fullest, rel=0.1), name
        assert fullest < 1.3 * everything / ranks, name
        if "tensor" not in layout and "pipeline" not in layout:  # vectors have copies, and tied tables
            sums.add(everything)
    (everything,) = sums
    model = _run("muon", {}).model
    assert everything == pytest.approx(4 * parameter_counts(model).total + moment_bytes(model, "muon"), rel=0.03)


def test_a_dropped_step_leaves_no_trace_in_the_biases(trained: dict[str, Any]) -> None:
    assert trained["discarded"]


def test_loads_are_of_an_even_share_and_capacity_alone_drops(trained: dict[str, Any]) -> None:
    """Loads are of an even share; capacity drops choices, and nothing else does."""
    by_model = {model: trained[f"{model} one"] for model in MODELS}
    assert all(by_model.values())
    for model, steps in by_model.items():
        for _, _, balance, z, entropy, most, least, dropped, *_ in steps:
            assert least <= 1
            assert most >= 1 or model == "capacity"
            assert 0 < entropy <= torch.tensor(float(MODELS[model].experts)).log() + 1e-6
            assert z > 0
            assert (balance > 0.9) == (model != "bias")
            assert (dropped > 0) == (model == "capacity")
