"""Frozen parameters stay bit for bit, the others train alike under every layout, and a resume is exact.

docs/operations.md shows the patterns of `RECURRENT`.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from oryx_megatron import parallel, platform
from oryx_megatron.arch import parameter_counts
from oryx_megatron.config.schema import MoEConfig, ParallelConfig, RunConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.layouts import Worlds, session, tiny_run, train_and_resume
from oryx_megatron.train import optimizer
from oryx_megatron.train.freeze import check, is_frozen, names, same

RECURRENT = ("*", "!*query_recurrent", "!*decay_proj.weight", "!*a_log", "!*dt_bias", "!*self_attention.d")
"""The recurrent path alone, as of an imported Transformer: part of in_proj trains, the rest of it does not."""
FIRST_STAGE = ("embedding.*", "decoder.layers.[01].*")
INSIDE = ("*", "!*a_log", "!*.conv.*")
"""What trains lies between the projections of a mixer: with recompute, nothing before it has a gradient."""
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "one": (1, ParallelConfig()),
    "tensor": (2, ParallelConfig(tensor=2)),
    "pipeline": (2, ParallelConfig(pipeline=2)),
    "data": (2, ParallelConfig()),
    "overlap": (2, ParallelConfig(overlap=True)),
    "unsharded": (2, ParallelConfig(distributed_optimizer=False)),
    "recomputed": (1, ParallelConfig(recompute="full")),
    "recomputed, overlap": (2, ParallelConfig(recompute="full", overlap=True)),
    "recomputed mixers, pipeline": (2, ParallelConfig(recompute="mixer", pipeline=2)),
}


STAGES: dict[str, tuple[ParallelConfig, dict[str, Any]]] = {
    "ranges": (ParallelConfig(pipeline=2), {}),
    "unsharded": (ParallelConfig(pipeline=2, distributed_optimizer=False), {}),
    "muon": (ParallelConfig(pipeline=2), {"optimizer__name": "muon"}),
}
"""Rank 0, which writes what is common to all, has nothing to update: its whole stage is frozen."""
EXPERTS = MoEConfig(
    experts=4,
    ffn_hidden_size=20,
    shared_ffn_hidden_size=16,
    first_dense=1,
    score="sigmoid",
    aux_loss=0.0,
    bias_update_rate=0.01,
)
OF_EXPERTS = ("*.experts.[01].*", "!decoder.layers.2.*", "*shared_experts*")
"""Those of the first rank, but for one layer; each is named by its number in the whole model."""


PATTERNS = {"recurrent path": RECURRENT, "first stage": FIRST_STAGE, "inside": INSIDE}


def run_of(patterns: tuple[str, ...], parallel: ParallelConfig, **changes: Any) -> RunConfig:
    return tiny_run("mamba2", parallel=parallel, train__freeze=patterns, **changes)


def under_layouts() -> dict[str, dict[str, list[Any]]]:
    worlds, found = Worlds(), {}
    optimizer.BUCKET = 3000
    for size in (2, 1):
        cases = [(kind, name) for kind in PATTERNS for name, (ranks, _) in LAYOUTS.items() if ranks == size]
        for number, (kind, name) in enumerate(worlds.share(size, cases)):
            with worlds.of(size, f"{size} {number}"):
                run = run_of(PATTERNS[kind], LAYOUTS[name][1], optimizer__weight_decay=0.5)
                if size == 2 and name == "data":
                    root = [tempfile.mkdtemp()]
                    torch.distributed.broadcast_object_list(root)
                    found[f"resume {kind}"] = list(train_and_resume(run, Path(root[0]), before=2, after=2))
                with session(run) as opened:
                    before = opened.weights()
                    steps = opened.steps(4)
                    moved = {key: not torch.equal(rows, before[key]) for key, rows in opened.weights().items()}
                    states = sum(
                        tensor.numel()
                        for single in getattr(opened.optimizer, "chained_optimizers", [opened.optimizer])
                        for state in single.optimizer.state.values()
                        for tensor in state.values()
                        if torch.is_tensor(tensor) and tensor.dim()
                    )
                    found[f"{name} {kind}"] = [steps, moved, states]
    for size, expert in ((2, 2), (1, 1)):
        for update in worlds.share(size, ("adamw", "muon")):
            with worlds.of(size, f"experts {update} {size}"):
                run = tiny_run(
                    parallel=ParallelConfig(expert=expert),
                    train__freeze=OF_EXPERTS,
                    model__moe=EXPERTS,
                    optimizer__name=update,
                )
                with session(run) as opened:
                    before = opened.weights()
                    steps = opened.steps(4)
                    moved = {key: not torch.equal(rows, before[key]) for key, rows in opened.weights().items()}
                    found[f"experts {update} {expert}"] = [steps, moved]
    for name, (layout, changes) in STAGES.items():
        with worlds.of(2, name):
            root = [tempfile.mkdtemp()]
            torch.distributed.broadcast_object_list(root)
            run = run_of(FIRST_STAGE, layout, **changes)
            found[f"stage {name}"] = list(train_and_resume(run, Path(root[0]), before=2, after=2))
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[list[Any]]]:
    results: dict[str, list[Any]] = {}
    for rank in run_distributed(under_layouts, 2, timeout=400):
        for name, value in rank.items():
            results.setdefault(name, []).append(value)
    return results


@pytest.mark.timeout(500)
@pytest.mark.parametrize("kind", PATTERNS)
def test_frozen_runs_have_equal_losses_under_every_layout(found: dict[str, list[list[Any]]], kind: str) -> None:
    (((expected, _, states),),) = (found[f"one {kind}"],)
    assert min(norm for _, norm in expected) > 0
    for name in LAYOUTS:
        for steps, moved, _ in found[f"{name} {kind}"]:
            assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], rel=1e-4), name
            assert [norm for _, norm in steps] == pytest.approx([norm for _, norm in expected], rel=1e-3), name
            assert {part for part, moves in moved.items() if moves} == {
                part for part in moved if not is_frozen(part, PATTERNS[kind])
            }, name
    assert sum(states for _, _, states in found[f"data {kind}"]) == states  # none for what is frozen
    ((going, resumed), *_) = found[f"resume {kind}"]
    assert going[2:] == resumed


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", STAGES)
def test_a_frozen_stage_resumes_bit_by_bit(found: dict[str, list[list[Any]]], name: str) -> None:
    for going, resumed in found[f"stage {name}"]:
        assert going[2:] == resumed
        assert going[3] != going[2]


@pytest.mark.timeout(500)
@pytest.mark.parametrize("update", ["adamw", "muon"])
def test_experts_by_their_number_in_the_whole_model(found: dict[str, list[list[Any]]], update: str) -> None:
    ((expected, whole),) = found[f"experts {update} 1"]
    assert {part for part, moves in whole.items() if not moves} == {
        part for part in whole if is_frozen(part, OF_EXPERTS)
    }
    (one, first), (two, second) = found[f"experts {update} 2"]
    assert one == two == [pytest.approx(step, rel=1e-4) for step in expected]
    assert first | second == whole
    assert len([name for name in whole if is_frozen(name, OF_EXPERTS)]) == 2 * 2 * 2 + 3 * 2


@pytest.mark.timeout(500)
def test_names_without_a_model(found: dict[str, list[list[Any]]]) -> None:
    """--dry-run knows those of the model that the run builds."""
    ((_, whole),) = found["experts adamw 1"]
    assert set(names(tiny_run(model__moe=EXPERTS).model)) == set(whole)
    ((_, whole, _),) = found["one first stage"]
    assert set(names(run_of(FIRST_STAGE, ParallelConfig()).model)) == set(whole)


def test_state_of_the_recurrent_path_alone(found: dict[str, list[list[Any]]]) -> None:
    """Two moments of in_proj, of whose rows some train, and of the small parameters: nothing of MLPs or tables."""
    ((_, _, states),) = found["one recurrent path"]
    model = run_of(RECURRENT, ParallelConfig()).model
    in_proj = 352 * model.hidden_size
    small = model.num_heads * model.hidden_size + 3 * model.num_heads
    assert states == 2 * model.num_layers * (in_proj + small)


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("embeding*", "names are like embedding.word_embeddings.weight, …"),
        ("decoder.layers.0.mlp.linear_fc3.weight", "names are like decoder.layers.*.mlp.linear_fc1.weight, decoder"),
        ("model.layers.*.mlp*", "names are like decoder.layers.*.mlp.linear_fc1.weight, "),
        ("mlp", "a pattern covers whole names, with * and ? alone: '*mlp*'"),
        ("!mlp", "a pattern covers whole names, with * and ? alone: '!*mlp*'"),
        (r"^embedding\..*$", "a pattern covers whole names, with * and ? alone: '*embedding.*'"),
        ("", "names are like decoder.final_layernorm.weight, "),
        ("!", "names are like decoder.final_layernorm.weight, "),
    ],
)
def test_a_typo_gets_the_nearest_names(pattern: str, advice: str) -> None:
    """What the line advises freezes something."""
    known = names(run_of((), ParallelConfig()).model)
    with pytest.raises(ConfigError) as raised:
        check(("*norm*", pattern), known)
    message = str(raised.value)
    assert message.startswith(f"train.freeze[1]: {pattern!r} matches no parameter; {advice}")
    assert "\n" not in message
    if "whole names" in advice:
        check(("*norm*", advice.rpartition("'")[0].rpartition("'")[2]), known)


def test_patterns_that_freeze_the_same() -> None:
    model = run_of((), ParallelConfig()).model
    assert same(model, ("embedding*", "*.mlp.*"), ("*.mlp.*", "embedding.word_embeddings.weight"))
    assert not same(model, ("*.mlp.*",), ("*mlp*",))  # the norm before it


def test_messages(caplog: pytest.LogCaptureFixture) -> None:
    platform.install()
    whole = parameter_counts(run_of((), ParallelConfig()).model).total
    caplog.set_level(logging.INFO, "oryx_megatron")
    with session(run_of(RECURRENT, ParallelConfig())) as opened:
        opened.step()
    trained = 4 * (64 * 32 + 8 * 32 + 3 * 8)  # in each layer queries, steps, and three vectors of the heads
    assert f"train.freeze: {whole - trained:,} of {whole:,} parameters are frozen; trained: " in caplog.text
    assert "decoder.layers.*.self_attention.in_proj.weight.query_recurrent" in caplog.text
    for patterns, message in (
        (("*", "!*nothing*"), r"train.freeze\[1\]: '!\*nothing\*' matches no parameter; names are like decoder"),
        (("*",), "train.freeze: freezes every parameter"),
        (("!*mlp*",), "train.freeze: freezes no parameter; `!PATTERN` trains what a pattern before it freezes"),
    ):
        run = run_of(patterns, ParallelConfig())
        with pytest.raises(ConfigError, match=message), session(run):
            pass
        parallel.release()
