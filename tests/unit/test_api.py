"""The seven names of the package: what a program gets for its mistakes. test_readme.py runs those of docs/api.md."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from oryx_megatron import Dataset, ModePlan, export, generate, load_model, load_run, parallel, train
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.errors import CheckpointError, ConfigError, ConversionError, DataError, OryxError
from oryx_megatron.eval.text import Model
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
        (
            lambda run: export(load_run(run), "x"),
            ConfigError,
            "expected the folder of a run or a checkpoint, got",
        ),
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


def test_models_and_runs_side_by_side(config: Path, tmp_path: Path) -> None:
    """In one process, as in a notebook: each writes what it writes alone."""
    small = ["train.iterations=2", "schedule.warmup=0", "model.num_layers=2", "evaluation.interval=0"]
    other = ["model.mixer=mamba2", "model.mtp={layers: 1}", "model.moe={experts: 4, ffn_hidden_size: 16}"]

    def run(name: str, *more: str) -> RunConfig:
        return load_run(config, [*small, *more, f"output_dir={tmp_path / name}"])

    def text(model: Model) -> str:
        return generate(model, "maan", 8, temperature=0).text

    try:
        alone = train(run("a")).steps()
        train(run("b", *other))
        assert not parallel.exist()
        first = load_model(tmp_path / "a")
        said = text(first)
        second = load_model(tmp_path / "b")
        assert text(first) == said
        both = text(second)
        again = train(run("c")).steps()
        assert [line["loss"] for line in again] == [line["loss"] for line in alone]
        assert (text(first), text(second)) == (said, both)
    finally:
        parallel.destroy()
    with pytest.raises(ConfigError, match="weights: 'emma' is none of trained, ema"):
        load_model(tmp_path / "a", weights="emma")  # type: ignore[arg-type]
    try:
        model = load_model(tmp_path / "b")
        assert text(model) == both
        for arguments, said in (
            ((None,), "prompt: expected text, got NoneType"),
            ((["a", "b"],), "prompt: expected text, got list; call generate for each text"),
            (("a", 2.5), "new tokens: 2.5 is no whole number"),
        ):
            with pytest.raises(ConfigError, match=said):
                generate(model, *arguments)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"plan: expected text such as .* got ModePlan"):
            generate(model, "a", plan=ModePlan.parse("attention", 4))  # type: ignore[arg-type]
    finally:
        parallel.destroy()
