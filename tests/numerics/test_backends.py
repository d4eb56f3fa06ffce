"""Selection of backends."""

from __future__ import annotations

import copy

import pytest
import torch

from oryx_megatron.config import load_model
from oryx_megatron.config.schema import KernelsConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.ops import backends, rms_norm

ALL_REFERENCE = "attention=reference, recurrence=reference, convolution=reference, norm=reference, mixer=reference"


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """A copy of the registry with the references alone, so that what a test registers is gone after it."""
    monkeypatch.setattr(backends, "_backends", copy.deepcopy(backends._backends))
    monkeypatch.setattr(backends, "_selected", dict(backends._selected))
    monkeypatch.setattr(backends, "_selected_steps", "reference")
    for functions in backends._backends.values():
        for function, known in functions.items():
            functions[function] = {"reference": known["reference"]}
    backends.select(KernelsConfig())


def add(name: str, *, rank: int = 1, missing: str | None = None, function: str = "rms_norm") -> None:
    backends.register("norm", function, name, lambda x, weight, eps: x + rank, missing=lambda: missing, rank=rank)


def run() -> float:
    return rms_norm(torch.zeros(1), torch.ones(1), 1.0).item()


def test_reference_by_default():
    assert backends.describe() == ALL_REFERENCE
    backends.select(
        KernelsConfig(
            attention="reference",
            recurrence="reference",
            convolution="reference",
            norm="reference",
            mixer="reference",
        )
    )
    assert backends.describe() == ALL_REFERENCE


def test_auto_takes_the_highest_rank_present():
    add("good", rank=1)
    add("better", rank=2)
    add("best", rank=3, missing="no such device")
    backends.select(KernelsConfig())
    assert run() == 2.0
    # the part's other function has the reference only
    assert backends.describe() == ALL_REFERENCE.replace("norm=reference", "norm=better+reference")


def test_a_backend_by_name():
    add("fused", rank=1)
    add("better", rank=2)
    backends.select(KernelsConfig(norm="fused"))
    assert run() == 1.0
    backends.select(KernelsConfig(norm="reference"))
    assert run() == 0.0


def test_unknown_and_missing_backends_are_named():
    with pytest.raises(ConfigError, match=r"^kernels.recurrence: there is no backend fla here; .*reference$"):
        backends.select(KernelsConfig(recurrence="fla"))
    add("fused", missing="no module named fused")
    with pytest.raises(ConfigError, match=r"^kernels.norm: fused cannot be used here \(no module named fused\)"):
        backends.select(KernelsConfig(norm="fused"))
    assert backends.describe() == ALL_REFERENCE


def test_use_restores_what_was():
    add("fused")
    with backends.use(norm="fused"):
        assert run() == 1.0
        with backends.use(norm="reference", mixer="reference"):
            assert run() == 0.0
        assert run() == 1.0
    assert run() == 0.0
    with pytest.raises(KeyError), backends.use(norm="fused"):
        raise KeyError
    with pytest.raises(ConfigError), backends.use(norm="absent"):
        pass
    assert run() == 0.0


def test_registering_twice_is_an_error():
    add("fused")
    with pytest.raises(ValueError, match="fused of rms_norm"):
        add("fused")


def test_what_a_backend_declines_depends_on_the_workload():
    small, large = (backends.Workload(load_model(name), "fp32") for name in ("tiny-gdn", "130m-gdn"))
    backends.register(
        "norm", "rms_norm", "narrow", lambda x, weight, eps: x + 5, missing=lambda: None, rank=5,
        declines=lambda work: "it is wide" if work is not None and work.model.hidden_size > 512 else None,
    )  # fmt: skip
    backends.select(KernelsConfig(), small)
    assert run() == 5.0
    backends.select(KernelsConfig(), large)
    assert run() == 0.0
    with pytest.raises(ConfigError, match=r"^kernels.norm: narrow cannot be used here \(it is wide\)"):
        backends.select(KernelsConfig(norm="narrow"), large)


def test_steps_of_a_mixer(monkeypatch):
    monkeypatch.setattr(backends, "_steps", {"reference": lambda work: None})
    backends.register_steps("fused", missing=lambda: None, declines=lambda work: None)
    backends.register_steps("better", missing=lambda: "no such device", declines=lambda work: None)
    work = backends.Workload(load_model("tiny-gdn"), "bf16")
    backends.select(KernelsConfig(mixer="fused"))
    assert backends.mixer_steps() == "fused"
    with pytest.raises(ConfigError, match=r"^kernels.mixer: better cannot be used here \(no such device\)"):
        backends.select(KernelsConfig(mixer="better"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^kernels.mixer: fused needs kernels.recurrence fla, not reference$"):
        backends.select(KernelsConfig(mixer="fused"), work)
    backends.select(KernelsConfig(), work)  # auto: its recurrence cannot take ready gates
    assert backends.mixer_steps() == "reference"
    assert backends.describe(work).endswith("mixer=reference")
