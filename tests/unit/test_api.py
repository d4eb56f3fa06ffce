"""The seven names of the package: what a program gets for its mistakes. test_readme.py runs those of docs/api.md."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from oryx_megatron import Dataset, ModePlan, export, generate, load_model, load_run, train
from oryx_megatron.errors import CheckpointError, ConfigError, ConversionError, DataError, OryxError
from oryx_megatron.testing.project import tiny_project


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_project(tmp_path_factory.mktemp("project"))


def test_documents_by_number_and_slice(config: Path) -> None:
    data = Dataset(config.parent / "data")
    all_ = list(data)
    assert len(all_) == len(data) == 160
    assert sum(map(len, all_)) == data.tokens
    assert data.manifest is None
    for slice_ in (slice(2), slice(-2, None), slice(None, None, 60), slice(5, 3)):
        for found, expected in zip(data[slice_], all_[slice_], strict=True):
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(data[-1], data[np.int64(159)])
    for number in (160, -161):
        with pytest.raises(IndexError, match=f"document {number} of 160"):
            data[number]


def test_an_override_alone(config: Path) -> None:
    assert load_run(config, "train.iterations=9").train.iterations == 9
    assert load_run(config, ["train.iterations=9", "seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda run: load_run("nowhere.yaml"), ConfigError, "nowhere.yaml: no such config file"),
        (lambda run: load_run(run, ["train.iteratons=3"]), ConfigError, "did you mean `train.iterations`?"),
        (lambda run: train(load_run(run), "seed=3"), ConfigError, "overrides go to load_run"),
        (lambda run: load_model(run.parent / "none"), CheckpointError, "none does not exist"),
        (lambda run: load_model(run.parent), CheckpointError, "holds no complete checkpoint"),
        (lambda run: generate("runs/x", "The "), ConfigError, "got 'runs/x'; load_model('runs/x') gives one"),
        (lambda run: Dataset(run.parent / "none"), DataError, "none.idx is missing; make it with"),
        (lambda run: export(run.parent, "x"), CheckpointError, "holds no complete checkpoint"),
        (lambda run: export("x", "y", dtype="bf17"), ConversionError, "dtype: 'bf17' is none of keep, bf16, fp32"),
        (lambda run: export("x", "y", weights="best"), ConversionError, "weights: 'best' is none of trained, ema"),
        (lambda run: ModePlan.parse("rati:3", 10), ConfigError, "did you mean `ratio:`?"),
        (lambda run: ModePlan.parse("ratio:0.5", -1), ConfigError, "`ratio:0.5`: -1 tokens in chunks of 256"),
        (lambda run: ModePlan.parse("ratio:0.5", 10, chunk=0), ConfigError, "10 tokens in chunks of 0"),
    ],
)
def test_mistakes_are_one_line(config: Path, call: Callable[[Path], object], error: type[OryxError], said: str) -> None:
    with pytest.raises(error) as raised:
        call(config)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
