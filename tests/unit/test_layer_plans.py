"""Mode plans that differ over layers: the grammar, the type, the training draw, the rules of a run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from oryx_megatron.config import load_run, to_yaml, validate
from oryx_megatron.config.plans import attention_share, layer_plans, parse_runs, read_plan, shares_of_layers
from oryx_megatron.config.schema import MixStage, ModesConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.modes import LayerPlans, Mode, ModePlan, draw_plan, parse_plan, plan_for
from oryx_megatron.testing.layouts import tiny_run

ALL = (True,) * 6


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("layers:0-2=attention,3-5=recurrent", "aaarrr"),
        ("layers: 3-5 = recurrent , 0-2 = attention", "aaarrr"),
        ("layers:even=attention,odd=recurrent", "ararar"),
        ("layers:rest=recurrent,4=attention", "rrrrar"),
        ("layers:0=attention,1-end=recurrent", "arrrrr"),
        ("layers:0-end=prompt:attention,new:recurrent", "pppppp"),
        ("layers:1=runs:a0-4,r4-10,0=runs:a0-4, r4-6, r6-10,rest=attention", "xyaaaa"),
    ],
)
def test_grammar(spec, expected):
    letters = {"attention": "a", "recurrent": "r", "prompt:attention,new:recurrent": "p"}
    letters |= {"runs:a0-4, r4-6, r6-10": "x", "runs:a0-4,r4-10": "y"}
    assert "".join(letters[plan] for plan in layer_plans(spec, 6)) == expected


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("layers:", "needs parts like 0-5=attention"),
        ("layers:attention", "needs parts like 0-5=attention"),
        ("layers:0-5,rest=attention", "needs parts like 0-5=attention"),
        ("layers:0-4=attention", "layer 5 has no plan"),
        ("layers:0-1=attention", "layers 2 to 5 have no plan"),
        ("layers:even=attention", "3 of the 6 layers, 1 the first of them, have no plan"),
        ("layers:0-6=attention", "layer 6 of `0-6` is not there: the model has 6, 0 to 5"),
        ("layers:999999999=attention", "`999999999` names no layers"),
        ("layers:0-2=attention,2-5=recurrent", "layer 2 is named twice, by `0-2` and `2-5`"),
        ("layers:even=attention,rest=recurrent,4=recurrent", "layer 4 is named twice"),
        ("layers:0-end=attention,rest=recurrent", "`rest` is no layer: the other parts name all 6"),
        ("layers:5-0=attention", "`5-0` ends before it begins"),
        ("layers:first=attention,rest=recurrent", "`first` names no layers; write 3, 0-5, 6-end, even, odd or rest"),
        ("layers:0=router:0.1,rest=recurrent", "cannot be a plan `router:`"),
        ("layers:0=layers:0=attention,rest=recurrent", "cannot be a plan `layers:`"),
        ("layers:0=,rest=recurrent", "unknown form"),
        ("layers:0=prefix:11,rest=recurrent", "11 tokens are more than the 10"),
        ("prompt:layers:0-5=attention,new:recurrent", "goes around all other forms"),
    ],
)
def test_wrong_specs(spec, fault):
    with pytest.raises(ConfigError, match="mode plan `") as error:
        plan_for(ALL, spec, 10, chunk=2, prompt=5)
    assert fault in str(error.value)
    assert "layers:0-5=PLAN,rest=PLAN" in str(error.value)
    assert "\n" not in str(error.value)


def test_where_no_layers_are_known():
    for read in (lambda: parse_plan("layers:0=attention", 4, chunk=1), lambda: plan_for((), "layers:0=a", 4, chunk=1)):
        with pytest.raises(ConfigError, match="known"):
            read()


def test_a_plan_of_layers_knows_share_text_and_parts():
    spec = "layers:0=attention,1-2=prefix:4,3=recurrent,4-5=last:2"
    plan = plan_for(ALL, spec, 8, chunk=2)
    assert isinstance(plan, LayerPlans)
    assert hash(plan) == hash(plan_for(ALL, spec, 8, chunk=2))
    assert plan_for(ALL, str(plan), 8, chunk=2) == plan
    assert plan.length == 8
    assert plan.attention_share == pytest.approx((1 + 2 * 0.5 + 0 + 2 * 0.25) / 6)
    assert attention_share(spec, 8, chunk=2, layers=ALL) == pytest.approx(plan.attention_share)
    assert list(plan.layer_shares) == [1, 0.5, 0.5, 0, 0.25, 0.25] == shares_of_layers(spec, 8, chunk=2, layers=ALL)
    assert plan.is_attention().shape == (6, 1, 8)
    assert (plan.is_attention()[2, 0] == parse_plan("prefix:4", 8, chunk=2).is_attention()).all()
    assert plan.of_layers[-1] == parse_plan("last:2", 8, chunk=2)
    assert plan.anywhere == parse_plan("attention", 8, chunk=2)
    assert plan.kinds().tolist() == [2] * 8
    late = plan.slice(3, 8)
    assert isinstance(late, LayerPlans)
    assert [str(own) for own in late.of_layers] == [
        "attention",
        *["runs:a0-1,r1-5"] * 2,
        "recurrent",
        *["runs:r0-3,a3-5"] * 2,
    ]
    assert (plan.tiled(2).is_attention() == np.tile(plan.is_attention(), 2)).all()
    for layers in ((), (None,), (ModePlan.uniform(Mode.ATTENTION, 2), ModePlan.uniform(Mode.RECURRENT, 3))):
        with pytest.raises(ValueError, match="one length"):
            LayerPlans(layers)


def test_one_plan_everywhere_is_a_plan():
    assert plan_for(ALL, "layers:even=ratio:0.5,odd=every:2", 8, chunk=2) == parse_plan("every:2", 8, chunk=2)
    assert plan_for(ALL, "every:2", 8, chunk=2) == parse_plan("every:2", 8, chunk=2)
    halves = plan_for(ALL, "layers:0=prefix:4,rest=attention", 8, chunk=2)
    assert halves.slice(0, 4) == ModePlan.uniform(Mode.ATTENTION, 4)  # in this piece they do not differ


def test_layers_of_one_mode_ignore_their_part():
    """As any plan; they count in no share, and take the order of a neighbour."""
    reads = (False, True, False, True)
    plan = plan_for(reads, "layers:0=attention,1=prefix:2,2=recurrent,3=recurrent", 8, chunk=2)
    assert plan.attention_share == pytest.approx(0.125)
    assert [str(own) for own in plan.of_layers] == [*["runs:a0-2,r2-8"] * 3, "recurrent"]
    assert plan.kinds().tolist() == [2, 2, 0, 0, 0, 0, 0, 0]
    assert len(set(plan.orders)) == 1
    assert plan_for(reads, "layers:1=prefix:2,3=prefix:2,rest=attention", 8, chunk=2) == parse_plan(
        "prefix:2", 8, chunk=1
    )
    assert isinstance(plan_for((False, False), "layers:0=attention,1=recurrent", 8, chunk=2), ModePlan)


def test_draw_of_groups():
    """Each group of neighbouring layers has a ratio of its own; other draws are what they were."""
    modes = ModesConfig(chunk=8, p_attention=0.0, p_recurrent=0.0, p_layers=1.0, layer_groups=3)
    plans = [draw_plan(modes, seed=7, iteration=0, microbatch=i, length=256, layers=(True,) * 7) for i in range(400)]
    assert plans[3] == draw_plan(modes, seed=7, iteration=0, microbatch=3, length=256, layers=(True,) * 7)
    assert all(isinstance(plan, LayerPlans) for plan in plans)
    assert all(plan.of_layers[0] == plan.of_layers[2] and plan.of_layers[3] == plan.of_layers[4] for plan in plans)
    shares = np.array([[plan.of_layers[i].attention_share for i in (0, 3, 5)] for plan in plans])
    assert (np.abs(shares.mean(0) - 0.5) < 0.06).all()
    assert (np.abs(np.corrcoef(shares.T) - np.eye(3)) < 0.2).all()
    plain = dataclasses.replace(modes, p_layers=0.0)
    staged = dataclasses.replace(plain, schedule=(MixStage(start=5, p_attention=0, p_recurrent=0, p_layers=1.0),))
    for i in range(4, 6):
        found = draw_plan(staged, seed=7, iteration=i, microbatch=0, length=256, layers=ALL)
        assert isinstance(found, LayerPlans) == (i == 5)
    some = dataclasses.replace(modes, p_layers=0.5)
    kinds = [
        isinstance(draw_plan(some, seed=7, iteration=0, microbatch=i, length=256, layers=ALL), LayerPlans)
        for i in range(400)
    ]
    assert 150 < sum(kinds) < 250
    one = [draw_plan(plain, seed=7, iteration=0, microbatch=i, length=256, layers=ALL) for i in range(9)]
    assert one == [draw_plan(plain, seed=7, iteration=0, microbatch=i, length=256) for i in range(9)]


def test_draw_of_a_fixed_plan_by_documents():
    modes = ModesConfig(chunk=4, fixed="layers:0=prefix:6,rest=every:2")
    plan = draw_plan(modes, seed=1, iteration=0, microbatch=0, length=20, documents=[0, 5, 20], layers=ALL)
    assert str(plan.of_layers[0]) == "runs:a0-11,r11-20"
    assert str(plan.of_layers[1]) == "runs:r0-4,a4-5,r5-9,a9-13,r13-17,a17-20"


def test_plan_files_stand_for_plans_of_layers_and_within_them(tmp_path):
    (tmp_path / "runs").write_text("a0-8\nr8-32\n")
    (tmp_path / "layers").write_text("# ours\n0-1=ratio:0.5\nrest=runs:a0-8,r8-end\n")
    assert read_plan(f"layers:0=file:{tmp_path}/runs,rest=recurrent") == "layers:0=runs:a0-8,r8-32,rest=recurrent"
    assert read_plan(f"file:{tmp_path}/layers") == "layers:0-1=ratio:0.5,rest=runs:a0-8,r8-end"
    (tmp_path / "run.yaml").write_text(to_yaml(tiny_run()))
    run = load_run(tmp_path / "run.yaml", [f"modes.fixed=layers:even=file:{tmp_path}/runs,odd=recurrent"])
    assert run.modes.fixed == "layers:even=runs:a0-8,r8-32,odd=recurrent"
    validate(run, 1)
    (tmp_path / "layers").write_text("0-1=ratio:0.5\nrecurrent\n")
    with pytest.raises(ConfigError, match="layers:2: `recurrent` is no part like 0-5=attention"):
        read_plan(f"file:{tmp_path}/layers")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffa0-8\r\nr8-32\r\n", "runs:a0-8,r8-32"),  # as Windows' editors write it
        ("layers:0-1=ratio:0.5,\nrest=recurrent\n", "layers:0-1=ratio:0.5,rest=recurrent"),
        ("runs: a0-8,\nr8-32", "runs:a0-8,r8-32"),
        ("# of a page\na0-25%,r25%-24\na24-end", "runs:a0-25%,r25%-24,a24-end"),
    ],
)
def test_what_files_hold(tmp_path, text, expected):
    (tmp_path / "plan").write_bytes(text.encode())
    assert read_plan(f"file:{tmp_path}/plan") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a0-8\n\nr12-32\n", ":3: run `r12-32` does not start at 8, where the one before it ends"),
        ("a8-16", ":1: run `a8-16` does not start at 0"),
        ("a0-8,r8-16,a18-32", ":1: run `a18-32` does not start at 16"),
        ("a0-8\nratio:0.5", ":2: `ratio:0.5` is no run like a0-256"),
        ("0=attention\nrest=file:plan", ":2: `rest=file:plan` names another file; write the plan itself"),
        ("layers:0=file:plan,rest=attention", " names another file; write the plan itself"),
        ("file:plan", " names another file; write the plan itself"),
        ("# nothing", " holds no plan"),
    ],
)
def test_wrong_files(tmp_path, text, expected):
    """Of the file and its line; one that names itself is not read for ever."""
    (tmp_path / "plan").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_plan(f"file:{tmp_path}/plan")
    assert f"{tmp_path}/plan{expected}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_long_plan_in_an_error():
    spec = "runs:" + ",".join(f"{'ar'[i % 2]}{8 * i}-{8 * i + 8}" for i in range(4000))
    with pytest.raises(ConfigError, match="its runs end at 32000, the text at 32") as error:
        parse_runs(spec, 32, chunk=8)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"modes__fixed": "layers:0-2=last:9"}, "modes.fixed: mode plan `layers:0-2=last:9`: layer 3 has no plan"),
        ({"modes__fixed": "layers:0=every:9,rest=attention"}, "modes.fixed: `every:9` gives no attention at all"),
        ({"evaluation__plans": ("layers:0-9=last:9",)}, "evaluation.plans[0]: mode plan `layers:0-9=last:9`: layer 9"),
        ({"modes__p_layers": 0.7}, "modes: p_attention 0.2 + p_recurrent 0.2 + p_layers 0.7 is more than 1"),
        ({"modes__p_layers": 0.1, "modes__layer_groups": 5}, "modes.layer_groups: 5 is more than model.num_layers 4"),
        ({"modes__p_layers": 0.1, "modes__layer_groups": 1}, "modes.layer_groups"),
        (
            {"model__modes": "attention", "modes__fixed": "layers:0=attention,rest=recurrent"},
            "modes.fixed: `recurrent` is not all attention, the one mode of model",
        ),
        (
            {"modes__align": "documents", "data__documents": "isolated", "modes__fixed": "layers:rest=runs:a0-32"},
            "modes.fixed: runs end at one place, documents do not",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_run(changes, expected):
    with pytest.raises(ConfigError) as error:
        validate(tiny_run(**changes), 1)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)
