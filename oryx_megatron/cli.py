"""What every command line of the project shares: user errors become one line on stderr and exit code 2.

Under torchrun an error of config, data or checkpoint is the same on all ranks, so rank 0 alone prints it; one that only
a single rank can see carries `rank_local = True` and is printed there.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

from oryx_megatron.errors import OryxError


def main_guard(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a `main(argv=None)`: an OryxError is printed as `error: …` and gives 2, Ctrl-C gives 130."""

    @functools.wraps(main)
    def guarded(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except OryxError as error:
            rank = os.environ.get("RANK", "0")
            if rank == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            elif getattr(error, "rank_local", False):
                print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130

    return guarded
