"""A layout that does not work is one line: the factors, and the nearest layouts that do."""

import re

import pytest

from oryx_megatron.config.schema import ParallelConfig
from oryx_megatron.config.validate import validate
from oryx_megatron.errors import ConfigError
from oryx_megatron.testing.layouts import tiny_run

FAULTS = {
    "world": (ParallelConfig(tensor=2, pipeline=2), 6, r"world size 6 ≠ tensor 2 × pipeline 2 × context 1"),
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
    layouts = re.findall(r"tensor (\d+) × pipeline (\d+)(?: \(virtual (\d+)\))? × context (\d+) × data (\d+)", offered)
    if name == "world":  # six ranks need a factor of three, which neither heads, layers, tokens nor batch have
        assert "no layout of 6 ranks fits" in text
        return
    assert layouts
    for tp, pp, vpp, cp, dp in layouts:
        one = ParallelConfig(tensor=int(tp), pipeline=int(pp), virtual_pipeline=int(vpp or 1), context=int(cp))
        assert validate(tiny_run(parallel=one), world).dp == int(dp)
