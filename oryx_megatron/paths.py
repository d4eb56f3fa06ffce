"""Paths as people write them into configs and command lines: `~`, `$NAME`, `${NAME}`, and URLs where only files serve.

A path that a program takes literally makes a folder called `~` or `s3:`; every path field of a run config and every
path argument of a command goes through `expand`.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Literal

from oryx_megatron.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([^{}]*)\})")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.-]+)*:/")  # pathlib makes `s3:/x` of `s3://x`
_WHOLE_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.-]+)*://")
_NULLS = ("none", "null", "nil")


def is_url(text: str) -> bool:
    """Whether a text is `scheme://…` rather than the path of a file."""
    return _WHOLE_URL.match(text) is not None


def expand(text: str, name: str, *, urls: bool | Literal["names"] = False) -> str:
    """`text` with `~`, `~user`, `$NAME` and `${NAME}` replaced, as a shell does. A `$` that no name follows stays.

    Args:
        text: As written.
        name: Of the field or argument, for messages.
        urls: Whether `scheme://…` is welcome; it is returned without slashes at its end, which storage takes for a
            part of the name. `names`: so is what only looks like one.

    Raises:
        ConfigError: no text; a variable that is not set, unless something exists under the name as written; a user
            that is not known; a URL where only local paths work; a NUL character.
    """

    def value(match: re.Match[str]) -> str:
        variable = match[1] if match[1] is not None else match[2]
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable) is None:
            raise ConfigError(f"{name}: {text}: `{match[0]}` names no variable")
        if not (found := os.environ.get(variable)):
            how = "is not set" if found is None else "is empty"
            raise ConfigError(f"{name}: {text}: the environment variable {variable} {how}; set it, or write the path")
        return found

    if not text:
        raise ConfigError(f"{name}: is empty")
    if "\0" in text:
        raise ConfigError(f"{name}: {text!r} holds a NUL character, which no path can")
    if text.casefold() in _NULLS:
        raise ConfigError(f"{name}: `{text}` is no path; give one, or ./{text} if that is its name")
    if _VARIABLE.search(text) and not _there(text):
        text = _VARIABLE.sub(value, text)
    if text.startswith("~"):
        home = os.path.expanduser(text)
        if home.startswith("~"):
            user = text.partition("/")[0]
            raise ConfigError(f"{name}: {text}: no home folder of {user} is known; write the path, or ./{text}")
        text = home
    scheme = _URL.match(text)
    if urls is True and scheme and not is_url(text):
        raise ConfigError(f"{name}: {text}: write {scheme[0]}/…, with two slashes; or ./{text} for a file")
    if not urls and scheme:
        raise ConfigError(
            f"{name}: {text}: only local paths work here, not {scheme[0]}/…; give a folder of this machine "
            f"(a mount of that storage, or a copy)"
        )
    if is_url(text) and (place := text.rstrip("/")) and not place.endswith(":"):
        return place
    return text


def expand_arguments(arguments: argparse.Namespace, *names: str, urls: bool = False) -> None:
    """Replace path arguments of a command by what they stand for: `--out`, or the name of a positional argument.

    Strings, Paths and lists of them; what was not given stays None.

    Raises:
        ConfigError: see `expand`; the message names the argument.
    """
    for name in names:
        key = name.lstrip("-").replace("-", "_")
        given = getattr(arguments, key)
        if isinstance(given, list):
            setattr(arguments, key, [_like(path, name, urls) for path in given])
        elif given is not None:
            setattr(arguments, key, _like(given, name, urls))


def _like(path: str | Path, name: str, urls: bool) -> str | Path:
    expanded = expand(str(path), name if name.startswith("-") else name.upper(), urls=urls)
    return expanded if isinstance(path, str) else Path(expanded)


def _there(text: str) -> bool:
    """Whether a file, folder or dataset has this very name, `$` and all."""
    return any(os.path.lexists(text + ending) for ending in ("", ".idx"))
