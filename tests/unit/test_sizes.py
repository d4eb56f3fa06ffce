"""Sizes that no memory holds are one line, before anything is allocated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from oryx_megatron import parallel
from oryx_megatron.config import load_run, validate
from oryx_megatron.config.schema import ParallelConfig, PrecisionConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.model import build_model
from oryx_megatron.testing.layouts import tiny_run
from oryx_megatron.train.sizes import check_sizes

CONFIG = Path(__file__).resolve().parents[2] / "configs/run/quickstart.yaml"


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["train.iterations=1000000000000000"], "train.iterations 1000000000000000 of train.global_batch_size"),
        (["train.global_batch_size=1000000000000000"], "of train.global_batch_size 1000000000000000: "),
        (
            ["train.micro_batch_size=4096", "train.global_batch_size=4096", "train.iterations=1", "schedule.warmup=0",
             "data.sequence_length=134217728", "modes.chunk=1048576"],
            "train.micro_batch_size 4096 of data.sequence_length 134217728: the activations ",
        ),
        (
            ["train.micro_batch_size=1099511627776", "train.global_batch_size=1099511627776", "train.iterations=1",
             "schedule.warmup=0"],
            "train.global_batch_size 1099511627776: ",
        ),
    ],
)  # fmt: skip
def test_sizes_of_a_run(overrides: list[str], names: str) -> None:
    run = load_run(CONFIG, ["parallel.tensor=1", *overrides])
    with pytest.raises(ConfigError, match=names) as error:
        check_sizes(run, validate(run, 1))
    assert " GiB on each rank, but there are " in str(error.value)
    check_sizes(small := load_run(CONFIG, ["parallel.tensor=1"]), validate(small, 1))


@pytest.mark.parametrize(
    "field", ["num_layers", "hidden_size", "ffn_hidden_size", "qk_head_dim", "v_head_dim", "vocab_size"]
)
def test_sizes_of_a_model(field: str) -> None:
    parallel.initialize(ParallelConfig(), seed=1)
    try:
        model = dataclasses.replace(tiny_run().model, **{field: 2**40})
        with pytest.raises(ConfigError, match=r"^model .+: its [\d,]+ parameters take .* on each rank, but there are"):
            build_model(model, ParallelConfig(), PrecisionConfig(dtype="fp32"), seed=1)
    finally:
        parallel.destroy()


def test_sizes_beyond_any_machine_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data.sequence_length: 1099511627776 should be at most 134217728$"):
        validate(load_run(CONFIG, ["data.sequence_length=1099511627776"]), 1)
    with pytest.raises(ConfigError, match=r"^data.num_workers: 100000 should be at most 1024"):
        validate(load_run(CONFIG, ["data.num_workers=100000"]), 1)
