"""What --help makes of a docstring."""

import argparse

import pytest

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
