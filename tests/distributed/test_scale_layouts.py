"""Equal losses (fp32, 1e-4) and gradient norms under all small layouts: tp, pp, vpp, cp, dp and options.

One set of four processes runs everything: as four worlds of one rank (the references), two of two, one of four.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from oryx_megatron.config.schema import ParallelConfig, RopeScalingConfig, RunConfig
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.layouts import Worlds, session, tiny_run

STEPS = 2
MIXERS = ("gdn", "mamba2")
RANKS = 4
HYBRID, MIXED = ("recurrent*3", "attention"), ("both", "recurrent", "attention", "both")


def _run(mixer: str, tp: int = 1, pp: int = 1, vpp: int = 1, cp: int = 1, *, options: Any = None, **changes: Any):
    layout = ParallelConfig(tensor=tp, pipeline=pp, virtual_pipeline=vpp, context=cp, **(options or {}))
    return tiny_run(mixer, parallel=layout, **changes)


def _matrix() -> dict[str, tuple[RunConfig, int]]:
    """Every (tp, pp, vpp, cp, dp) of {1, 2} that needs at most four ranks, both variants, isolated documents."""
    cases = {}
    for mixer, tp, pp, cp, dp in itertools.product(MIXERS, *[(1, 2)] * 4):
        for vpp in (1, 2)[:pp]:
            world = tp * pp * cp * dp
            if 1 < world <= RANKS:
                name = f"{mixer}-tp{tp}-pp{pp}-vpp{vpp}-cp{cp}-dp{dp}"
                cases[name] = (_run(mixer, tp, pp, vpp, cp, data__documents="isolated"), world)
    return cases


def _options() -> dict[str, tuple[RunConfig, int]]:
    """What else a layout can set, and models other than the usual one."""
    six = {"model__num_layers": 6}
    rows = {"data__documents": "isolated", "train__micro_batch_size": 2}
    attention, recurrent = (
        {"model__modes": mode, "modes__fixed": mode, "evaluation__plans": (mode,), "modes__p_attention": p,
         "modes__p_recurrent": 1 - p}
        for mode, p in (("attention", 1.0), ("recurrent", 0.0))
    )  # fmt: skip
    plain = {"model__conv_width": 0, "model__rotary": "both", "model__qk_norm": False, "model__output_gate": False}
    yarn = {"model__rope_scaling": RopeScalingConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)}
    hybrid, mixed = ({"model__pattern": pattern} for pattern in (HYBRID, MIXED))
    muon = {"optimizer__name": "muon"}
    whole = {"distributed_optimizer": False}
    return {
        "muon-tp2-pp2": (_run("gdn", 2, 2, options=whole, **muon), 4),
        "muon-cp2-dp2": (_run("gdn", cp=2, options=whole, **muon), 4),
        "joined-tp2-cp2": (_run("gdn", 2, cp=2), 4),
        "joined-pp2-vpp2-cp2": (_run("mamba2", pp=2, vpp=2, cp=2), 4),
        "cp4": (_run("gdn", cp=4, data__documents="isolated"), 4),
        "tp4": (_run("mamba2", 4), 4),
        "pp4": (_run("gdn", pp=4), 4),
        "rows-cp2-dp2": (_run("gdn", cp=2, **rows), 4),
        "rows-tp2-pp2": (_run("mamba2", 2, 2, **rows), 4),
        "no-sequence-parallel-tp2-cp2": (_run("gdn", 2, cp=2, options={"sequence": False}), 4),
        "no-distributed-optimizer-cp2-dp2": (_run("mamba2", cp=2, options={"distributed_optimizer": False}), 4),
        "overlap-dp4": (_run("gdn", options={"overlap": True}), 4),
        "overlap-pp2-vpp2-dp2": (_run("mamba2", pp=2, vpp=2, options={"overlap": True}), 4),
        "overlap-tp2-dp2": (_run("gdn", 2, options={"overlap": True, "distributed_optimizer": False}), 4),
        "uneven-tp2-pp2": (_run("gdn", 2, 2, options={"first_stage_layers": 1}), 4),
        "uneven-pp2-vpp2-cp2": (_run("mamba2", pp=2, vpp=2, cp=2, options={"last_stage_layers": 4}, **six), 4),
        "untied-tp2-pp2": (_run("mamba2", 2, 2, model__tie_embeddings=False), 4),
        "recompute-mixer-tp2-cp2": (_run("gdn", 2, cp=2, options={"recompute": "mixer"}), 4),
        "recompute-mixer-pp2-dp2": (_run("mamba2", pp=2, options={"recompute": "mixer", "overlap": True}), 4),
        "recompute-full-tp2-pp2": (_run("gdn", 2, 2, options={"recompute": "full"}), 4),
        "recompute-full-cp2-dp2": (_run("mamba2", cp=2, options={"recompute": "full"}), 4),
        "transformer-tp2-cp2": (_run("gdn", 2, cp=2, **attention), 4),
        "recurrent-only-cp2-dp2": (_run("gdn", cp=2, **recurrent), 4),
        "shared-query-tp2-cp2": (_run("mamba2", 2, cp=2, model__shared_query=True), 4),
        "yarn-tp2-cp2": (_run("mamba2", 2, cp=2, data__documents="isolated", model__rotary="both", **yarn), 4),
        "plain-projections-tp2-cp2": (_run("gdn", 2, cp=2, **plain), 4),
        "hybrid-tp2-pp2": (_run("gdn", 2, 2, **hybrid), 4),
        "hybrid-cp2-dp2": (_run("mamba2", cp=2, data__documents="isolated", **hybrid), 4),
        "hybrid-pp2-vpp2-overlap-dp2": (_run("gdn", pp=2, vpp=2, options={"overlap": True}, **hybrid), 4),
        "hybrid-muon-tp2-dp2": (_run("mamba2", 2, options=whole, **muon, **hybrid), 4),
        "mixed-pp4": (_run("mamba2", pp=4, **mixed), 4),
        "mixed-tp2-cp2": (_run("gdn", 2, cp=2, data__documents="isolated", **mixed), 4),
        "mixed-pp2-vpp2-recompute": (_run("gdn", pp=2, vpp=2, options={"recompute": "mixer"}, **mixed), 2),
    }


CASES = _matrix() | _options()


def _reference(run: RunConfig) -> RunConfig:
    """The same run on one rank."""
    sharded = run.optimizer.name != "muon"
    return dataclasses.replace(run, parallel=ParallelConfig(distributed_optimizer=sharded))


def _train(cases: dict[str, tuple[RunConfig, int]]) -> dict[str, list[tuple[float, float]]]:
    """On every rank: the cases of its worlds. Results by name, those of references by the run itself."""
    worlds, results = Worlds(), dict[str, list[tuple[float, float]]]()
    references = {str(_reference(run)): _reference(run) for run, _ in cases.values()}
    for size in (1, 2, 4):
        wanted = [(name, run) for name, (run, world) in cases.items() if world == size]
        if size == 1:
            wanted = list(references.items())
        for name, run in worlds.share(size, wanted):
            try:
                with worlds.of(size, name), session(run) as opened:
                    results[name] = opened.steps(STEPS)
            except Exception as error:
                error.add_note(f"in the case {name}")
                raise
    return results


@pytest.fixture(scope="module")
def results() -> dict[str, list[tuple[float, float]]]:
    merged: dict[str, list[tuple[float, float]]] = {}
    for part in run_distributed(_train, RANKS, CASES, timeout=900):
        merged |= part
    return merged


def test_enough_layouts() -> None:
    assert len({(run.parallel, world) for run, world in _matrix().values()}) + 1 >= 15  # with the single rank
    assert len({(run.parallel, world) for run, world in CASES.values()}) >= 16


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", CASES)
def test_losses_equal_the_single_rank(name: str, results: dict[str, list[tuple[float, float]]]) -> None:
    expected = torch.tensor(results[str(_reference(CASES[name][0]))], dtype=torch.float64)
    got = torch.tensor(results[name], dtype=torch.float64)
    assert expected.isfinite().all()
    torch.testing.assert_close(got[:, 0], expected[:, 0], rtol=1e-4, atol=0)  # losses
    torch.testing.assert_close(got[:, 1], expected[:, 1], rtol=1e-3, atol=0)  # gradient norms


def test_runs_differ(results: dict[str, list[tuple[float, float]]]) -> None:
    """The references are runs of different models on different plans: their losses are not all the same numbers."""
    references = {str(_reference(run)) for run, _ in CASES.values()}
    assert len({results[name][0][0] for name in references}) >= len(references) - 1
