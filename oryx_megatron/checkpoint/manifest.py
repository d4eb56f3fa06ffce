"""manifest.json of a checkpoint: everything needed to understand, resume, reshard or convert it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform as python_platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from oryx_megatron.config import from_dict
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.errors import CheckpointError

FORMAT = 1
NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    iteration: int
    """Optimizer steps done."""
    consumed_samples: int
    """Samples read or passed over; with the seed, the whole state of the data loader."""
    config: dict[str, Any]
    """Resolved run config."""
    layout: dict[str, int]
    """Parallel sizes it was written under; it loads under any other."""
    rng: dict[str, Any]
    """How randomness continues. Every draw is a function of (seed, iteration, microbatch): there is no other state."""
    data: dict[str, Any]
    """Fingerprints of tokenizer and datasets."""
    evaluations: list[dict[str, Any]]
    """Latest evaluation results by validation set and plan."""
    versions: dict[str, str]
    """Package versions."""
    commit: str | None
    """git commit of the code, with `+changes` when files differed; None outside a repository."""
    files: dict[str, dict[str, Any]]
    """Size in bytes and sha256 of every other file of the checkpoint."""
    format: int = FORMAT
    guard: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Samples passed over after bad steps, and what the next steps are judged by (train/guard.py)."""

    def run(self) -> RunConfig:
        """The run config it was written by."""
        return from_dict(RunConfig, self.config)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into `folder`."""
    (folder / NAME).write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def read_manifest(folder: str | Path) -> Manifest:
    """Read manifest.json of a checkpoint.

    Raises:
        CheckpointError: not a checkpoint of this project, of another format, or damaged.
    """
    path = Path(folder) / NAME
    try:
        fields = json.loads(path.read_text())
        if fields["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {fields['format']}, but this version reads format {FORMAT}")
        return Manifest(**fields)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {NAME}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use another checkpoint") from None


def file_digest(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numerics."""
    names = (
        *("oryx-megatron", "torch", "megatron-core", "numpy", "transformer-engine", "flash-linear-attention"),
        *("mamba-ssm", "causal-conv1d", "flash-attn", "triton", "deepspeed"),
    )
    versions = {"python": python_platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
