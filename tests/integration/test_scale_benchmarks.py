"""The benchmarks of scale-out run, and recompute keeps less for the backward pass (no time is looked at)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _lines(script: str, *arguments: str) -> list[list[str]]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_recompute_keeps_less() -> None:
    lines = _lines("recompute.py", "tiny-gdn", "--layers", "2", "--sequence", "128", "--plans", "ratio:0.5")
    kept = {line[1]: float(line[2]) for line in lines if line[:1] == ["ratio:0.5"]}
    assert kept["mixer"] < 0.8 * kept["none"]
    assert kept["full"] < 0.6 * kept["mixer"]
