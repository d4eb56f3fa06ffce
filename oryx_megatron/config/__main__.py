"""`python -m oryx_megatron.config`: print the reference of all fields, which is docs/configuration.md."""

from __future__ import annotations

import sys

from oryx_megatron.config.reference import reference


def main(argv: list[str] | None = None) -> int:
    """Print it, whatever the arguments."""
    sys.stdout.write(reference())
    return 0


if __name__ == "__main__":
    sys.exit(main())
