"""The doctor names what is wrong and how to fix it; what is merely absent is not wrong."""

import json
from pathlib import Path

import pytest

from oryx_megatron import doctor, platform
from oryx_megatron.doctor import Finding, Package


def test_this_machine_is_fine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    few = [package for package in doctor.PACKAGES if package.distribution in ("sentencepiece", "gigatoken")]
    monkeypatch.setattr(doctor, "PACKAGES", few)
    assert doctor.main(["--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["sentencepiece"]["state"] == findings["gigatoken"]["state"] == "ok"
    assert "recurrence=" in findings["kernels, gdn"]["found"]


def test_something_wrong_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(doctor, "PACKAGES", [Package("nosuchthing", "nosuchthing", "everything", required=True)])
    assert doctor.main([]) == 1
    assert "wrong: nosuchthing" in capsys.readouterr().out


def test_package_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "brokenpackage.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor._package(Package("brokenpackage", "brokenpackage", "nothing", gpu=False))
    assert finding.state == "wrong"
    assert "undefined symbol: _ZN3c10" in finding.advice
    assert "install" in finding.advice


def test_absent_packages():
    optional = doctor._package(Package("nosuchthing", "nosuchthing", "speed"))
    assert (optional.state, optional.advice) == ("absent", "optional: provides speed")
    required = doctor._package(Package("nosuchthing", "nosuchthing", "everything", required=True))
    assert required.state == "wrong"
    assert "pip install nosuchthing" in required.advice


@pytest.mark.parametrize(
    ("versions", "packages", "wrong"),
    [
        ({"triton": (3, 6, 0)}, {"fla"}, True),
        ({"triton": (3, 7, 1)}, {"fla"}, False),
        ({"triton": (3, 6, 0)}, {"fla", "flash_qla", "tilelang"}, False),
        ({"triton": (3, 6, 0)}, set(), False),
    ],
)
def test_triton_with_wrong_gradients(monkeypatch: pytest.MonkeyPatch, versions, packages, wrong):
    monkeypatch.setattr(platform.gpu, "capability", lambda: (9, 0))
    monkeypatch.setattr(platform.gpu, "installed", packages.__contains__)
    monkeypatch.setattr(platform, "installed", packages.__contains__)
    monkeypatch.setattr(platform.gpu, "version", lambda name: versions.get(name, ()))
    monkeypatch.setattr(platform, "version", lambda name: versions.get(name, ()))
    finding = doctor._triton()
    assert (finding is not None) == wrong
    if finding is not None:
        assert "Triton 3.6.0" in finding.advice
        assert "tilelang" in finding.advice


def test_the_other_apex(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "installed", {"apex"}.__contains__)
    finding = doctor._apex()
    assert finding is not None
    assert "pip uninstall apex" in finding.advice


def test_lines_fit_a_terminal():
    text = doctor.show(Finding("wrong", "flash-linear-attention", "0.6.0", "word " * 60))
    assert max(map(len, text.splitlines())) < 80
    assert text.startswith("WRONG flash-linear-attention")
