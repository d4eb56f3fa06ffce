"""Every command of ours that a page shows is one that there is, with options that it takes.

README's own blocks and docs/api.md are run whole (tests/integration/test_readme.py). The quickstart, the wheel, the
launch scripts and the conversions have tests of their own. What needs GPUs or a cluster is parsed here; its page says
where and when it ran.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from oryx_megatron.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TARGETS = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


class Parsed(BaseException):
    """The command took its arguments."""


def commands(text: str) -> Iterator[str]:
    """Commands of bash blocks and of indented ones, a line each."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^ {4,}\S.*\n?)+", plain, re.MULTILINE)
    for block in blocks:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = re.sub(r"(?:^|\s)# .*$", "", line.strip().removeprefix("$ ")).strip()
            if re.match(r"(oryx|python|torchrun|make) ", line):
                yield line


def ours(line: str) -> list[str] | None:
    """Module of ours and its arguments; None for another's command."""
    words = shlex.split(re.sub(r"[…]", "", line).replace("[key=value ]", ""))
    if words[0] == "oryx":
        name = next((name for name in (" ".join(words[1:3]), words[1]) if name in COMMANDS), None)
        if name is None:
            assert words[1].startswith("--"), f"no command {words[1]}"
            return None
        return [COMMANDS[name][0], *words[1 + len(name.split()) :]]
    for place, word in enumerate(words):
        if re.fullmatch(r"(tools|launch)/\w+\.py", word):
            assert (ROOT / word).is_file(), word
            module = "launch/submit.py" if word.startswith("launch/") else f"oryx_megatron.tools.{Path(word).stem}"
            return [module, *words[place + 1 :]]
        if word == "-m" and words[place + 1].startswith("oryx_megatron"):
            return words[place + 1 :]
        if word.startswith("benchmarks/"):
            assert (ROOT / word).is_file(), word
            return None
    return None


CASES = [
    pytest.param(line, id=f"{page.stem}: {line[:70]}")
    for page in PAGES
    for line in dict.fromkeys(commands(page.read_text(encoding="utf-8")))
]


def test_commands_are_found() -> None:
    assert len(CASES) > 60
    text = "    oryx a \\\n        --b  # c\n\n```bash\n# d\n$ make e\n```\n"
    assert [line.split() for line in commands(text)] == [["make", "e"], ["oryx", "a", "--b"]]


@pytest.mark.parametrize("line", CASES)
def test_parses(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if line.startswith("make "):
        assert {word for word in line.split()[1:] if "=" not in word} <= TARGETS
        return
    found = ours(line)
    if found is None or found[0].startswith("launch/"):
        return
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parse(self, *arguments, original=original, **more):
            original(self, *arguments, **more)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)
    module = found[0] + (".__main__" if (ROOT / found[0].replace(".", "/") / "__main__.py").is_file() else "")
    monkeypatch.setattr(sys, "argv", [module])
    with pytest.raises((Parsed, SystemExit)) as ended:
        importlib.import_module(module).main(found[1:])
    assert not isinstance(ended.value, SystemExit) or ended.value.code == 0, capsys.readouterr().err
