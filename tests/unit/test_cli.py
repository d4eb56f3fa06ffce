"""What --help makes of a docstring."""

import argparse

from oryx_megatron.cli import HelpFormatter

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
