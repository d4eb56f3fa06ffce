"""What ships with the package beside its code: configs, tokenizers, launch scripts, the commands of tools/.

In a checkout they are folders of the repository. In a wheel setup.py puts them inside the package.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

NAMED = ("configs", "tokenizers")
"""Folders whose files users name by path, as `tokenizers/stdlib-8k`."""


def folder(name: str) -> Path:
    """`configs`, `tokenizers`, `launch` or `tools` of this installation; it need not exist."""
    package = Path(str(importlib.resources.files("oryx_megatron")))
    beside = package.parent / name
    # A checkout has all of them beside the package; a folder of that name in site-packages is another's.
    return beside if (package.parent / "pyproject.toml").is_file() else package / name


def shipped(path: str | Path) -> Path:
    """`path` where it exists, and everywhere else what ships under that name, if anything does.

    So `tokenizers/stdlib-8k` and `configs/run/quickstart.yaml` mean the same in any working folder.
    """
    path = Path(path)
    if path.parts[:1] and path.parts[0] in NAMED and ".." not in path.parts and not path.exists():
        found = folder(path.parts[0]).joinpath(*path.parts[1:])
        return found if found.exists() else path
    return path
