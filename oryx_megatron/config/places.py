"""Where a run's fields are given: file and line, or override, for the errors that name them."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from oryx_megatron import resources
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.config.yaml_text import compose_yaml
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import expand
from oryx_megatron.reading import read_text

_FIELD = re.compile(r"(?<![\w./-])[a-z]\w*(?:\.\w+|\[\d+\])+(?![\w/-]|\.\w)|^[a-z]\w*")
"""Names of fields in a message: with a dot or an index anywhere, else at its beginning."""


@contextlib.contextmanager
def told_with_place(path: str | Path, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Put the place of the first field that a ConfigError names to it: `RUN.yaml: … (line 7)`, or its override."""
    try:
        yield
    except ConfigError as error:
        if (placed := with_place(str(error), path, overrides)) == str(error):
            raise
        raise ConfigError(placed) from None


def with_place(message: str, path: str | Path, overrides: Sequence[str] = ()) -> str:
    """`message` with the place of the first field that it names and that is given, else with the file.

    A message that names no field stays as it is.
    """
    file = str(resources.shipped(expand(str(path), "run config")))
    if message.startswith("override `") or re.search(r" \(line \d+\)$", message):  # it has its place
        return message
    text = message.removeprefix(f"{file}: ")
    sections = {field.name for field in dataclasses.fields(RunConfig)}
    fields = [name for name in _FIELD.findall(text) if re.split(r"[.\[]", name, maxsplit=1)[0] in sections]
    given = _lines(file) if fields else {}
    for field in fields:  # what was typed last is the likelier cause
        if (override := _override(field, overrides)) is not None:
            return f"override `{override}`: {text}"
    for field in fields:
        if (line := _line(field, given)) is not None:
            return f"{file}: {text} (line {line})"
    return f"{file}: {text}" if fields else message


def _override(field: str, overrides: Sequence[str]) -> str | None:
    """The last override that gives a field, or what holds it."""
    for override in reversed(overrides):
        key = override.partition("=")[0].strip()
        if field == key or field.startswith((f"{key}.", f"{key}[")):
            return override
    return None


def _line(field: str, given: dict[str, int]) -> int | None:
    """Line of a field; of one that a preset gives, the line that names the preset."""
    if field in given or not field.startswith("model."):
        return given.get(field)
    if any(name.startswith("model.") for name in given):
        return given.get("model.preset")
    return given.get("model")


def _lines(file: str) -> dict[str, int]:
    """Name of every field in a run's YAML → its line; nothing where the file cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        if (node := compose_yaml(read_text(file))) is not None:
            return dict(_walk(node, ""))
    return {}


def _walk(node: yaml.Node, name: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{name}.{key.value}" if name else str(key.value)
            yield inner, key.start_mark.line + 1
            yield from _walk(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield f"{name}[{i}]", value.start_mark.line + 1
            yield from _walk(value, f"{name}[{i}]")
