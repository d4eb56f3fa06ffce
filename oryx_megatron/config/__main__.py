"""Print the reference of all fields of a run, which is docs/configuration.md.

oryx config > fields.md
"""

from __future__ import annotations

import sys

from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.config.reference import reference


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Print it."""
    Parser("oryx_megatron.config", description=__doc__).parse_args(argv)
    sys.stdout.write(reference())
    return 0


if __name__ == "__main__":
    sys.exit(main())
