"""Every command of ours that a page shows is one that there is, with options that it takes, and says how it ran.

A block of commands has a mark (tests/doc_commands.py): its test, a date and a machine, or why it did not run.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))
from doc_commands import COMMAND, PAGES, ROOT, Block, all_blocks, blocks, ours

TARGETS = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
BLOCKS = all_blocks()


class Parsed(BaseException):
    """The command took its arguments."""


def wrong(block: Block) -> str | None:
    """What is wrong with the mark of a block."""
    if not block.mark:
        return "has no mark: <!-- ran: TEST -->, <!-- ran: DAY MONTH YEAR, MACHINE --> or <!-- not run: REASON -->"
    if not block.ran:
        return None if len(block.mark.split()) > 2 else "not run: why?"
    if block.mark.startswith("tests/"):
        test = ROOT / block.mark.split(",")[0]
        if not test.is_file():
            return f"{test.name} is not there"
        if test.name == "test_docs_commands.py" or block.page in test.read_text(encoding="utf-8"):
            return None
        return f"{test.name} does not name {block.page}"
    date, _, machine = block.mark.partition(", ")
    try:
        day = datetime.strptime(date, "%d %B %Y")
    except ValueError:
        return f"{date}: no test and no date as in 27 November 2026"
    if day > datetime.now() + timedelta(days=1):
        return f"{date} is still to come"
    return None if machine else "on which machine?"


def inline(text: str) -> list[str]:
    """Commands in running text and tables that have arguments."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`((?:oryx|python -m oryx_megatron|python tools/)[^`\n]* [^`\n]*)`", text)
    found = [line.split(" > ")[0] for line in found if not re.search(r"…|COMMAND|\| ", line)]
    return [line for line in found if len(ours(line) or ()) > 1]


CASES = {f"{Path(block.page).stem}: {line[:70]}": line for block in BLOCKS for line in block.commands}
CASES |= {f"{page.stem}: {line[:70]}": line for page in PAGES for line in inline(page.read_text(encoding="utf-8"))}
CASES = {name: line for name, line in CASES.items() if re.match(r"(oryx|python\S*|torchrun|make) ", line)}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{Path(block.page).stem}-{block.line}")
def test_says_how_it_ran(block: Block) -> None:
    assert wrong(block) is None, f"{block.page}:{block.line} {wrong(block)}\n{block.text}"


def test_commands_are_found() -> None:
    """A command without a mark, or with an empty one, fails, wherever it stands."""
    assert len(BLOCKS) > 60
    assert len(CASES) > 80
    for text in (
        "    oryx a \\\n        --b  # c\n",
        "text\n\n```bash\noryx a  --b\n```\n",
        "1. item\n\n       oryx a --b\n",
        "```\n$ oryx a --b\nprinted\n```\n",
        "    $ oryx a \\\n        --b\n    printed: oryx c\n",
        "```console\n$ oryx a --b\nprinted\n```\n",
        "```zsh\noryx a --b\n```\n",
    ):
        (block,) = blocks("docs/x.md", text)
        assert [line.split() for line in block.commands] == [["oryx", "a", "--b"]]
        assert "no mark" in str(wrong(block))
        for mark, says in (
            ("ran: 27 November 2026, two CPU cores", None),
            ("ran: 27 November 2026", "on which machine?"),
            ("ran: 2026, two CPU cores", "no date"),
            ("ran: 1 January 2999, two CPU cores", "still to come"),
            ("ran: tests/nothing.py", "is not there"),
            ("ran: tests/unit/test_modes.py", "does not name docs/x.md"),
            ("not run: needs 8 GPUs", None),
            ("not run: GPUs", "why?"),
        ):
            marked = re.sub(r"^((?=```)|(?= {4}))", f"<!-- {mark} -->\n\n", text, count=1, flags=re.MULTILINE)
            marked = marked.replace("1. item\n\n", f"1. item\n\n   <!-- {mark} -->\n\n") if "item" in text else marked
            (block,) = blocks("docs/x.md", marked)
            assert (says or "None") in str(wrong(block)), marked
    for line in (
        "pip install x",
        "docker run x",
        "srun x",
        "launch/local.sh x",
        "$ make x",
        "X=1 python3.12 -m x",
        "cd x",
        "pytest tests/gpu",
        "aws s3 cp x y",
    ):
        assert COMMAND.match(line)
    assert not list(blocks("docs/x.md", "    Δ_t = softplus(x)\n\n    model: {preset: x}\n\n```yaml\nmake: 1\n```\n"))
    assert inline("`oryx plan RUN.yaml`, `oryx COMMAND --help` and `oryx train`") == ["oryx plan RUN.yaml"]


@pytest.mark.parametrize("name", CASES)
def test_parses(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = CASES[name]
    if line.startswith("make "):
        assert {word for word in line.split()[1:] if "=" not in word} <= TARGETS
        return
    found = ours(line)
    if found is None or found[0].startswith("launch/"):
        return
    for method in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, method)

        def parse(self, *arguments, original=original, **more):
            original(self, *arguments, **more)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, method, parse)
    module = found[0] + (".__main__" if (ROOT / found[0].replace(".", "/") / "__main__.py").is_file() else "")
    monkeypatch.setattr(sys, "argv", [module])
    with pytest.raises((Parsed, SystemExit)) as ended:
        importlib.import_module(module).main(found[1:])
    assert not isinstance(ended.value, SystemExit) or ended.value.code == 0, capsys.readouterr().err
