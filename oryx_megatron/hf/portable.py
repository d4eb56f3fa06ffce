"""The manifest of an export names no folder of the machine that wrote it."""

from __future__ import annotations

import dataclasses
from pathlib import PurePosixPath
from typing import Any

from oryx_megatron.checkpoint import Manifest
from oryx_megatron.config import map_paths, to_dict
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.paths import is_url


def portable(manifest: Manifest) -> Manifest:
    """A manifest whose absolute paths are as much of their ends as tells them apart: /data/web/train becomes train.

    Raises:
        CheckpointError: its config cannot be read.
    """
    found: dict[str, None] = {}  # a set in order

    def collect(path: str, name: str, urls: object) -> str:
        if _is_absolute(path):
            found[path] = None
        return path

    run = map_paths(manifest.run(), collect)
    for value in (manifest.data.get("train"), manifest.init_from):
        _walk(value, lambda text: collect(text, "", False))
    short = _ends(list(found))
    return dataclasses.replace(
        manifest,
        config=to_dict(map_paths(run, lambda path, name, urls: short.get(path, path))),
        data=manifest.data | {"train": _walk(manifest.data.get("train"), lambda text: short.get(text, text))},
        init_from=_walk(manifest.init_from, lambda text: short.get(text, text)),
    )


def train_alike(run: RunConfig, other: RunConfig) -> bool:
    """Whether two configs are of one run, wherever its folders lie; a license may be given at the export."""

    def plain(config: RunConfig) -> RunConfig:
        config = dataclasses.replace(config, license=None, output_dir="")
        return map_paths(config, lambda path, name, urls: PurePosixPath(path).name)

    return plain(run) == plain(other)


def _is_absolute(text: str) -> bool:
    return text.startswith("/") or is_url(text)


def _ends(paths: list[str]) -> dict[str, str]:
    """Path → its last part, or as many of its last parts as no other path ends with."""
    parts = {path: PurePosixPath(path.removeprefix("file://")).parts[1:] or ("root",) for path in paths}
    lengths = dict.fromkeys(paths, 1)
    while True:
        ends = {path: "/".join(parts[path][-lengths[path] :]) for path in paths}
        alike = [path for path in paths if list(ends.values()).count(ends[path]) > 1]
        longer = [path for path in alike if lengths[path] < len(parts[path])]
        if not longer:
            return ends
        for path in longer:
            lengths[path] += 1


def _walk(value: Any, change: Any) -> Any:
    """`value` of JSON with `change` made to every text and key in it."""
    if isinstance(value, dict):
        return {change(key): _walk(entry, change) for key, entry in value.items()}
    if isinstance(value, list):
        return [_walk(entry, change) for entry in value]
    return change(value) if isinstance(value, str) else value
