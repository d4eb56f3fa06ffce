"""Mode plans: the type, the grammar, the training draw."""

import dataclasses

import numpy as np
import pytest

from oryx_megatron.config.schema import MixStage, ModesConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.modes import Mode, ModePlan, Run, draw_plan, parse_plan

A, R = Mode.ATTENTION, Mode.RECURRENT


def letters(plan: ModePlan) -> str:
    return "".join("ra"[int(a)] for a in plan.is_attention())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("attention", "aaaaaaaaaa"),
        ("recurrent", "rrrrrrrrrr"),
        ("prefix:3", "aaarrrrrrr"),
        ("prefix:0", "rrrrrrrrrr"),
        ("prefix:10", "aaaaaaaaaa"),
        ("last:3", "rrrrrrraaa"),
        ("last:0", "rrrrrrrrrr"),
        ("ratio:0", "rrrrrrrrrr"),
        ("ratio:1", "aaaaaaaaaa"),
        ("ratio:0.5", "rraarraarr"),
        ("ratio:0.34", "rrrraarrrr"),
        ("ratio:.4", "rrrraarraa"),
        ("every:1", "aaaaaaaaaa"),
        ("every:2", "rraarraarr"),
        ("every:5", "rrrrrrrraa"),
        ("every:6", "rrrrrrrrrr"),
        ("runs:a0-1,r1-7,a7-10", "arrrrrraaa"),
        ("runs:a0-1, a1-2, r2-10", "aarrrrrrrr"),
        ("prompt:attention,new:recurrent", "aaaarrrrrr"),
        ("prompt:recurrent,new:last:2", "rrrrrrrraa"),
        ("prompt:runs:a0-1,r1-4,new:runs:r0-1,a1-6", "arrrraaaaa"),
    ],
)
def test_grammar(spec, expected):
    plan = parse_plan(spec, 10, chunk=2, prompt=4)
    assert letters(plan) == expected
    assert plan.length == 10
    assert plan.attention_tokens == expected.count("a")
    assert plan.attention_share == expected.count("a") / 10
    assert parse_plan(str(plan), 10, chunk=3) == plan
    assert hash(ModePlan.from_mask([c == "a" for c in expected])) == hash(plan)


def test_last_chunk_may_be_short():
    assert letters(parse_plan("every:2", 7, chunk=2)) == "rraarra"
    assert letters(ModePlan.from_chunks([True, False], 4, 5)) == "aaaar"


def test_ratio_is_exact():
    """0.29 of 100 chunks are 29 although 100 * 0.29 < 29 in floating point."""
    assert parse_plan("ratio:0.29", 100, chunk=1).attention_tokens == 29
    assert parse_plan("ratio:0.1", 1000, chunk=10).attention_tokens == 100


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("", "unknown form"),
        ("atention", "unknown form"),
        ("attention:3", "unknown form"),
        ("prefix:11", "11 tokens are more than the 10 of the text"),
        ("last:11", "11 tokens are more than the 10"),
        ("prefix:-1", "`-1` is not a whole number of at least 0"),
        ("prefix:x", "`x` is not a whole number"),
        ("prefix", "`` is not a whole number"),
        ("every:0", "`0` is not a whole number of at least 1"),
        ("ratio:1.1", "`1.1` is not a number from 0 to 1"),
        ("ratio:-0.1", "`-0.1` is not a number from 0 to 1"),
        ("ratio:nan", "`nan` is not a number from 0 to 1"),
        ("runs:", "`` is no run"),
        ("runs:a0-5,x5-10", "`x5-10` is no run"),
        ("runs:a0-5", "its runs end at 5, the text at 10"),
        ("runs:a0-5,r5-12", "its runs end at 12, the text at 10"),
        ("runs:a0-5,r6-10", "`r6-10` does not start at 5"),
        ("runs:a1-10", "`a1-10` does not start at 0"),
        ("runs:a0-0,r0-10", "`a0-0` is empty"),
        ("prompt:attention", "needs `,new:PLAN`"),
        ("prompt:attention,new:recurrent", "there is no prompt here"),
    ],
)
def test_wrong_specs(spec, fault):
    with pytest.raises(ConfigError) as error:
        parse_plan(spec, 10, chunk=2)
    message = str(error.value)
    assert message.startswith(f"mode plan `{spec}`: ")
    assert fault in message
    assert "every:K" in message
    assert "prompt:PLAN,new:PLAN" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("prompt:attention,new:recurrent", "prompt of 11 tokens is longer"),
        ("prompt:prompt:attention,new:recurrent,new:recurrent", "cannot hold another"),
    ],
)
def test_wrong_prompt_specs(spec, fault):
    with pytest.raises(ConfigError, match=fault):
        parse_plan(spec, 10, chunk=2, prompt=11)


def test_type():
    plan = ModePlan((Run(0, 4, A), Run(4, 6, R), Run(6, 9, A)))
    assert plan == ModePlan.from_mask(np.array([1, 1, 1, 1, 0, 0, 1, 1, 1]))
    assert str(plan) == "runs:a0-4,r4-6,a6-9"
    assert [plan.mode_at(i) for i in range(9)] == [A] * 4 + [R] * 2 + [A] * 3
    assert plan.attention_runs() == (Run(0, 4, A), Run(6, 9, A))
    for start in range(10):
        for stop in range(start, 10):
            part = plan.slice(start, stop)
            assert part.length == stop - start
            assert (part.is_attention() == plan.is_attention()[start:stop]).all()
    assert plan.extended(A, 2).runs == (*plan.runs[:2], Run(6, 11, A))
    assert plan.extended(R, 2).runs == (*plan.runs, Run(9, 11, R))
    assert plan.extended(R, 0) == plan
    for i in (-1, 9):
        with pytest.raises(IndexError):
            plan.mode_at(i)
    with pytest.raises(IndexError):
        plan.slice(0, 10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.runs = ()


def test_empty_plan():
    for plan in (ModePlan.uniform(A, 0), ModePlan.from_mask([]), ModePlan.from_chunks([], 4, 0)):
        assert plan == ModePlan(())
        assert plan.length == plan.attention_share == len(plan.is_attention()) == 0
        assert parse_plan(str(plan), 0, chunk=4) == plan
    assert ModePlan(()).extended(A, 1) == ModePlan.uniform(A, 1)


@pytest.mark.parametrize(
    "runs",
    [(Run(1, 4, A),), (Run(0, 0, A),), (Run(0, 4, A), Run(4, 6, A)), (Run(0, 4, A), Run(5, 6, R))],
)
def test_broken_runs(runs):
    with pytest.raises(ValueError):
        ModePlan(runs)


def test_wrong_number_of_chunks():
    with pytest.raises(ValueError, match="3 chunks of 4 do not make 8 tokens"):
        ModePlan.from_chunks([True] * 3, 4, 8)


def draws(modes: ModesConfig, n: int = 600, iteration: int = 0) -> list[ModePlan]:
    return [draw_plan(modes, seed=7, iteration=iteration, microbatch=i, length=512) for i in range(n)]


def test_draw_is_pure_and_varies_with_each_argument():
    modes = ModesConfig(chunk=8, p_attention=0.0, p_recurrent=0.0)
    base = {"seed": 1, "iteration": 2, "microbatch": 3, "length": 512}
    plan = draw_plan(modes, **base)
    assert plan == draw_plan(modes, **base)
    for key in ("seed", "iteration", "microbatch"):
        assert draw_plan(modes, **{**base, key: base[key] + 10}) != plan


def test_draw_is_the_same_in_every_version():
    """A resumed run must see the plans of the run that it continues: this pins the generator."""
    modes = ModesConfig(chunk=2, p_attention=0.0, p_recurrent=0.0)
    plans = [str(draw_plan(modes, seed=1, iteration=i, microbatch=0, length=16)) for i in range(3)]
    assert plans == ["runs:a0-2,r2-16", "runs:r0-10,a10-12,r12-16", "runs:r0-10,a10-12,r12-16"]


def test_draw_probabilities():
    plans = draws(ModesConfig(chunk=8, p_attention=0.2, p_recurrent=0.3))
    share = [plan.attention_share for plan in plans]
    assert 0.14 < share.count(1.0) / len(plans) < 0.27  # ± 4 standard deviations, a little for ρ near 0 and 1
    assert 0.23 < share.count(0.0) / len(plans) < 0.40
    mixed = [s for s in share if 0 < s < 1]
    assert 0.45 < np.mean(mixed) < 0.55
    assert 0.25 < np.std(mixed) < 0.33  # uniform ratio: 0.29; a fixed ratio would give 0.06
    assert all(run.start % 8 == 0 for plan in plans for run in plan.runs)


def test_draw_schedule():
    stages = (
        MixStage(start=10, p_attention=0.0, p_recurrent=1.0),
        MixStage(start=20, p_attention=0.5, p_recurrent=0.5),
    )
    modes = ModesConfig(chunk=8, p_attention=1.0, p_recurrent=0.0, schedule=stages)
    for iteration, shares in ((0, {1.0}), (9, {1.0}), (10, {0.0}), (19, {0.0}), (20, {0.0, 1.0}), (99, {0.0, 1.0})):
        assert {plan.attention_share for plan in draws(modes, 40, iteration)} == shares


def test_draw_fixed():
    modes = ModesConfig(chunk=128, p_attention=1.0, fixed="ratio:0.5")
    assert {str(plan) for plan in draws(modes, 5)} == {"runs:r0-128,a128-256,r256-384,a384-512"}
