"""The doctor names what is wrong and how to fix it; what is merely absent is not wrong."""

import json
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from oryx_megatron import doctor, platform
from oryx_megatron.doctor import Finding, Package

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize(("written", "writable"), [(True, True), (False, True), (False, False)])
def test_modules_that_are_compiled_at_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bool, writable: bool
):
    module = tmp_path / "tilelang.py"
    module.write_text("")
    monkeypatch.delitem(sys.modules, "tilelang", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(platform, "installed", lambda package: package == "tilelang")
    monkeypatch.setattr(doctor, "_may_write", lambda path: writable)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    if written:
        py_compile.compile(str(module))
    finding = doctor._bytecode()
    assert (finding is None) == written
    if finding is not None:
        assert (finding.state, finding.found) == ("other", "none of tilelang")
        assert "unset PYTHONDONTWRITEBYTECODE" in finding.advice
        assert ("PYTHONPYCACHEPREFIX" in finding.advice) != writable
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    finding = doctor._bytecode()
    assert (finding is None) == (written or writable)
    if finding is not None:
        assert "PYTHONPYCACHEPREFIX" in finding.advice
        assert "PYTHONDONTWRITEBYTECODE" not in finding.advice


def test_a_file_may_be_made_where_its_nearest_folder_takes_one(tmp_path: Path):
    assert doctor._may_write(tmp_path / "__pycache__" / "module.pyc")


def test_the_other_apex(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "installed", {"apex"}.__contains__)
    finding = doctor._apex()
    assert finding is not None
    assert "pip uninstall apex" in finding.advice


def test_lines_fit_a_terminal():
    text = doctor.show(Finding("wrong", "flash-linear-attention", "0.6.0", "word " * 60))
    assert max(map(len, text.splitlines())) < 80
    assert text.startswith("WRONG flash-linear-attention")


def without_packages(*command: str, path: str = "") -> subprocess.CompletedProcess:
    """`python -m` in a Python with nothing installed."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "NVIDIA_PYTORCH_VERSION")
    }
    environment["PATH"] = f"{path}:{environment['PATH']}"
    command = (sys.executable, "-S", "-m", *command)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("command", [("oryx_megatron.doctor",), ("oryx_megatron", "doctor")])
@pytest.mark.parametrize("driver", [False, True])
def test_works_without_torch(tmp_path: Path, command: tuple[str, ...], driver: bool):
    """What is missing is listed, with the set of this kind of machine; nothing is imported in vain."""
    if not driver and doctor._has_driver():
        pytest.skip("a driver is here")
    if driver:
        (tmp_path / "nvidia-smi").touch(mode=0o755)
    done = without_packages(*command, path=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "wrong: torch, megatron-core, sentencepiece, tokenizers\n" in done.stdout
    assert "kernels, gdn" not in done.stdout
    text, name = " ".join(done.stdout.split()), "cuda13.txt" if driver else "requirements.txt"
    assert f"torch not installed; pip install -c {name} torch: everything" in text
    assert f"that file is {'configs/install/' if driver else ''}{name}" in text
    assert ("an NVIDIA driver is here" in text) == driver


def test_other_commands_without_packages_say_so():
    """But help and version need none."""
    done = without_packages("oryx_megatron", "train", "run.yaml")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "is not the environment of oryx_megatron: it lacks torch, " in done.stderr
    for option in ("--help", "--version"):
        done = without_packages("oryx_megatron", option)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("ngc", [False, True])
def test_compares_with_the_tested_set(monkeypatch: pytest.MonkeyPatch, ngc: bool):
    """On a GPU machine with the set of its kind; the build of a version does not count."""
    monkeypatch.setattr(doctor, "_has_gpu", lambda: True)
    monkeypatch.delenv("NVIDIA_PYTORCH_VERSION", raising=False)
    if ngc:
        monkeypatch.setenv("NVIDIA_PYTORCH_VERSION", "26.02")
    versions = {"torch": "2.11.0+cu130", "transformer-engine": "2.11.0", "tilelang": "0.1.15", "fla-core": "0.5.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    finding = doctor._tested()
    assert finding.state == "other"
    assert "fla-core 0.5.0 (tested: 0.6.0)" in finding.advice
    assert ("transformer-engine 2.11.0 (tested: 2.20.2)" in finding.advice) is not ngc
    assert "torch" not in finding.advice.replace("pytorch", "")
    assert finding.found.startswith("ngc.txt: 1 of the 2" if ngc else "cuda13.txt: 2 of the 4")
    monkeypatch.setattr(doctor, "_version", {"tilelang": "0.1.15"}.get)
    assert doctor._tested().state == "ok"
