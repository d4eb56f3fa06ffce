"""YAML text as plain data, bounded: what is nested too deep, multiplies itself or is no number is one line."""

from __future__ import annotations

import re
from typing import Any

import yaml

from oryx_megatron.errors import ConfigError

DEPTH = 100
"""Levels of nesting; a run has six."""
VALUES = 100_000
"""Values that a text may stand for, each alias counted as what it repeats."""

UNQUOTED = re.compile(r"(?:^|[\[{,:-])\s*[*!]")
"""A pattern where YAML reads an alias (`*`) or a tag (`!`)."""
OCTAL = re.compile(r"[-+]?0[0-9_]*[1-9][0-9_]*")
"""What YAML 1.1 reads in base 8."""
MERGE = "tag:yaml.org,2002:merge"
MARKS = ("alphabetic or numeric character", "expected ',' or ']'", "for the tag", "undefined alias")
"""In errors that such a pattern gives."""


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `3e-4` and `-.5` are numbers (YAML 1.1 reads text), and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == MERGE:  # `<<: *name`: keys beside it hold in place of those that it brings
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """What is no value of its type (a number of 5,000 digits, the 99th of May) is told with its place.

        So are numbers that YAML 1.1 reads as nobody means them: 0100 in base 8, and 1:30 in base 60.
        """
        try:
            value = super().construct_object(node, deep=deep)
            if isinstance(value, (int, float)) and (":" in node.value or OCTAL.fullmatch(node.value)):
                base = 60 if ":" in node.value else 8
                why = f"{_short(node.value)!r} is {_short(value)} in YAML, to base {base}"
                why += "; write the number meant, or text in quotes"
                raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)
            return value
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
            why = f"{_short(node.value)!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, why, node.start_mark) from None

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse deep nesting before Python's own stack ends."""
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {DEPTH} levels", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """The one document, whose aliases do not multiply."""
        node = super().get_single_node()
        if node is not None:
            _values(node, {})
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+|[-+]\.\d+"),
    list("-+.0123456789"),
)


def compose_yaml(text: str) -> yaml.Node | None:
    """The nodes of a YAML text that `parse_yaml` took, with their lines."""
    return yaml.compose(text, _Loader)


def parse_yaml(text: str, source: str) -> Any:
    """YAML text as plain data; ConfigError with `source`, line and column when it is not YAML."""
    try:
        # _Loader is a SafeLoader: it makes plain data only.
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{source}, line {line}: not valid YAML: the character {chr(error.character)!r} is not allowed"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        hint = "; indent with spaces, not tabs" if r"'\t'" in why else ""
        within = next(iter(text.split("\n")[mark.line : mark.line + 1]), "") if mark else ""
        if UNQUOTED.search(within) and any(part in why for part in MARKS):
            hint = """; text that begins with * or ! needs quotes of its own, in a shell '["*", "!*b"]'"""
        raise ConfigError(f"{source}{place}: not valid YAML: {why}{hint}") from None
    except RecursionError:  # in the parser, before a node is composed
        raise ConfigError(f"{source}: not valid YAML: nested too deep") from None


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node stands for; 0 in `known` marks one that is being counted, which an alias may not name."""
    if (count := known.get(id(node))) is not None:
        if count == 0:
            raise yaml.composer.ComposerError(None, None, "an alias repeats what it is part of", node.start_mark)
        return count
    known[id(node)] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    count = 1 + sum(_values(part, known) for part in inner)
    if count > VALUES:
        raise yaml.composer.ComposerError(None, None, f"it stands for more than {VALUES:,} values", node.start_mark)
    known[id(node)] = count
    return count


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
