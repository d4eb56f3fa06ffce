"""What a checkpoint holds, from its metadata alone: no model is built and no tensor read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from oryx_megatron.checkpoint.average import PREFIX as AVERAGE
from oryx_megatron.checkpoint.manifest import NAME, Manifest, read_manifest
from oryx_megatron.checkpoint.safe import METADATA, read_metadata
from oryx_megatron.checkpoint.store import check_files, check_format
from oryx_megatron.errors import CheckpointError
from oryx_megatron.storage import named

OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, whole, however many ranks wrote it."""

    name: str
    """Dotted; layers are stacked along the first dimension, fused weights split into their parts."""
    shape: tuple[int, ...]
    dtype: str
    """As torch prints it, without `torch.`"""
    shards: int
    """Pieces it was written in."""
    bytes: int

    @property
    def part(self) -> str:
        """`model`, `ema` (its average), or the kind of optimizer state, e.g. `optimizer.exp_avg`."""
        names = self.name.split(".")
        if self.name.startswith(AVERAGE):
            return names[0]
        if names[0] != OPTIMIZER:
            return "model"
        return f"{OPTIMIZER}.{names[2]}" if names[1] == "state" else OPTIMIZER

    @property
    def elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Summary:
    """A checkpoint as its manifest and metadata describe it."""

    folder: Path
    manifest: Manifest
    entries: tuple[Entry, ...]
    file_bytes: int
    """On disk, manifest included."""

    def parts(self) -> dict[str, tuple[int, int, int]]:
        """Tensors, elements and bytes by part."""
        sums: dict[str, tuple[int, int, int]] = {}
        for entry in self.entries:
            count, elements, size = sums.get(entry.part, (0, 0, 0))
            sums[entry.part] = (count + 1, elements + entry.elements, size + entry.bytes)
        return dict(sorted(sums.items()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        manifest = self.manifest
        return {
            "folder": named(self.folder),
            "iteration": manifest.iteration,
            "consumed_samples": manifest.consumed_samples,
            "layout": manifest.layout,
            "config": manifest.config,
            "versions": manifest.versions,
            "commit": manifest.commit,
            "evaluations": manifest.evaluations,
            "file_bytes": self.file_bytes,
            "files": manifest.files,
            "parts": {part: dict(zip(("tensors", "elements", "bytes"), sums)) for part, sums in self.parts().items()},
            "tensors": {
                entry.name: {"shape": entry.shape, "dtype": entry.dtype, "shards": entry.shards, "bytes": entry.bytes}
                for entry in self.entries
            },
        }


def summarize(folder: str | Path, *, partial: bool = False) -> Summary:
    """Read manifest and metadata of a checkpoint.

    Args:
        folder: Of the checkpoint.
        partial: Whether it is a copy that need not hold all files.

    Raises:
        CheckpointError: no checkpoint, damaged, or written by another engine.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_format(folder)
    try:
        sizes = {name: facts["bytes"] for name, facts in manifest.files.items()} if partial else None
        stored = read_metadata(folder, sizes).state_dict_metadata
        check_files(folder, manifest, (METADATA,))
        size = sum(
            # Of a checkpoint on object storage only some files are copied; those there have their sizes.
            manifest.files[name]["bytes"]
            if partial and not (folder / name).exists()
            else (folder / name).stat().st_size
            for name in (*manifest.files, NAME)
        )
    except OSError as error:
        raise CheckpointError(f"{folder} is damaged ({error}); use another checkpoint") from None
    return Summary(folder, manifest, tuple(sorted(_entries(stored), key=lambda entry: entry.name)), size)


def _entries(stored: dict[str, Any]) -> Iterator[Entry]:
    for name, value in stored.items():
        # The rest are small objects, such as the FP8 state that a linear layer has or has not.
        if isinstance(value, TensorStorageMetadata):
            dtype = value.properties.dtype
            shape = tuple(value.size)
            yield Entry(name, shape, str(dtype).removeprefix("torch."), len(value.chunks),
                        math.prod(shape) * dtype.itemsize)  # fmt: skip


def tree(entries: tuple[Entry, ...], *, depth: int | None = None) -> list[tuple[int, str, list[Entry]]]:
    """Lines of a tree of dotted names: (level, name, entries under it); an only child is joined to its parent.

    With `depth`, what lies deeper is summed in its ancestor at that level.
    """
    lines: list[tuple[int, str, list[Entry]]] = []

    def visit(level: int, prefix: int, label: str, group: list[Entry]) -> None:
        children: dict[str, list[Entry]] = {}
        for entry in group:
            names = entry.name.split(".")
            children.setdefault(names[prefix] if prefix < len(names) else "", []).append(entry)
        if len(group) == 1:
            label = ".".join([*([label] if label else []), *group[0].name.split(".")[prefix:]])
        elif len(children) == 1:
            (name,) = children
            visit(level, prefix + 1, f"{label}.{name}" if label else name, group)
            return
        if label:
            lines.append((level, label, group))
            level += 1
        if len(group) > 1 and (depth is None or level < depth):
            for name, child in children.items():
                visit(level, prefix + 1, name or "(itself)", child)

    if entries:
        visit(0, 0, "", list(entries))
    return lines
