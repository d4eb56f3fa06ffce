"""Print the reference of all fields of a run, which is docs/configuration.md; or a config that ships with the package.

    oryx config > fields.md
    oryx config configs/run/pretrain-1.4b-gdn.yaml > mine.yaml

A config that is not in the working folder is taken from the package by every command.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.config.reference import reference
from oryx_megatron.errors import ConfigError
from oryx_megatron.resources import folder


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Print it."""
    parser = Parser("oryx_megatron.config", description=__doc__)
    parser.add_argument("file", nargs="?", help="print this one as it ships: configs/run/…, configs/model/…")
    arguments = parser.parse_args(argv)
    sys.stdout.write(reference() if arguments.file is None else _shipped(arguments.file))
    return 0


def _shipped(name: str) -> str:
    """Text of a config of this installation, whatever is in the working folder."""
    root = folder("configs")
    known = sorted(f"configs/{path.relative_to(root).as_posix()}" for path in root.rglob("*") if path.is_file())
    name = Path(name).as_posix()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1) or ["configs/run/own-text.yaml"]
        raise ConfigError(f"{name} is none of the configs that ship with the package; {near[0]} is one")
    return (root.parent / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
