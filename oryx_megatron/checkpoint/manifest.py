"""manifest.json of a checkpoint: everything needed to understand, resume, reshard or convert it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform as python_platform
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from oryx_megatron.config import from_dict
from oryx_megatron.config.batch_sizes import SampleCount, planned
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.errors import CheckpointError, ClosedCheckpointError, ConfigError, NewerCheckpointError
from oryx_megatron.reading import parse_json, read_text

FORMAT = 1
NAME = "manifest.json"
PREFIX = "iteration_"
"""Of a checkpoint's folder, before the iteration."""
OWN_FILES = (NAME, ".metadata", "metadata.json", "common.pt", "__*_*.distcp", "*_model_states.pt", "*_optim_states.pt")
"""Of a checkpoint of either engine, where its manifest no longer says so."""
LARGEST = 1 << 28
"""Bytes of a manifest: some hundred thousand files."""
Digests = dict[str, dict[str, Any]]
"""Size (`bytes`) and `sha256` of files, by name: what `file_digest` gives for each."""
CHECKSUM = "checksum"
"""Key of the sha256 of all other keys and values, as `_checksum` makes it. The first version wrote none."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    iteration: int
    """Optimizer steps done."""
    consumed_samples: int
    """Samples read or skipped; with the seed, the whole state of the data loader."""
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
    files: Digests
    """Size in bytes and sha256 of every other file of the checkpoint."""
    format: int = FORMAT
    guard: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Samples skipped after bad steps, and what the next steps are judged by (train/guard.py)."""
    init_from: dict[str, Any] | None = None
    """What the run started from: path, iteration and sha256 of its manifest, and what was loaded from it."""
    origin: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    """Iteration and samples from which `consumed_samples` is counted (config/batch_sizes.py)."""
    batch_sizes: list[list[int]] = dataclasses.field(default_factory=list)
    """[iteration, samples per step from there on] of the whole run; empty: as the config says (earlier versions)."""

    def count(self) -> SampleCount:
        """Samples by iteration, as the run that wrote it had them; CheckpointError when its config cannot be read."""
        return SampleCount.read(self.batch_sizes or planned(self.run().train), *self.origin)

    def run(self) -> RunConfig:
        """The run config it was written by.

        Raises:
            CheckpointError: this version cannot read it.
        """
        try:
            return from_dict(RunConfig, self.config)
        except ConfigError as error:
            raise CheckpointError(
                f"the config in {NAME} of iteration {self.iteration} cannot be read: {error}"
            ) from None

    @property
    def tokenizer(self) -> dict[str, Any]:
        """What it says of the tokenizer: name, fingerprint, eod and more; CheckpointError when it does not."""
        found = self.data.get("tokenizer")
        kinds = {"name": str, "fingerprint": str, "eod": int}
        if not isinstance(found, dict) or any(type(found.get(name)) is not kind for name, kind in kinds.items()):
            raise CheckpointError(f"{NAME} of iteration {self.iteration} says nothing of its tokenizer; use another")
        return found

    @property
    def trained_on(self) -> dict[str, Any] | None:
        """State of the training data; None: a conversion, which read none. CheckpointError when it does not say."""
        found = self.data.get("train", False)
        if found is not None and not isinstance(found, dict):
            raise CheckpointError(f"{NAME} of iteration {self.iteration} says nothing of its data; use another")
        return found


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint."""
    return name.startswith(PREFIX) and name.removeprefix(PREFIX).isdecimal()


def iteration_of(folder: Path) -> int:
    """Iteration in a checkpoint's folder name."""
    return int(folder.name.removeprefix(PREFIX))


def age_of(name: str) -> tuple[int, int]:
    """Sorts names of checkpoints, oldest first: by iteration; of one iteration a longer name is the newer one."""
    return int(name.removeprefix(PREFIX)), len(name)


def next_name(iteration: int, taken: Collection[str]) -> str:
    """Name for a checkpoint beside those of the same iteration in `taken`: with more zeros, so that it is the newer."""
    digits = max((len(name) - len(PREFIX) + 1 for name in taken), default=7)
    return f"{PREFIX}{iteration:0{max(digits, 7)}d}"


MakeManifest = Callable[[Digests], Manifest]
"""Makes the manifest of a checkpoint from the digests of its files, once all are written."""


def lowest(manifests: Mapping[str, Manifest], best: str) -> str | None:
    """Of checkpoints by name, the one with the lowest loss at its iteration; of equal ones the newest.

    `best` is `SET/PLAN`, or `ema/SET/PLAN` for the loss of the averaged weights.
    """
    found = [
        (loss, -manifest.iteration, name)
        for name, manifest in manifests.items()
        for result in manifest.evaluations
        for prefix, kind in (("", "loss"), ("ema/", "ema_loss"))
        if f"{prefix}{result['dataset']}/{result['plan']}" == best
        and result["iteration"] == manifest.iteration
        and (loss := result.get(kind)) is not None
        and math.isfinite(loss)
    ]
    return min(found)[2] if found else None


def write_manifest(folder: Path, manifest: Manifest, name: str = NAME) -> None:
    """Write manifest.json into `folder`, with its checksum."""
    fields = json.loads(json.dumps(dataclasses.asdict(manifest)))  # as it will be read: no tuples
    (folder / name).write_text(json.dumps(fields | {CHECKSUM: _checksum(fields)}, indent=1) + "\n")


def read_manifest(folder: str | Path, name: str = NAME) -> Manifest:
    """Read manifest.json of a checkpoint, or what a conversion calls it.

    Raises:
        NewerCheckpointError: of a format that this version does not know.
        ClosedCheckpointError: this user may not read it.
        CheckpointError: not a checkpoint of this project, or damaged.
    """
    path = Path(folder) / name
    try:
        fields = parse_json(read_text(path, LARGEST))
        if not isinstance(fields, dict):
            raise ValueError(f"it holds a JSON {type(fields).__name__}, not an object")
        if type(written := fields["format"]) is int and written > FORMAT:
            raise NewerCheckpointError(
                f"{path}: format {written} is of a newer version, this one reads format {FORMAT}; update oryx_megatron "
                "or choose another output_dir"
            )
        if (checksum := fields.pop(CHECKSUM, None)) is not None and checksum != _checksum(fields):
            raise ValueError("its checksum does not fit its content")
        manifest = Manifest(**fields)
        _check(manifest)
        return manifest
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {name}") from None
    except PermissionError as error:
        raise ClosedCheckpointError(f"{path}: {error.strerror}; allow reading it") from None
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged (it has no key {error}); use another checkpoint") from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use another checkpoint") from None


def _checksum(fields: dict[str, Any]) -> str:
    """sha256 of the fields in an order and a spelling of their own, so that a file may be formatted differently."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check(manifest: Manifest) -> None:
    """Raise ValueError for a field of the wrong type, or the name of a file that is elsewhere."""
    for name, kind in typing.get_type_hints(Manifest).items():
        if not _fits(getattr(manifest, name), kind):
            raise ValueError(f"{name} is not of type {kind}")
    for name, file in manifest.files.items():
        if name != Path(name).name or type(file.get("bytes")) is not int or not isinstance(file.get("sha256"), str):
            raise ValueError(f"files has a wrong entry for {name!r}")
    for result in manifest.evaluations:
        texts, numbers = ("dataset", "plan"), ("iteration", "loss", "perplexity", "bits_per_byte")
        if (
            not all(_fits(result.get(name), str) for name in texts)
            or not all(_fits(result.get(name), int | float) for name in numbers)
            or not _fits(result.get("ema_loss", 0.0), int | float)
        ):
            raise ValueError("evaluations has a wrong entry")
    if len(manifest.origin) != 2:
        raise ValueError("origin is not an iteration and a number of samples")
    starts = [piece[0] for piece in manifest.batch_sizes if len(piece) == 2 and piece[1] > 0]
    if len(starts) < len(manifest.batch_sizes) or starts != sorted(set(starts)) or starts[:1] not in ([], [0]):
        raise ValueError("batch_sizes are not iterations, ascending from 0, each with a number of samples")
    if manifest.format != FORMAT or manifest.iteration < 0 or manifest.consumed_samples < 0:
        raise ValueError("format, iteration or consumed_samples is out of range")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value that was read as JSON is of a type."""
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(entry, parts[1]) for entry in value.values())
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, parts[0]) for entry in value)
    return kind is Any or type(value) is kind


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
