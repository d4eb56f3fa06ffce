"""Mode plans: the type, the grammar, the training draw."""

import dataclasses
import itertools

import numpy as np
import pytest

from oryx_megatron.config import load_run, to_yaml, validate
from oryx_megatron.config.plans import read_plan
from oryx_megatron.config.schema import MixStage, ModesConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.modes import Mode, ModePlan, Run, draw_plan, parse_plan
from oryx_megatron.testing.layouts import tiny_run

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
def test_every_form_gives_these_tokens(spec, expected):
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
        ("atention", "unknown form; did you mean `attention`?; a plan is one of"),
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


def test_a_plan_is_made_of_alternating_runs():
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


def test_draw_of_prompts():
    """Each text is split at a chunk that is drawn for it, anywhere from nothing to all of it."""
    plans = draws(ModesConfig(chunk=64, p_attention=0.0, p_recurrent=0.0, p_prompt=1.0))
    cuts = [plan.attention_tokens for plan in plans]
    assert all(plan == parse_plan(f"prefix:{cut}", 512, chunk=64) for plan, cut in zip(plans, cuts, strict=True))
    assert {cut // 64: cuts.count(cut) for cut in cuts}.keys() == set(range(9))
    assert all(cut % 64 == 0 for cut in cuts)
    assert all(30 < cuts.count(cut) < 110 for cut in set(cuts))  # 600 / 9, ± 5 standard deviations
    turned = draws(
        ModesConfig(chunk=64, p_attention=0, p_recurrent=0, p_prompt=1, prompt="prompt:recurrent,new:every:2")
    )
    assert {str(plan) for plan in turned} >= {str(parse_plan("every:2", 512, chunk=64)), "recurrent"}


def test_draw_is_unchanged_by_what_is_not_used():
    """Runs of versions without prompts and documents resume with the plans that they had."""
    old, new = ModesConfig(chunk=8), ModesConfig(chunk=8, prompt="prompt:recurrent,new:attention")
    assert draws(old, 50) == draws(new, 50)
    for plan, number in zip(draws(old, 50), range(50), strict=True):
        again = draw_plan(old, seed=7, iteration=0, microbatch=number, length=512, documents=[0, 512])
        assert plan == again


def test_draw_by_documents():
    """Chunks and splits count from the start of every document."""
    documents = [0, 5, 5 + 16, 40, 41, 100]
    base = {"seed": 3, "iteration": 1, "length": 100, "documents": documents}
    edges = {start + i for start, stop in itertools.pairwise(documents) for i in range(0, stop - start, 8)}
    shares = set()
    for number in range(60):
        plan = draw_plan(ModesConfig(chunk=8, p_attention=0.0, p_recurrent=0.0), microbatch=number, **base)
        assert plan.length == 100
        assert {run.start for run in plan.runs} <= edges
        shares.add(plan.attention_share)
        split = draw_plan(ModesConfig(chunk=8, p_attention=0, p_recurrent=0, p_prompt=1), microbatch=number, **base)
        for start, stop in itertools.pairwise(documents):
            part = split.slice(start, stop)
            assert part == parse_plan(f"prefix:{part.attention_tokens}", stop - start, chunk=8)
            assert part.attention_tokens % 8 == 0 or part.attention_tokens == stop - start
    assert len(shares) > 30
    fixed = draw_plan(ModesConfig(chunk=8, fixed="prefix:6"), microbatch=0, **base)
    assert str(fixed) == "runs:a0-11,r11-21,a21-27,r27-40,a40-47,r47-100"


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("ratio:0.25\n", "ratio:0.25"),
        ("# ours\n\n  prompt:attention,new:every:2  # spread\n", "prompt:attention,new:every:2"),
        ("a0-4\nr4-8  # here\n\na8-16\n", "runs:a0-4,r4-8,a8-16"),
        ("a0-4, r4-8,\na8-16", "runs:a0-4, r4-8,a8-16"),
        ("a0-16", "runs:a0-16"),
    ],
)
def test_a_plan_in_a_file(tmp_path, monkeypatch, text, spec):
    (tmp_path / "plan.txt").write_text(text)
    monkeypatch.setenv("PLANS", str(tmp_path))
    assert read_plan("file:$PLANS/plan.txt") == spec
    assert parse_plan(f"file: {tmp_path}/plan.txt", 16, chunk=4, prompt=8) == parse_plan(spec, 16, chunk=4, prompt=8)
    assert read_plan(spec) == spec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "plan.txt cannot be read: No such file"),
        ("", "holds no plan; write one, or runs such as a0-256, one a line"),
        ("# a\n", "holds no plan"),
        ("a0-4\nratio:0.5\n", "plan.txt:2: `ratio:0.5` is no run like a0-256"),
        ("file:other", "names another file; write the plan itself"),
        ("prefix:99", "99 tokens are more than the 16"),
        ("a0-4\nr5-16", "does not start at 4"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_file_without_a_plan(tmp_path, text, expected):
    path = tmp_path / "plan.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match="mode plan `") as error:
        parse_plan(f"file:{path}", 16, chunk=4)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_plans_of_a_run_are_written_out(tmp_path):
    """The config that a checkpoint records depends on no file."""
    (tmp_path / "run.yaml").write_text(to_yaml(tiny_run()))
    (tmp_path / "plan").write_text("a0-8\nr8-32\n")
    (tmp_path / "prompt").write_text("prompt:recurrent,new:attention\n")
    run = load_run(
        tmp_path / "run.yaml",
        [
            f"evaluation.plans=[attention,'file:{tmp_path}/plan']",
            f"modes.prompt=file:{tmp_path}/prompt",
            "modes.p_prompt=0.5",
        ],
    )
    assert run.evaluation.plans == ("attention", "runs:a0-8,r8-32")
    assert run.modes.prompt == "prompt:recurrent,new:attention"
    validate(run, 1)
    assert load_run(tmp_path / "run.yaml", [f"modes.fixed=file:{tmp_path}/plan"]).modes.fixed == "runs:a0-8,r8-32"
    with pytest.raises(ConfigError, match=r"evaluation.plans\[0\]: mode plan `file:gone`: gone cannot be read"):
        load_run(tmp_path / "run.yaml", ["evaluation.plans=['file:gone']"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"modes__p_prompt": 0.7}, "modes: p_attention 0.2 + p_recurrent 0.2 + p_prompt 0.7 is more than 1"),
        ({"modes__p_prompt": 0.1, "modes__prompt": "every:2"}, "modes.prompt: `every:2` is no prompt:PLAN,new:PLAN"),
        ({"modes__p_prompt": 0.1, "modes__prompt": "prompt:x,new:last:1"}, "modes.prompt: mode plan `x`: unknown form"),
        ({"modes__align": "documents"}, "modes.align: documents needs data.documents: isolated"),
        (
            {"modes__align": "documents", "data__documents": "isolated", "modes__fixed": "runs:a0-8,r8-32"},
            "modes.fixed: runs end at one place, documents do not",
        ),
        (
            {"modes__schedule": (MixStage(start=1, p_attention=0.5, p_recurrent=0.5, p_prompt=0.5),)},
            "modes.schedule[0]: p_attention 0.5 + p_recurrent 0.5 + p_prompt 0.5 is more than 1",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit(changes, expected):
    with pytest.raises(ConfigError) as error:
        validate(tiny_run(**changes), 1)
    assert str(error.value).startswith(expected)
