"""What --help makes of a docstring."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from oryx_megatron.__main__ import main as oryx
from oryx_megatron.cli import HelpFormatter, main_guard

DOC = """One line that is a good deal longer than the forty columns of this terminal.

    python tool.py --short
    python tool.py --input first.jsonl second.jsonl --output result

Then
text.
"""


def test_help_fits_the_terminal(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    parser = argparse.ArgumentParser(prog="tool", description=DOC, formatter_class=HelpFormatter)
    text = parser.format_help()
    assert all(len(line) <= 40 for line in text.splitlines())
    assert "    python tool.py --short\n" in text
    assert "    python tool.py --input \\\n        first.jsonl second.jsonl \\\n        --output result\n" in text
    assert "\nThen text.\n" in text


def test_a_refused_version_is_one_line(capsys) -> None:
    def fails(name: str):
        def main() -> None:
            raise ImportError("not this one", name=name)

        return main_guard(main)

    assert fails("transformers")() == 2
    assert capsys.readouterr().err == "error: not this one\n"
    with pytest.raises(ImportError):
        fails("numpy")()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_commands_work_with_closed_streams(tmp_path: Path, closed: str) -> None:
    """What is printed goes nowhere, not into a file that got the stream's number."""
    code = (
        "import os, sys; from oryx_megatron.cli import main_guard\n"
        "def main():\n"
        f"    with open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "        sys.stdout.write('said'); sys.stdout.flush(); print('warned', file=sys.stderr, flush=True)\n"
        "        os.system('echo from a child; echo and its errors >&2'); sys.stdin.read(); file.write('kept')\n"
        "sys.exit(main_guard(main)())\n"
    )
    command = f'exec {shlex.quote(sys.executable)} -c "$0" {closed}'
    done = subprocess.run(["bash", "-c", command, code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == "kept"
    assert ("said" in done.stdout, "warned" in done.stderr) == (">&-" not in closed.split(), "2>&-" not in closed)


@pytest.mark.parametrize(
    "words",
    [
        ["data", "split", "d", "a=1", "b=1", "--seed", "-1"],
        ["generate", "r", "--prompt", "x", "--seed", str(1 << 64)],
        ["eval", "retrieval", "r", "--seed", "-1"],
        ["convert", "from-hf", "e", "r", "--seed", "one"],
        ["data", "preprocess", "--input", "a", "--tokenizer", "t", "--output", "p", "--shard", "1/0"],
        ["data", "preprocess", "--input", "a", "--tokenizer", "t", "--output", "p", "--shard", "1"],
    ],
)
def test_numbers_out_of_range_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert oryx(words) == 2
    told = capsys.readouterr().err
    option = words[-2]
    assert told.startswith(f"error: argument {option}: invalid {option.removeprefix('--')} value: '{words[-1]}'; see ")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tokenizer", "--eod", "</s>"], "--eod: has no effect without --adopt; remove it"),
        (["tokenizer", "--file", "tokenizer.json"], "--file: has no effect without --adopt; remove it"),
        (["tokenizer", "--adopt", "t", "--output", "u"], "--output: has no effect with --adopt, which writes"),
        (["tokenizer", "--kind", "byte-level", "--no-byte-fallback"], "--no-byte-fallback: has no effect with --kind"),
        (["tokenizer", "--kind", "byte-level", "--character-coverage", "1"], "--character-coverage: has no effect"),
        (["tokenizer", "--character-coverage", "2"], "--character-coverage: 2 should be from 0.98 to 1"),
        (["tokenizer", "--held-out", "1"], "--held-out: 1 keeps every document from training; use 2"),
        (["plan", "tiny-gdn", "--gpus", "2", "--sequence", "64", "--batch", "8", "--attention-share", "2"],
         "--attention-share: 2 should be from 0 to 1"),
        (["plan", "tiny-gdn-only", "--gpus", "2", "--sequence", "64", "--batch", "8", "--attention-share", "1"],
         "--attention-share: 1 is not 0, that of a model with recurrent mode only"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert oryx(words) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {said}")
    assert told.count("\n") == 1
