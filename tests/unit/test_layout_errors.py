"""A layout that does not work is one line: the factors, and the nearest layouts that do."""

import re

import pytest

from oryx_megatron.config.schema import ParallelConfig
from oryx_megatron.config.validate import validate
from oryx_megatron.errors import ConfigError
from oryx_megatron.testing.layouts import tiny_run

FAULTS = {
    "world": (ParallelConfig(tensor=2, pipeline=2), 5, r"world size 5 ≠ tensor 2 × pipeline 2 × context 1"),
    "heads": (ParallelConfig(tensor=4, context=2), 8, r"num_kv_heads 4 is not divisible by tensor 4 × context 2 = 8"),
    "layers": (ParallelConfig(pipeline=8), 8, r"num_layers 4 do not divide evenly over pipeline 8"),
    "chunks": (ParallelConfig(pipeline=4, virtual_pipeline=2), 4, r"stage of 1 layers is not divisible into 2 chunks"),
    "batch": (ParallelConfig(), 8, r"global_batch_size 4 is not divisible by .*data 8"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_and_alternatives(name: str) -> None:
    parallel, world, fault = FAULTS[name]
    with pytest.raises(ConfigError, match=fault) as caught:
        validate(tiny_run(parallel=parallel), world)
    text = str(caught.value)
    assert "\n" not in text
    _, _, offered = text.partition("layouts that work: ")
    stages = r"(?: \((?:virtual (\d+))?(?:first stage (\d+) layers)?\))?"
    layouts = re.findall(rf"tensor (\d+) × pipeline (\d+){stages} × context (\d+) × data (\d+)", offered)
    if name == "world":  # five: neither heads, layers, tokens nor batch have that factor
        assert "no layout of 5 ranks fits" in text
        return
    assert layouts
    for tp, pp, vpp, first, cp, dp in layouts:
        one = ParallelConfig(
            tensor=int(tp), pipeline=int(pp), virtual_pipeline=int(vpp or 1), context=int(cp),
            first_stage_layers=int(first) if first else None,
        )  # fmt: skip
        assert validate(tiny_run(parallel=one), world).dp == int(dp)


def test_the_same_ranks_with_other_stages_come_first() -> None:
    for faulty, near in (
        ({"virtual_pipeline": 3}, "pipeline 2 (virtual 2)"),
        ({"first_stage_layers": 4}, "pipeline 2 ×"),
        ({"virtual_pipeline": 2, "first_stage_layers": 1}, "pipeline 2 (first stage 1 layers)"),
    ):
        with pytest.raises(ConfigError, match="layouts that work: tensor 1 × ") as caught:
            validate(tiny_run(parallel=ParallelConfig(pipeline=2, **faulty)), 2)
        assert near in str(caught.value).partition("layouts that work: ")[2].split(";")[0]
    with pytest.raises(ConfigError, match=r"pipeline 2 \(first stage 2 layers\) × context 1 × data 1"):
        validate(tiny_run(parallel=ParallelConfig(pipeline=2), model__num_layers=5), 2)


def test_layers_fewer_than_stages_get_no_advice_on_stages() -> None:
    with pytest.raises(ConfigError, match="2 layers are left for 8 stages") as caught:
        validate(tiny_run(parallel=ParallelConfig(pipeline=8), model__num_layers=2), 8)
    assert "first_stage_layers" not in str(caught.value)
