"""What every command line of the project shares: user errors become one line on stderr and exit code 2; its --help.

Under torchrun an error of config, data or checkpoint is the same on all ranks, so rank 0 alone prints it; one that only
a single rank can see carries `rank_local = True` and is printed there. torchrun itself starts all ranks again after any
exit code but 0, up to --max-restarts times. What was printed is not printed again: ranks of later starts end at once.
"""

from __future__ import annotations

import argparse
import contextlib
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
from typing import Any, NoReturn

from oryx_megatron.display import shown
from oryx_megatron.errors import NO_ROOM, USER_ERROR, ConfigError, OryxError, first_line

PATIENCE = 10.0
"""Seconds that a rank waits under torchrun for rank 0 to tell their common error and to end."""


def main_guard(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a `main(argv=None)`: an OryxError is printed as `error: …` and gives 2, Ctrl-C gives 130."""

    @functools.wraps(main)
    def guarded(*args: object, **kwargs: object) -> int:
        _open_closed()
        if (told := _told_file()) is not None and told.exists():
            return USER_ERROR
        if isinstance(sys.stdout, io.TextIOWrapper):  # a name that it cannot encode ends no command
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs) or 0
        except OryxError as error:
            if error.rank_local or _rank() == "0":
                return _tell(shown(error))
            if "TORCHELASTIC_RUN_ID" in os.environ:
                time.sleep(PATIENCE)  # the first rank to end has the others killed: rank 0 must have spoken
            return USER_ERROR
        except BrokenPipeError:  # who reads our output has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 1
        except OSError as error:
            if error.filename is None:
                if error.errno not in NO_ROOM:
                    raise
                return _tell(f"{error.strerror}: make room, or write to another disk")
            return _tell(f"{shown(error.filename)}: {error.strerror}")
        except ImportError as error:
            if error.name != "transformers":  # as hf/configuration_oryx.py refuses a version
                raise
            return _tell(str(error))
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error))):
                raise
            why = first_line(error) if str(error).strip() else "no more can be allocated"
            return _tell(f"not enough memory: {shown(why)}")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130

    return guarded


def _open_closed() -> None:
    """Give a process that was started with closed streams (`>&-`, some daemons) ones that lead nowhere.

    Python has None in their place, and the next file that is opened would get their number: what a library prints would
    end in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # The lowest number that is free is this one, unless a file has it by now.
            opened = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(opened, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115 - for good


def text_of(path: Path, source: str) -> str:
    """Text of a UTF-8 file, or of a pipe, that a command was given, without a byte order mark as training reads it.

    ConfigError begins with `source`.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 (byte {error.start})") from None


def _tell(text: str) -> int:
    """Print an error as one line; under torchrun, leave a note for later starts. Gives the exit code."""
    rank = _rank()
    print(f"error{'' if rank == '0' else f' on rank {rank}'}: {text}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # it is told all the same, perhaps more than once
        if (told := _told_file()) is not None:
            told.touch()
    return USER_ERROR


def _rank() -> str:
    return os.environ.get("RANK", "").strip() or "0"


def _told_file() -> Path | None:
    """Exists when a rank of this node and launch has told an error of the user's; None: not under torchrun.

    It lies in the folder that torchrun made for this launch alone, LAUNCH/attempt_N/LOCAL_RANK/error.json.
    """
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    if error_file.name != "error.json" or not error_file.parent.parent.name.startswith("attempt_"):
        return None
    return error_file.parents[2] / "told"


class Parser(argparse.ArgumentParser):
    """Of every command: named as the user called it; help by HelpFormatter; a wrong argument is a ConfigError.

    `module` is what `python -m` runs; without one, and not called by `oryx`, the name is that of the file.
    """

    def __init__(self, module: str | None = None, **options: Any) -> None:
        if text := options.get("description"):  # a module's docstring may begin with its command
            text = re.sub(r"^`[^`]*`: ", "", text.strip())
            options["description"] = text[0].upper() + text[1:]
        called = sys.argv[0] if sys.argv[0].startswith("oryx ") else module and f"python -m {module}"
        super().__init__(**{"prog": called, "formatter_class": HelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        """One line, as any other error of the user's."""
        kind, _, words = message.partition("unrecognized arguments: ")
        if words and not kind:  # beside an unknown option parse_intermixed_args counts overrides among them
            options = [word for word in words.split() if word.startswith("-")]
            message = f"unrecognized arguments: {' '.join(options) or words}"
            if field := next((re.match(r"--(\w+\.[\w.]+)", option) for option in options), None):
                message += f"; fields of a run have no dashes: {field[1]}=VALUE"
        raise ConfigError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """An argument's type: a number above 0. argparse names it by this function's name where it refuses."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def whole(text: str) -> int:
    """An argument's type: 0 or a number above it."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def seed(text: str) -> int:
    """An argument's type: what random generators begin with."""
    if not 0 <= int(text) < 1 << 63:
        raise ValueError
    return int(text)


def share(text: str) -> float:
    """An argument's type: from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """For descriptions that are docstrings: text is filled to the terminal's width, indented lines are commands.

    A command that is too long continues behind a backslash.
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
