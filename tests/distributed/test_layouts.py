"""The same run under every layout gives the same losses: the test that catches wrong sharding."""

from __future__ import annotations

import itertools
import json

import pytest
from tiny_runs import BF16_STEPS, FIELDS, MIXED, SIZES, SPECIAL, STEPS, VARIANTS, Runs

from oryx_megatron import arch
from oryx_megatron.config import load_run
from oryx_megatron.modes import draw_plan

pytestmark = pytest.mark.timeout(1000)  # whichever test is first makes all runs


@pytest.mark.parametrize(
    ("variant", "layout"),
    [(variant, name) for variant in VARIANTS for name in ("2x1x1", "1x2x1", "1x1x2", "2x2x1", SPECIAL[variant])],
)
def test_losses_do_not_depend_on_the_layout(runs: Runs, variant: str, layout: str) -> None:
    """fp32, 1e-4, distributed optimizer, drawn plans: training, gradient norms and evaluation under three plans."""
    one, other = f"{variant} 1x1x1", f"{variant} {layout}"
    losses = runs.losses(one)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.2  # it is no comparison of standing still
    assert sum(0 < share < 1 for share in runs.steps(one, "attention_share")) > 0  # plans of both modes were drawn
    assert runs.losses(other) == pytest.approx(losses, rel=1e-4)
    assert runs.steps(other, "grad_norm") == pytest.approx(runs.steps(one, "grad_norm"), rel=1e-3)
    sizes = SIZES if variant == "mamba2" else [4] * STEPS
    assert list(itertools.accumulate(sizes)) == runs.steps(one, "consumed_samples")
    assert runs.steps(one, "tokens") == [48 * size for size in sizes]
    for field in ("attention_share", "lr", "consumed_samples", "tokens", "model_flops"):
        assert runs.steps(other, field) == pytest.approx(runs.steps(one, field), rel=1e-6)
    assert runs.evaluations(other) == pytest.approx(runs.evaluations(one), rel=1e-4)
    if variant == "gdn":
        penalties = runs.steps(one, "logit_z_loss")
        assert min(penalties) > 1e-3
        assert runs.steps(other, "logit_z_loss") == pytest.approx(penalties, rel=1e-4)
        assert runs.steps(one, "model_flops") == pytest.approx(drawn_flops(runs), rel=1e-9)
    else:
        assert all(len(losses) == 2 for losses in runs.steps(one, "mtp_losses"))
        assert runs.steps(other, "mtp_loss") == pytest.approx(runs.steps(one, "mtp_loss"), rel=1e-4)
        assert runs.steps(one, "mtp_loss")[-1] < runs.steps(one, "mtp_loss")[0] - 0.2
    assert set(runs.evaluations(one)) == {"attention", "recurrent", MIXED[variant]}


def drawn_flops(runs: Runs) -> list[float]:
    """Of every step of gdn's runs, whose two microbatches have a plan each, some by layer."""
    run = load_run(runs.root / "run.yaml", ["model.num_layers=2", *FIELDS["gdn"]])
    drawn = [
        [
            draw_plan(run.modes, seed=run.seed, iteration=i, microbatch=m, length=48, layers=run.model.reads_plans)
            for m in range(2)
        ]
        for i in range(STEPS)
    ]
    assert any(len(set(plan.of_layers)) > 1 for plans in drawn for plan in plans)
    own = [[arch.training_flops_per_token(run.model, 48, plan.layer_shares) for plan in plans] for plans in drawn]
    return [4 * 48 * sum(flops) / 2 for flops in own]


@pytest.mark.parametrize(("variant", "layout"), itertools.product(VARIANTS, ("2x1x1", "1x1x2")))
def test_a_session_takes_the_trainers_steps(runs: Runs, variant: str, layout: str) -> None:
    """testing/layouts.py, by which layouts and benchmarks are tested, computes what users' runs compute, bit by bit."""
    name = f"{variant} {layout}"
    steps = json.loads((runs.root / name / "session.json").read_text())
    assert steps == [list(pair) for pair in zip(runs.losses(name), runs.steps(name, "grad_norm"), strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_by_mode_and_position_do_not_depend_on_the_layout(runs: Runs, variant: str) -> None:
    one = runs.apart(f"{variant} 1x1x1")
    assert {name for name, _ in one} == {"modes", "positions"}
    for layout in ("2x1x1", "1x2x1", "1x1x2", "2x2x1"):
        assert runs.apart(f"{variant} {layout}") == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_learns(runs: Runs, variant: str) -> None:
    losses = runs.losses(f"{variant} bf16")
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    fp32 = runs.losses(f"{variant} 2x1x1")
    assert losses[0] == pytest.approx(fp32[0], rel=5e-3)
    assert max(runs.evaluations(f"{variant} bf16", BF16_STEPS).values()) < 0.8 * losses[0]
