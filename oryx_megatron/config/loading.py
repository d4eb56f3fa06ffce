"""From YAML and `key=value` overrides to the typed config, and back.

Every error is one line that names the file (or override), the field, and what is wrong with it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml

from oryx_megatron import resources
from oryx_megatron.config.places import told_with_place
from oryx_megatron.config.plans import read_plan
from oryx_megatron.config.schema import REMOVED, RENAMED, BlendEntry, InitFromConfig, ModelConfig, RunConfig
from oryx_megatron.config.types import NAME, PATH, URL
from oryx_megatron.config.validate import check_model
from oryx_megatron.config.yaml_text import parse_yaml
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import expand
from oryx_megatron.reading import read_text, reason

T = TypeVar("T")
log = logging.getLogger(__name__)


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    data = parse_yaml(config_text(path), str(path))
    if data is None:
        raise ConfigError(f"{path}: expected `name: value` lines, found nothing")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected `name: value` lines, found {_shown(data)}")
    return data


def config_text(path: Path) -> str:
    """Text of a config file; ConfigError when it cannot be read, or is no file that ends."""
    try:
        return read_text(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(f"{path}: is a link to {path.readlink()}, which does not exist") from None
        raise ConfigError(f"{path}: no such config file{_near_file(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give a config file (YAML)") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: {reason(error)}; save it as UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {reason(error)}") from None


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _near_file(path: Path) -> str:
    """`; did you mean FILE?` where a file beside it, or a recipe that ships, has nearly that name."""
    beside = {file.name: file for file in path.parent.glob("*.yaml")}
    shipped = {file.name: f"configs/run/{file.name}" for file in (resources.folder("configs") / "run").glob("*.yaml")}
    name = path.name if path.suffix else f"{path.name}.yaml"
    near = difflib.get_close_matches(name, names := {**shipped, **beside}, 1, 0.75)
    return f"; did you mean {names[near[0]]}?" if near else ""


def _near(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean x?`, or all names when none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1, 0.6)
    return f"; did you mean `{prefix}{near[0]}`?" if near else f"; known: {', '.join(known)}"


def field_types(cls: Any) -> dict[str, Any]:
    """Resolved type of every field of a config class."""
    hints = typing.get_type_hints(cls)
    return {field.name: _plain(hints[field.name]) for field in dataclasses.fields(cls)}


def _plain(kind: Any) -> Any:
    """`X | None` for Optional[X], which is what Python makes of a union with an annotated type."""
    if typing.get_origin(kind) is typing.Union:
        return functools.reduce(operator.or_, typing.get_args(kind))
    return kind


def type_name(kind: Any) -> str:
    """A type in words, for messages and for the reference."""
    if typing.get_origin(kind) is Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if isinstance(kind, types.UnionType):
        return " or ".join(type_name(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        args = typing.get_args(kind)
        if args[-1] is Ellipsis:
            return f"list of {type_name(args[0])}"
        return f"list of {len(args)} × {type_name(args[0])}"
    if typing.get_origin(kind) is dict:
        return f"mapping of names to {type_name(typing.get_args(kind)[1])}"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", types.NoneType: "null"}
    return names.get(kind) or kind.__name__


def without_null(kind: Any) -> Any:
    """X of `X | None`; any other type as it is."""
    if isinstance(kind, types.UnionType):
        return next(inner for inner in typing.get_args(kind) if inner is not types.NoneType)
    return kind


_BY_PATH = (BlendEntry, InitFromConfig)
"""Classes for which a path may stand alone."""


def _renamed(cls: Any, data: Mapping[Any, Any], source: str, prefix: str = "") -> dict[Any, Any]:
    """`data` with today's names of the fields of `cls`; a note for each old one, an error where both are given."""
    old = {key: new for key, new in RENAMED.get(getattr(cls, "__name__", ""), {}).items() if key in data}
    for key, new in old.items():
        if new in data:
            raise ConfigError(f"{source}: `{prefix}{key}` is the old name of `{prefix}{new}`: remove one of the two")
        _note(f"{prefix}{key}", f"{prefix}{new}")
    return {old.get(key, key): value for key, value in data.items()}


@functools.cache
def _note(old: str, new: str) -> None:
    """Once in a process: a checkpoint's manifest is read several times."""
    log.warning("config: `%s` is now `%s`; the old name is read until 0.4", old, new)


def _convert(kind: Any, value: Any, source: str, name: str) -> Any:
    """`value` as `kind`; ConfigError that names `source` and the field `name`."""

    def wrong() -> ConfigError:
        return ConfigError(f"{source}: {name}: expected {type_name(kind)}, got {_shown(value)}")

    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in args and isinstance(value, str):
            return value
        near = difflib.get_close_matches(str(value), args, 1, 0.6)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise ConfigError(f"{source}: {name}: expected one of {type_name(kind)}, got {_shown(value)}{hint}")
    if isinstance(kind, types.UnionType):
        if value is None or (isinstance(value, str) and value.strip().casefold() in ("none", "null")):
            return None  # `None` is how Python writes it; YAML reads text
        inner = without_null(kind)
        plain = isinstance(value, (str, int, float, bool)) or typing.get_origin(inner) is tuple
        if not plain and not dataclasses.is_dataclass(inner):
            raise wrong()
        return _convert(inner, value, source, name)
    if dataclasses.is_dataclass(kind):
        if kind in _BY_PATH and isinstance(value, str):
            value = {"path": value}
        return from_dict(cast(type, kind), value, source=source, prefix=name)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong()
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise wrong()
        return tuple(_convert(k, v, source, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong()
        return {str(k): _convert(args[1], v, source, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{source}: {name}: a number of {len(str(abs(value)))} digits is more than a run can hold")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    if kind is int and isinstance(value, float) and value.is_integer():  # YAML's 1e6
        raise ConfigError(f"{wrong()}; write {int(value)}")
    raise wrong()


def from_dict(cls: type[T], data: Any, *, source: str = "config", prefix: str = "") -> T:
    """A config object of class `cls` from plain data, as in YAML or a manifest.

    `source` names the file in messages, `prefix` the place inside it. ConfigError for unknown keys (with the nearest
    name), missing fields and wrong types. Values are not checked against each other: see `validate`.
    """
    if not isinstance(data, Mapping):
        where = f"{source}: {prefix}" if prefix else source
        raise ConfigError(f"{where}: expected a mapping of {cls.__name__} fields, got {_shown(data)}")
    kinds = field_types(cls)
    dot = f"{prefix}." if prefix else ""
    data = _renamed(cls, data, source, dot)
    data = {key: value for key, value in data.items() if value or key not in REMOVED.get(cls.__name__, ())}
    for key in data:
        if key not in kinds:
            raise ConfigError(f"{source}: unknown key `{dot}{key}`{_near(str(key), kinds, dot)}")
    values = {key: _convert(kinds[key], value, source, f"{dot}{key}") for key, value in data.items()}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ConfigError(f"{source}: `{dot}{field.name}` is missing ({type_name(kinds[field.name])})")
    return cls(**values)


def to_dict(config: Any) -> Any:
    """A config object as plain data (dicts, lists, scalars) that `from_dict` and JSON take."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config


def expand_paths(config: T, source: str) -> T:
    """A config object in whose paths `~` and `$NAME` stand for what they mean; ConfigError names the field."""

    def expanded(value: str, name: str, urls: bool | Literal["names"]) -> str:
        return expand(value, f"{source}: {name}", urls=urls) if value or urls != "names" else value

    return map_paths(config, expanded)


def map_paths(config: T, change: Callable[[str, str, bool | Literal["names"]], str], prefix: str = "") -> T:
    """A config object with every path replaced by `change(path, field, urls)`, with `urls` as `paths.expand` has it."""

    def changed(kind: Any, value: Any, name: str) -> Any:
        if PATH in (marks := getattr(kind, "__metadata__", ())):
            return change(value, name, "names" if NAME in marks else URL in marks)
        if dataclasses.is_dataclass(value):
            return map_paths(value, change, f"{name}.")
        args = typing.get_args(kind)
        if isinstance(value, tuple):
            return tuple(changed(args[0], v, f"{name}[{i}]") for i, v in enumerate(value))
        if isinstance(value, dict):
            return {k: changed(args[1], v, f"{name}.{k}") for k, v in value.items()}
        return changed(args[0], value, name) if type(None) in args and value is not None else value

    hints = typing.get_type_hints(type(config), include_extras=True)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(cast(Any, config))}
    return dataclasses.replace(
        cast(Any, config), **{name: changed(hints[name], value, f"{prefix}{name}") for name, value in fields.items()}
    )


def to_yaml(config: Any) -> str:
    """A config object as YAML text; `load_run` reads a RunConfig's back to an equal object."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def preset_folders() -> tuple[Path, ...]:
    """Where model presets are looked up: those that ship with the package, then under the working folder."""
    return resources.folder("configs") / "model", Path.cwd() / "configs" / "model"


def preset_names() -> list[str]:
    """Names of the model presets."""
    return sorted({path.stem for folder in preset_folders() for path in folder.glob("*.yaml")})


def _model_file(name: str, source: str, folder: Path) -> Path:
    """File of a preset's name, or of a path relative to `folder` or to the working folder."""
    name = expand(name, f"{source}: model")
    if "/" in name or name.endswith((".yaml", ".yml")):
        for path in (folder / name, resources.shipped(name)):
            if path.is_file():
                return path
        raise ConfigError(f"{source}: model: no such config file {name} (looked in {folder} and the working folder)")
    for presets in preset_folders():
        if (presets / f"{name}.yaml").is_file():
            return presets / f"{name}.yaml"
    raise ConfigError(f"{source}: model: no preset `{name}`{_near(name, preset_names())}")


def _model_data(value: Any, source: str, folder: Path, depth: int = 0) -> dict[str, Any]:
    """Model fields behind a preset's name, a path, or a mapping (with `preset:` as base)."""
    if depth > 8:
        raise ConfigError(f"{source}: model: presets that refer to each other in a circle")
    if isinstance(value, str):
        path = _model_file(value, source, folder)
        data = _model_data(_read(path), str(path), path.parent, depth + 1)
        from_dict(ModelConfig, data, source=str(path))  # so that a fault is told with the file that has it
        return data
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: model: expected a preset's name, a path or a mapping, got {_shown(value)}")
    value = _renamed(ModelConfig, value, source, "model.")
    if "preset" not in value:
        return value
    if not isinstance(value["preset"], str):
        raise ConfigError(f"{source}: model.preset: expected a preset's name or a path, got {_shown(value['preset'])}")
    base = _model_data(value["preset"], source, folder, depth + 1)
    changed = {key: field for key, field in value.items() if key != "preset"}
    if isinstance(changed.get("moe"), dict) and isinstance(base.get("moe"), dict):
        changed["moe"] = base["moe"] | changed["moe"]
    return base | changed


def is_run(name: str) -> bool:
    """Whether a name is a run's YAML, one with `train:`, `model:` or `data:`, rather than a model's."""
    path = resources.shipped(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return False
    data = parse_yaml(config_text(path), str(path))
    return isinstance(data, dict) and bool({"train", "model", "data"} & data.keys())


def load_model(name_or_path: str) -> ModelConfig:
    """The model of a preset's name or of a YAML file (absolute or relative to the working folder).

    ConfigError when there is none or a field is wrong; fields are checked one by one and against each other.
    """
    model = from_dict(ModelConfig, _model_data(name_or_path, name_or_path, Path.cwd()), source=name_or_path)
    try:
        check_model(model)
    except ConfigError as error:
        raise ConfigError(f"{name_or_path}: {error}") from None
    return model


def _override(data: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in the plain data of a run; the value is YAML."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    source = f"override `{override}`"
    if not equals or not all(keys):
        raise ConfigError(f"{source}: expected key=value, e.g. train.iterations=100")
    if not text.strip() and path.strip() == "init_from":  # a shell's variable that is not set: new weights, silently
        raise ConfigError(f"{source}: has no value; write {path}=null for none")
    # Walk the schema first, so that a typo is told with the override's text and not the file's name.
    kind: Any = RunConfig
    owners: list[Any] = []  # the class of each key
    for i, key in enumerate(keys):
        owners.append(without_null(kind))
        prefix = "".join(f"{k}." for k in keys[:i])
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif dataclasses.is_dataclass(kind := without_null(kind)):
            kinds = field_types(kind)
            keys[i] = key = next(iter(_renamed(kind, {key: None}, source, prefix)))
            if key not in kinds and not (kind is ModelConfig and key == "preset"):
                raise ConfigError(f"{source}: unknown key `{prefix}{key}`{_near(key, kinds, prefix)}")
            kind = kinds.get(key, str)
        else:
            raise ConfigError(f"{source}: `{prefix[:-1]}` is one value ({type_name(kind)}), it has no `{key}`")
    value = parse_yaml(text, source)
    if not (kind is ModelConfig or (dataclasses.is_dataclass(kind) and isinstance(value, Mapping))):
        _convert(kind, value, source, path.strip())
    for i, key in enumerate(keys[:-1]):
        inner = data.get(key)
        if i == 0 and key in ("model", "init_from") and isinstance(inner, str):
            inner = {"preset" if key == "model" else "path": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{source}: `{'.'.join(keys[: i + 1])}` is {_shown(inner)}, not a mapping")
        data[key] = inner = _renamed(owners[i + 1], inner, source, "".join(f"{k}." for k in keys[: i + 1]))
        data = inner
    data[keys[-1]] = value


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run of a YAML file, with overrides; every field checked by itself. `validate` checks them together.

    Args:
        path: Of the file. A `configs/…` that is not under the working folder is the one that ships with the package.
        overrides: `key.sub=value`, applied in order. Values are YAML, so lists and mappings work:
            `evaluation.plans=[attention, 'ratio:0.5']`.

    In the file `model` may be a preset's name, a path relative to the file, the fields, or `preset:` with changed
    fields; an override `model.num_layers=2` changes one field of whichever it is. Other paths are relative to the
    working folder. In all paths `~`, `$NAME` and `${NAME}` are expanded.

    Raises:
        ConfigError: no such file, no YAML, an unknown field, or a value that does not fit one.
    """
    path = resources.shipped(expand(str(path), "run config"))
    data, source = _read(path), str(path)
    if "mixer" in data and "model" not in data:
        raise ConfigError(f"{source}: this is a model, which a run names as `model: {path.stem}`; see configs/run")
    for override in [overrides] if isinstance(overrides, str) else overrides:
        _override(data, override)
    if "model" in data:
        data["model"] = _model_data(data["model"], source, path.parent)
    with told_with_place(path):  # an override was told by itself
        return _with_plans(expand_paths(from_dict(RunConfig, data, source=source), source), source)


def _with_plans(run: RunConfig, source: str) -> RunConfig:
    """A run whose plans in files are written out: what a checkpoint records of it depends on no file."""

    def read(spec: str, name: str) -> str:
        try:
            return read_plan(spec)
        except ConfigError as error:
            raise ConfigError(f"{source}: {name}: {error}") from None

    fixed = None if run.modes.fixed is None else read(run.modes.fixed, "modes.fixed")
    modes = dataclasses.replace(run.modes, fixed=fixed, prompt=read(run.modes.prompt, "modes.prompt"))
    plans = tuple(read(spec, f"evaluation.plans[{i}]") for i, spec in enumerate(run.evaluation.plans))
    return dataclasses.replace(run, modes=modes, evaluation=dataclasses.replace(run.evaluation, plans=plans))
