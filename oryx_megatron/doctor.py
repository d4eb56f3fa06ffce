"""`oryx doctor`: what this machine has for training, what is wrong with it, and how to fix it.

    oryx doctor
    oryx doctor --json

Exit code 0 when a run can start here, 1 when something is wrong. A missing optional package is not wrong: the line says
what it provides.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform as host
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from oryx_megatron import display, environment, platform, resources
from oryx_megatron.cli import Parser, main_guard

State = Literal["ok", "absent", "other", "wrong"]
"""`other`: works, but is not what was tested."""
IMPORT_SECONDS = 180
"""Longest that one package may take to import; TransformerEngine takes half a minute on a cold disk."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: State
    name: str
    found: str
    """Version, or what is there."""
    advice: str = ""
    """What it provides when absent; what is wrong and how to fix it when wrong."""


@dataclass(frozen=True)
class Package:
    """A package that a run uses."""

    distribution: str
    module: str
    provides: str
    gpu: bool = True
    """Of no use without a GPU."""
    required: bool = False


PACKAGES = (
    Package("torch", "torch", "everything", gpu=False, required=True),
    Package("megatron-core", "megatron.core", "parallelism, optimizer, checkpoints", gpu=False, required=True),
    Package("sentencepiece", "sentencepiece", "tokenizers", gpu=False, required=True),
    Package("tokenizers", "tokenizers", "tokenizers", gpu=False, required=True),
    Package("transformers", "transformers", "conversion to Hugging Face", gpu=False),
    Package("gigatoken", "gigatoken", "preprocessing ten times as fast", gpu=False),
    Package("transformer-engine", "transformer_engine.pytorch", "FP8, fused linears and norms"),
    Package("flash-attn-4", "flash_attn.cute", "attention in proportion to the attention-mode tokens"),
    Package("flash-linear-attention", "fla", "the gated delta rule (mixer: gdn)"),
    Package("flash-qla", "flash_qla", "FLA's fast Hopper backend, heads of 128"),
    Package("tilelang", "tilelang", "what flash-qla is written in; right FLA gradients on Hopper"),
    Package("mamba-ssm", "mamba_ssm", "an SSD scan besides our Triton one (mixer: mamba2)"),
    Package("causal-conv1d", "causal_conv1d", "convolutions where the mixer is not fused"),
    Package("deepspeed", "deepspeed", "engine: deepspeed", gpu=False),
    Package("apex", "apex", "gradient accumulation fusion without TransformerEngine"),
)


def examine() -> Iterator[Finding]:
    """All findings, as they come; imports happen in processes of their own, so that a broken package ends none of ours.

    What the kernels compute is not checked here: `pytest tests/gpu` compares each with its reference.
    """
    yield from _machine()
    required = set()
    for package in PACKAGES:
        found = _package(package)
        yield found
        required |= {found.state} if package.required else set()
    yield _tested()
    for check in (_torch_and_driver, _triton, _apex, _bytecode, _shared_memory):
        if (finding := check()) is not None:
            yield finding
    if "wrong" not in required:  # nothing computes without them
        yield from _kernels()


def _has_gpu() -> bool:
    """Whether torch sees a GPU; False without a torch that loads."""
    return _torch_loads() and platform.has_gpu()


@functools.cache
def _torch_loads() -> bool:
    return platform.installed("torch") and _import_error("torch") is None


def _has_driver() -> bool:
    """Whether this machine serves NVIDIA GPUs, whatever is installed."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def tested_set() -> Path:
    """Constraints of the supported set that this machine belongs to; of a machine without a GPU requirements.txt."""
    if os.environ.get("NVIDIA_PYTORCH_VERSION"):
        return resources.folder("configs") / "install" / "ngc.txt"
    if _has_gpu() or (_has_driver() and not _torch_loads()):
        return resources.folder("configs") / "install" / "cuda13.txt"
    return resources.folder("configs").parent / "requirements.txt"


_PIN = re.compile(r"^([\w.-]+)==([^\s#;]+)(?:\s*;\s*python_version\s*(<|>=)\s*[\"']3\.(\d+)[\"'])?", re.MULTILINE)


def pins(path: Path) -> dict[str, str]:
    """Exact versions that a file of requirements or constraints asks of this Python."""
    found = {}
    for name, version, than, minor in _PIN.findall(path.read_text(encoding="utf-8")):
        if not than or (sys.version_info[1] < int(minor)) == (than == "<"):
            found[name] = version
    return found


def _tested() -> Finding:
    """Versions beside those that were tested together."""
    path = tested_set()
    if not path.is_file():
        return Finding("ok", "tested set", "none for this machine: a checkout's requirements.txt has the CPU's")
    pinned = pins(path)
    found = {name: _version(name) for name in pinned}
    # What follows a `+` is the build, as 2.11.0+cu130.
    others = [
        f"{name} {version} (tested: {pinned[name]})"
        for name, version in found.items()
        if version is not None and version.partition("+")[0] != pinned[name]
    ]
    count = sum(version is not None for version in found.values())
    text = f"{path.name}: {count - len(others)} of the {count} packages here as tested"
    where = "" if _torch_loads() else f"that file is {display.shown(os.path.relpath(path))}"
    return Finding("other" if others else "ok", "tested set", text, ", ".join(filter(None, [*others, where])))


def _version(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Iterator[Finding]:
    version = sys.version_info
    state: State = "ok" if version >= (3, 11) else "wrong"
    yield Finding(state, "python", host.python_version(), "" if state == "ok" else "needs Python 3.11 or later")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding("ok", "machine", f"{host.node()}, {os.cpu_count()} cores, {memory:.0f} GiB")
    if not _torch_loads() and _has_driver():
        yield Finding("absent", "gpu", "an NVIDIA driver is here", "torch, which sees the GPUs, is not installed")
        return
    if not _has_gpu():
        yield Finding("absent", "gpu", "none", "runs on the CPU: reference kernels, gloo")
        return
    for name, count in platform.gpu_names().items():
        yield Finding("ok", "gpu", f"{count} × {name}")


def _package(package: Package) -> Finding:
    name = package.distribution
    if not (platform.installed(package.module) and (not package.required or environment.found(package.module))):
        state: State = "wrong" if package.required else "absent"
        advice = (
            f"{_install(name)}: {package.provides}" if package.required else f"optional: provides {package.provides}"
        )
        return Finding(state, name, "not installed", advice)
    version = _version(name) or "installed, version unknown"
    if package.gpu and not _has_gpu():
        return Finding("ok", name, version, "not tried: there is no GPU")
    # GPU packages link against torch's libraries, and some expect to find them loaded.
    if error := _import_error(f"torch, {package.module}" if package.gpu else package.module):
        return Finding("wrong", name, version, f"import fails: {error}; install a build for this torch and Python")
    return Finding("ok", name, version)


def _install(name: str) -> str:
    """The command that installs a package in its tested version; the NGC image brings its own torch."""
    path = tested_set()
    return f"pip install -c {path.name} {name}" if path.is_file() and name in pins(path) else f"pip install {name}"


def _import_error(modules: str) -> str | None:
    """The last line of what importing prints when it fails, or None."""
    command = [sys.executable, "-W", "ignore", "-c", f"import {modules}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def _torch_and_driver() -> Finding | None:
    if _has_gpu():
        return Finding("ok", "cuda", platform.cuda_versions())
    if not _torch_loads():
        return None  # told above
    if _has_driver():
        return Finding(
            "wrong", "cuda", platform.cuda_versions(),
            "there is an NVIDIA driver, but this torch sees no GPU: install a torch built for CUDA, no newer than the "
            "driver (nvidia-smi shows its version), and look at CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    return None


def _triton() -> Finding | None:
    if platform.installed("fla") and (reason := platform.wrong_triton_for_fla(flash_qla_serves=True)):
        return Finding("wrong", "triton", ".".join(map(str, platform.version("triton"))), reason)
    return None


def _apex() -> Finding | None:
    if platform.installed("apex") and not platform.installed("apex.normalization"):
        advice = "this is not NVIDIA's apex: pip uninstall apex (docs/install-gpu.md says how to build the right one)"
        return Finding("wrong", "apex", "another project of that name", advice)
    return None


def _bytecode() -> Finding | None:
    """Packages whose modules Python compiles again at every start, on every rank: 10 to 20 s of a training command."""
    slow: dict[str, Path] = {}
    for name in ("torch", "transformer_engine", "tilelang", "flash_attn"):
        spec = importlib.util.find_spec(name) if platform.installed(name) else None
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        cached = Path(importlib.util.cache_from_source(spec.origin))
        if not cached.is_file() and (sys.dont_write_bytecode or not _may_write(cached)):
            slow[name] = cached
    if not slow:
        return None
    advice = ["unset PYTHONDONTWRITEBYTECODE"] if sys.dont_write_bytecode else []
    if not all(map(_may_write, slow.values())):
        advice.append("set PYTHONPYCACHEPREFIX to a folder on this machine's disk")
    found = f"none of {', '.join(slow)}"
    return Finding("other", "bytecode", found, f"Python compiles their modules at every start: {' and '.join(advice)}")


def _may_write(path: Path) -> bool:
    """Whether the file could be made here, with the folders that are missing."""
    return os.access(next(folder for folder in path.parents if folder.is_dir()), os.W_OK)


def _shared_memory() -> Finding | None:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return None
    free = shutil.disk_usage(folder).free / 2**30
    if free < 1:
        advice = "loader processes and NCCL need more: start the container with --shm-size or --ipc=host"
        return Finding("wrong", "/dev/shm", f"{free:.2f} GiB free", advice)
    return Finding("ok", "/dev/shm", f"{free:.0f} GiB free")


def _kernels() -> Iterator[Finding]:
    """What `kernels: auto` takes for each recurrence."""
    from oryx_megatron.config import load_model
    from oryx_megatron.config.schema import KernelsConfig
    from oryx_megatron.ops import backends

    dtype = "bf16" if _has_gpu() else "fp32"
    for mixer in ("gdn", "mamba2"):
        work = backends.Workload(load_model(f"1.4b-{mixer}"), dtype)
        backends.select(KernelsConfig(), work)
        slow = _has_gpu() and "reference" in (backends.selected("attend"), backends.mixer_steps())
        advice = "plain torch takes part: install what is absent above" if slow else ""
        yield Finding("ok", f"kernels, {mixer}", backends.describe(work), advice)


MARKS = {"ok": "ok", "absent": "-", "other": "other", "wrong": "WRONG"}


def show(finding: Finding) -> str:
    """A finding on lines of at most 79 columns."""
    head = f"{MARKS[finding.state]:<6}{finding.name:<24}"
    text = finding.found if not finding.advice else f"{finding.found}; {finding.advice}"
    return textwrap.fill(
        text, 79, initial_indent=head, subsequent_indent=" " * 30, break_on_hyphens=False, break_long_words=False
    )


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Print the findings; see --help."""
    parser = Parser("oryx_megatron.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    arguments = parser.parse_args(argv)
    findings = []
    for finding in examine():
        findings.append(finding)
        if not arguments.json:
            sys.stdout.write(show(finding) + "\n")
            sys.stdout.flush()
    wrong = [finding.name for finding in findings if finding.state == "wrong"]
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    else:
        sys.stdout.write(f"\nwrong: {', '.join(wrong)}\n" if wrong else "\nnothing is wrong: a run can start here\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
