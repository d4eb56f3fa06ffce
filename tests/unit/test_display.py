"""Names that terminals, Markdown, HTML and plots take for orders are shown as they are."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from oryx_megatron import monitor
from oryx_megatron.cli import main_guard
from oryx_megatron.display import LineFormatter, code, markdown, number_of, shown, shown_lines
from oryx_megatron.errors import ConfigError
from oryx_megatron.modes import Mode, ModePlan
from oryx_megatron.tools import generate

OTHER_ENCODING = b"latin-\xe9".decode("utf-8", "surrogateescape")
NAMES = [
    r"$\bad{$",
    "$x_1^2$",
    "a$b$c",
    "_hidden",
    "a_b*c*",
    "--><script>alert(1)<",
    "<b>&amp;",
    "\x1b[31mred\x1b]0;title\x07",
    "two\nlines\r",
    "\u202eesrever",
    "tab\tnul\x7f",
    OTHER_ENCODING,
    "größe-模型-🙂",
    "```",
    "a|b`c",
    "%s {0} {name} \\N{BEL}",
    "n" * 200,
]


def test_what_a_terminal_would_obey_is_shown_as_text() -> None:
    assert shown("größe 模型 🙂 $x$ ‍ \\x1b") == "größe 模型 🙂 $x$ ‍ \\x1b"
    assert shown("\x1b[31m\n\t\x7f\u202e") == r"\x1b[31m\n\t\x7f\u202e"
    assert shown(OTHER_ENCODING) == r"latin-\udce9"
    assert shown(Path("a\nb")) == r"a\nb"
    assert shown_lines("a\x07\nb") == "a\\x07\nb"


def test_markdown() -> None:
    assert markdown("a_b|<i>$x$*`\\#") == r"a\_b\|\<i\>\$x\$\*\`\\\#"
    assert code("plan") == "`plan`"
    assert code("a`b") == "``a`b``"
    assert code("`a|") == r"`` `a\| ``"


def test_errors_and_logs_stay_on_one_line(capsys: pytest.CaptureFixture) -> None:
    @main_guard
    def main() -> int:
        raise ConfigError("run \x1b[2J\nTraceback: no")

    assert main() == 2
    assert capsys.readouterr().err == "error: run \\x1b[2J\\nTraceback: no\n"
    record = logging.LogRecord("x", logging.WARNING, "", 1, "%s is odd", ("\x1b[1m\n",), None)
    assert LineFormatter("%(levelname)s %(message)s").format(record) == r"WARNING \x1b[1m\n is odd"


def test_files_that_cannot_be_opened_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    @main_guard
    def main(path: Path) -> int:
        return len(path.read_text())

    assert main(tmp_path / "no\nthing") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/no\\nthing: No such file or directory\n"
    assert main(tmp_path) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"


def test_names_that_a_terminal_cannot_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    @main_guard
    def main() -> int:
        print("größe", OTHER_ENCODING)
        return 0

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main() == 0
    out.flush()
    assert out.buffer.getvalue() == b"gr\\xf6\\xdfe latin-\\udce9\n"  # type: ignore[attr-defined]


def _run(folder: Path, name: str) -> Path:
    """A run folder of this name, whose dataset and plan are called so, too."""
    run = folder / name
    run.mkdir(parents=True)
    step = {"kind": "step", "iteration": 1, "loss": 2.0, "tokens": 10, "grad_norm": 1.0, "lr": 1e-3, "seconds": 1.0}
    lines: list[dict[str, Any]] = [step | {"skipped": False}, step | {"iteration": 2, "skipped": False}]
    lines.append({"kind": "evaluation", "iteration": 2, "dataset": name, "plan": name, "loss": 2.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    event = {"event": name, "time": 1.0, "iteration": 2, "reason": name, name: [name]}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    return run


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_monitor(tmp_path: Path, name: str) -> None:
    out = io.StringIO()
    assert monitor.main([str(_run(tmp_path, name)), "--once"], out) == 0
    lines = out.getvalue().split("\n")
    assert all(line.isprintable() for line in lines)
    assert lines[1].startswith(shown(name) if len(shown(name)) <= 18 else "…")
    assert any(line.startswith(f"  {shown(name)}, {shown(name)}: loss"[:80]) for line in lines)


def test_one_of_a_thing_is_no_plural() -> None:
    assert [number_of(n, "microbatch") for n in (0, 1, 2)] == ["0 microbatches", "1 microbatch", "2 microbatches"]
    assert (number_of(1, "rank"), number_of(8, "rank")) == ("1 rank", "8 ranks")


def test_generated_text_that_ends_within_a_character(capsys: pytest.CaptureFixture[str]) -> None:
    """Held back while more may come; at the end it is shown, with all before it."""

    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode(errors="replace")

    def text_of(data: bytes) -> list[str]:
        printer = generate._Printer(Bytes(), False)  # type: ignore[arg-type]
        plan = ModePlan.uniform(Mode.ATTENTION, len(data))
        shown = []
        for token in data[1:]:
            printer(plan, [data[0]], token)
            shown.append(capsys.readouterr().out)
        printer.end(plan, list(data))
        return [*shown, capsys.readouterr().out]

    assert text_of("abé".encode()) == ["ab", "", "é", "\n"]
    assert text_of(b"ab\xc3") == ["ab", "", "�\n"]
    assert text_of(b"ab\xff\xfe") == ["ab", "", "", "��\n"]
