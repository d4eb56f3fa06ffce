"""Exports on object storage: made on this machine, then copied; config.json comes last, as nothing loads without."""

from __future__ import annotations

import json
from pathlib import Path

from oryx_megatron.data.files import LISTING
from oryx_megatron.errors import ConversionError
from oryx_megatron.storage import Remote

MARKER = "config.json"


def check_free(remote: Remote, *, overwrite: bool) -> None:
    """Raise ConversionError for a place that holds anything but, with `overwrite`, an export as it was written."""
    files = remote.files()
    if not files:
        return
    if not overwrite:
        raise ConversionError(f"{remote} exists already; choose another name or pass --overwrite")
    listed = _listed(remote) if LISTING in files else {}
    for name, size in files.items():
        if name != LISTING and (name not in listed or listed[name] != size):
            raise ConversionError(f"{remote} holds {name}, which this command did not write; choose another name")


def publish(folder: Path, remote: Remote) -> None:
    """Copy an export there, in place of an earlier one."""
    old = remote.files()
    (remote / MARKER).remove()
    new = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for name, path in new.items():
        if name != MARKER:
            (remote / name).upload(path)
    for name in old.keys() - new.keys():
        (remote / name).remove()
    (remote / MARKER).upload(new[MARKER])


def _listed(remote: Remote) -> dict[str, int]:
    try:
        return {name: facts[1] for name, facts in json.loads((remote / LISTING).read() or b"")["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, LookupError):
        return {}
