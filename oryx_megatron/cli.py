"""What every command line of the project shares: user errors become one line on stderr and exit code 2; its --help.

Under torchrun an error of config, data or checkpoint is the same on all ranks, so rank 0 alone prints it; one that only
a single rank can see carries `rank_local = True` and is printed there.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from oryx_megatron.display import shown
from oryx_megatron.errors import ConfigError, OryxError, first_line

PATIENCE = 10.0
"""Seconds that a rank waits under torchrun for rank 0 to tell their common error and to end."""


def main_guard(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a `main(argv=None)`: an OryxError is printed as `error: …` and gives 2, Ctrl-C gives 130."""

    @functools.wraps(main)
    def guarded(*args: object, **kwargs: object) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a name that it cannot encode ends no command
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs) or 0
        except OryxError as error:
            rank = os.environ.get("RANK", "").strip() or "0"
            if rank == "0":
                print(f"error: {shown(error)}", file=sys.stderr, flush=True)
            elif getattr(error, "rank_local", False):
                print(f"error on rank {rank}: {shown(error)}", file=sys.stderr, flush=True)
            elif "TORCHELASTIC_RUN_ID" in os.environ:
                time.sleep(PATIENCE)  # the first rank to end has the others killed: rank 0 must have spoken
            return 2
        except BrokenPipeError:  # who reads our output has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 1
        except OSError as error:
            if error.filename is None:
                raise
            print(f"error{_rank()}: {shown(error.filename)}: {error.strerror}", file=sys.stderr, flush=True)
            return 2
        except ImportError as error:
            if error.name != "transformers":  # as hf/configuration_oryx.py refuses a version
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error))):
                raise
            why = first_line(error) if str(error).strip() else "no more can be allocated"
            print(f"error{_rank()}: not enough memory: {shown(why)}", file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130

    return guarded


def text_of(path: Path, source: str) -> str:
    """Text of a UTF-8 file, or of a pipe, that a command was given; ConfigError begins with `source`."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 (byte {error.start})") from None


def _rank() -> str:
    """Of a fault that each rank has for itself: which one this is, where there are several."""
    rank = os.environ.get("RANK", "").strip() or "0"
    return "" if rank == "0" else f" on rank {rank}"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """For descriptions that are docstrings: text is filled to the terminal's width, indented lines are commands.

    A command that is too long goes on behind a backslash.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        def kind(line: str) -> str:
            return "command" if line.startswith(" ") else "text" if line else "gap"

        lines: list[str] = []
        for what, group in itertools.groupby(text.strip().splitlines(), kind):
            if what == "text":
                lines += textwrap.wrap(" ".join(group), width)
            elif what == "gap":
                lines.append("")
            else:
                for command in group:
                    if len(command) <= width + 2:  # argparse leaves two columns free
                        lines.append(command)
                        continue
                    start = command[: len(command) - len(command.lstrip())]
                    parts = textwrap.wrap(
                        command.strip(),
                        width - 2,
                        initial_indent=start,
                        subsequent_indent=f"{start}    ",
                        break_long_words=False,
                        break_on_hyphens=False,
                    )
                    lines += [f"{part} \\" for part in parts[:-1]] + parts[-1:]
        return "\n".join(indent + line for line in lines)
