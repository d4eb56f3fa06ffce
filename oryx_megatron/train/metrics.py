"""Reading a run's metrics.jsonl: by the run itself when it resumes, the monitor and the plots. Needs no torch."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

NAME = "metrics.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a line that a crash cut off is left out. No file gives no lines."""
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        line = parse_line(text)
        if line is None:
            log.warning("%s:%d: left out a damaged line", path, number)
        else:
            lines.append(line)
    return lines


def parse_line(text: str) -> dict[str, Any] | None:
    """One line of a metrics.jsonl; None when it is damaged."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("iteration"), int) and "kind" in line else None
