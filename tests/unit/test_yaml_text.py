"""Config files that are no config: bounded in time and memory, one line that names the file and the place."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from oryx_megatron.config import load_model, load_run, to_yaml, validate
from oryx_megatron.config.yaml_text import parse_yaml
from oryx_megatron.errors import ConfigError
from oryx_megatron.testing.layouts import tiny_run

sys.path.append(str(Path(__file__).parents[2] / "launch"))
from cluster import load_profile

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
)
"""Nine to the power of thirteen values in a kilobyte."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 50_000, "f.yaml, line 1, column 101: not valid YAML: nested deeper than 100 levels"),
        ("{a: " * 50_000, "nested deeper than 100 levels"),
        ("- " * 50_000 + "a", "nested deeper than 100 levels"),
        ("\n".join(" " * i + "a:" for i in range(1000)), "f.yaml, line 100, column 100: not valid YAML: nested deeper"),
        (BOMB, "it stands for more than 100,000 values"),
        ("a: &a [*a]", "f.yaml, line 1, column 4: not valid YAML: an alias repeats what it is part of"),
        ("a: &a {b: *a}", "an alias repeats what it is part of"),
        ("b: 1\nx: " + "9" * 5000, "f.yaml, line 2, column 4: not valid YAML: '9999"),
        ("x: -" + "9" * 5000, "is no int"),
        ("x: 0x" + "f" * 5000, None),
        ("b: 1\nx: \0", "f.yaml, line 2: not valid YAML: the character '\\x00' is not allowed"),
        ("x: \x1b[31m", "the character '\\x1b' is not allowed"),
        ("x: \ud800", "is not allowed"),
        ("a: 2001-99-99", "f.yaml, line 1, column 4: not valid YAML: '2001-99-99' is no timestamp"),
        ("a: !!int b", "'b' is no int"),
        ("a: !!int ''", "'' is no int"),
        ("a: !!float x", "'x' is no float"),
        ("a: !!bool x", "'x' is no bool"),
        ("a: !!timestamp x", "'x' is no timestamp"),
        ("a: 0x_", "'0x_' is no int"),
        ("!!map a", "expected a mapping node"),
        ("{{{}}}", "is not a name"),
        ("a: *b", "found undefined alias"),
        (
            "a: 0100",
            "f.yaml, line 1, column 4: not valid YAML: '0100' is 64 in YAML, to base 8; write the number meant",
        ),
        ("a: [-07, 8]", "'-07' is -7 in YAML, to base 8"),
        ("a: 1:30", "'1:30' is 90 in YAML, to base 60; write the number meant, or text in quotes"),
        ("a: 4:00:00.5", "'4:00:00.5' is 14400.5 in YAML, to base 60"),
        ('{a: "0100", b: "1:30", c: 0, d: 00.5, e: 0x10, f: 1_000}', None),
        ("a: b\n---\nc: d", "found another document"),
    ],
    ids=lambda text: repr(text)[:24],
)
def test_texts_are_read_or_refused_in_bounded_time(text: str, expected: str | None) -> None:
    started = time.monotonic()
    if expected is None:
        assert isinstance(parse_yaml(text, "f.yaml"), dict)
        return
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "f.yaml")
    assert expected in str(error.value)
    assert str(error.value).startswith("f.yaml")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    assert time.monotonic() - started < 30


def test_aliases_that_do_not_multiply() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {d: *a}", "f") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}


def test_merged_keys_give_way_to_those_beside_them() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {y: 4, <<: [*a, {z: 5}]}"
    assert parse_yaml(text, "f") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 4, "z": 5}}
    for wrong in ("b: {<<: 3}", "b: {<<: [3]}", "a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}", "a: &a {<<: *a}"):
        with pytest.raises(ConfigError, match=r"^f, line"):
            parse_yaml(wrong, "f")


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").symlink_to("gone.yaml")
    with pytest.raises(ConfigError, match=r"run.yaml: is a link to gone.yaml, which does not exist$"):
        load_run(tmp_path / "run.yaml")


READERS: dict[str, Callable[[Path], object]] = {
    "run": load_run,
    "model": lambda path: load_model(str(path)),
    "profile": load_profile,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_files_without_an_end(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    for name, why in (
        ("pipe", "not a regular file"),
        ("endless", "not a regular file"),
        ("large", "larger than 1,048,576 bytes"),
        ("folder", "is a folder; give a config file (YAML)"),
        ("loop", "Too many levels of symbolic links"),
    ):
        path = tmp_path / f"{name}.yaml"
        with pytest.raises(ConfigError) as error:
            read(path)
        assert str(path) in str(error.value)
        assert why in str(error.value) or read is READERS["model"]
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["train.iterations", "optimizer.lr", "model.hidden_size", "data.split", "seed"])
def test_numbers_without_measure(tmp_path: Path, field: str) -> None:
    """Of more digits than a number in a run can have; the field is named."""
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(tiny_run()))
    for text, expected in (
        ("1" + "0" * 400, "a number of 401 digits is more than a run can hold"),
        ("9" * 5000, "is no int"),
    ):
        with pytest.raises(ConfigError) as error:
            load_run(path, [f"{field}={f'[{text}, 1, 1]' if field == 'data.split' else text}"])
        assert expected in str(error.value)
        assert field in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "data.sequence_length=4611686018427387904",
        "model.num_layers=1000000000000",
        "model.hidden_size=1000000000000",
        "model.vocab_size=1000000000000",
        "parallel.tensor=1000000000000",
        "evaluation.plans=['prefix:" + "9" * 5000 + "']",
        "evaluation.plans=['every:" + "9" * 5000 + "']",
        "evaluation.plans=['runs:a0-" + "9" * 5000 + "']",
    ],
    ids=lambda text: text[:30],
)
def test_sizes_that_no_machine_has(tmp_path: Path, override: str) -> None:
    """They are refused without taking time or memory in their proportion."""
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(tiny_run()))
    started = time.monotonic()
    with pytest.raises(ConfigError) as error:
        validate(load_run(path, [override]), 1)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 10
