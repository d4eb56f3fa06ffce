"""model.moe and parallel.expert: what is refused, in one line that names the field."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from oryx_megatron.config import load_model, load_run, to_yaml
from oryx_megatron.config.schema import MoEConfig, MTPConfig, ParallelConfig
from oryx_megatron.config.validate import validate
from oryx_megatron.errors import ConfigError
from oryx_megatron.testing.layouts import tiny_run

MOE = "{experts: 8, ffn_hidden_size: 16}"


def write_run(folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(to_yaml(tiny_run()))
    return path


@pytest.mark.parametrize(
    ("overrides", "ranks", "error"),
    [
        (["model.moe.top_k=9"], 1, "model.moe.top_k: 9 is more than model.moe.experts 8"),
        (["model.moe.top_k=0"], 1, "model.moe.top_k: 0 should be above 0"),
        (["model.moe.experts=0"], 1, "model.moe.experts: 0 should be above 0"),
        (["model.moe.z_loss=-0.1"], 1, "model.moe.z_loss: -0.1 should not be negative"),
        (["model.moe.capacity_factor=0.0"], 1, "model.moe.capacity_factor: 0.0 should be above 0"),
        (["model.moe.first_dense=4"], 1, "model.moe.first_dense: 4 leaves none of the 4 layers with experts"),
        (["model.moe.bias_update_rate=0.1"], 1, "needs model.moe.score sigmoid"),
        (["parallel.expert=3"], 3, "model.moe.experts 8 is not divisible by expert 3"),
        (["parallel.expert=4"], 2, "parallel.expert 4 does not divide tensor 1 × context 1 × data 2 = 2"),
        (["model.moe=null", "parallel.expert=2"], 2, "parallel.expert: 2, but the model has no experts"),
        (["model.moe.shared_ffn_hidden_size=7", "parallel.tensor=2"], 2, "model.moe.shared_ffn_hidden_size 7"),
        (["model.moe.first_dense=2", "parallel.pipeline=2"], 2, "stage 0 would have no layer with experts"),
        (["parallel.tensor=2", "parallel.sequence=false"], 2, "parallel.sequence: false with experts"),
        (["engine=deepspeed"], 1, "model.moe: not with engine deepspeed"),
        (["optimizer.cpu_offload=true"], 1, "optimizer.cpu_offload: not with experts"),
    ],
)
def test_experts_that_cannot_be_are_refused(tmp_path: Path, overrides: list[str], ranks: int, error: str) -> None:
    run = load_run(write_run(tmp_path), [f"model.moe={MOE}", *overrides])
    with pytest.raises(ConfigError) as caught:
        validate(run, ranks)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layouts_with_experts(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path), [f"model.moe={MOE}", "parallel.expert=4", "parallel.tensor=2"])
    assert validate(run, 4).ep == 4  # within tensor × data


def test_every_field_of_experts_is_read() -> None:
    """A name that another section has too, as `freeze` once, would hide that."""
    code = "".join(path.read_text() for path in Path("oryx_megatron").rglob("*.py"))
    for field in dataclasses.fields(MoEConfig):
        assert re.search(rf"\b(moe|self)\.{field.name}\b", code), field.name


def test_an_override_changes_one_field_of_a_preset(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text((Path("configs/model/tiny-gdn.yaml").read_text()) + f"moe: {MOE}\n")
    (tmp_path / "run.yaml").write_text(to_yaml(tiny_run()))
    text = (tmp_path / "run.yaml").read_text()
    start, end = text.index("model:"), text.index("data:")
    (tmp_path / "run.yaml").write_text(text[:start] + f"model: {tmp_path}/m.yaml\n" + text[end:])
    run = load_run(tmp_path / "run.yaml", ["model.moe.top_k=4"])
    assert run.model.moe is not None
    assert (run.model.moe.top_k, run.model.moe.experts) == (4, 8)
    assert load_run(tmp_path / "run.yaml", ["model.moe=null"]).model.moe is None
    assert load_model(str(tmp_path / "m.yaml")).expert_layers == 4


def test_graphs_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from oryx_megatron import platform
    from oryx_megatron.train.engine import why_launched

    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    run = tiny_run(parallel=ParallelConfig())
    assert why_launched(run) is None
    assert why_launched(tiny_run(model__mtp=MTPConfig(), parallel=ParallelConfig(context=2))) is None
    reason = why_launched(tiny_run(model__moe=MoEConfig(experts=4, ffn_hidden_size=8)))
    assert reason is not None
    assert "not with model.moe" in reason
