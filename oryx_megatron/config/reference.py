"""The reference of all config fields, made from the schema's own docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from typing import Any

from oryx_megatron.config.bounds import ranges
from oryx_megatron.config.loading import field_types, to_dict, type_name, without_null
from oryx_megatron.config.schema import RunConfig

_HEAD = """\
# Configuration

Every field of a run, made by `python -m oryx_megatron.config` from `oryx_megatron/config/schema.py`.

A run is a YAML file; `key.sub=value` on the command line changes single fields, the value in YAML:

<!-- ran: tests/integration/test_docs_commands.py -->

    python -m oryx_megatron.train configs/run/quickstart.yaml train.iterations=50 evaluation.plans=[attention]

`model` is the name of a file in `configs/model`, a path (relative to the run file), the fields themselves, or
`preset:` with the fields to change:

    model: {preset: 130m-gdn, num_kv_heads: 2}

All other paths are relative to the folder in which the command runs. `~`, `$NAME` and `${NAME}` in paths are
expanded, here and in the arguments of every command. A variable that is not set is an error, and so is a URL
(`s3://…`) where only local paths work. `output_dir`, `init_from.path` and datasets may be URLs (docs/storage.md).
`None` in a field that may be null is null. In a blend, a path alone stands for `{path: …, weight: 1}`. Unknown keys,
keys given twice and wrong types are errors, and fields are checked against each other and against the number of
processes before anything starts.

A baseline with one mode (`*-transformer`, `*-gdn-only`, `*-mamba2-only`) needs a run that never asks for the other:
`modes.p_attention=1 modes.p_recurrent=0 evaluation.plans=[attention]` for a Transformer, `modes.p_attention=0
modes.p_recurrent=1 evaluation.plans=[recurrent]` for a recurrent model. A hybrid (`*-gdn-hybrid`, `*-mamba2-hybrid`)
runs under any plan and ignores it: set `evaluation.plans=[attention]` to evaluate it once.
"""


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under every field of a config class."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    docs: dict[str, str] = {}
    name = ""
    for node in typing.cast(ast.ClassDef, body).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs[name] = " ".join(str(node.value.value).split())
            name = ""
        else:
            name = ""
    return docs


def inner_class(kind: Any) -> type | None:
    """The config class that a field's type holds, itself or in a list or mapping."""
    if dataclasses.is_dataclass(kind):
        return typing.cast(type, kind)
    for inner in typing.get_args(kind):
        if (found := inner_class(inner)) is not None:
            return found
    return None


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "required"
    return "" if dataclasses.is_dataclass(value) else f"`{json.dumps(to_dict(value), ensure_ascii=False)}`"


def _section(title: str, cls: type) -> list[str]:
    lines = [f"## {title}", "", (inspect.getdoc(cls) or "").strip(), ""]
    lines += ["| field | type | range | default | meaning |", "|---|---|---|---|---|"]
    kinds, docs, bounds = field_types(cls), field_docs(cls), ranges(cls)
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        words = "section below" if dataclasses.is_dataclass(kind) else type_name(kind)
        within = bounds[field.name].words() if field.name in bounds else ""
        within = f"each {within}" if within and typing.get_origin(without_null(kind)) is tuple else within
        cells = (f"`{field.name}`", words, within, _default(field), docs[field.name])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def reference() -> str:
    """The reference as Markdown: one section per config class, in the order in which a run holds them."""
    sections: dict[type, str] = {RunConfig: "A run"}

    def visit(cls: type, prefix: str) -> None:
        for name, kind in field_types(cls).items():
            inner = inner_class(kind)
            if inner is not None and inner not in sections:
                many = "" if dataclasses.is_dataclass(without_null(kind)) else "[…]"
                sections[inner] = f"{prefix}{name}{many}"
                visit(inner, f"{prefix}{name}{many}.")

    visit(RunConfig, "")
    lines = [_HEAD]
    for cls, title in sections.items():
        lines += _section(title if cls is RunConfig else f"`{title}`", cls)
    return "\n".join(lines).rstrip() + "\n"
