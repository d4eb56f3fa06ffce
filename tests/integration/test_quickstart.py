"""README.md's quickstart, shortened: every step of it runs, on real text, and says what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run folder and output of a quickstart of six steps."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "tools/quickstart.py", "--output", str(folder / "run"), "--data", str(folder / "stdlib")]
    command += ["--copy-steps", "2"]
    command += ["--stop", "4", "train.iterations=6", "schedule.warmup=1", "checkpoint.interval=0"]
    command += ["evaluation.interval=3", "evaluation.batches=1", "logging.interval=2"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280)
    assert done.returncode == 0, done.stdout
    return folder / "run", done.stdout


def test_learns_stops_and_resumes(quickstart: tuple[Path, str]) -> None:
    run, text = quickstart
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [step["iteration"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["loss"] < steps[0]["loss"]
    last = [line["plan"] for line in lines if line["kind"] == "evaluation" and line["iteration"] == 6]
    assert last == ["attention", "recurrent", "ratio:0.25"]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["iteration_0000004", "iteration_0000006"]
    assert "resumed from iteration 4" in text


def test_writes_text_and_a_picture(quickstart: tuple[Path, str]) -> None:
    run, text = quickstart
    assert text.count("def read_lines(path):") >= 4  # twice in a command, twice at the head of what was written
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "What to try next" in text
    copies = run.with_name("run-copies")
    lines = [json.loads(line) for line in (copies / "metrics.jsonl").read_text().splitlines()]
    last = [line["plan"] for line in lines if line["kind"] == "evaluation" and line["iteration"] == 2]
    assert last == ["attention", "ratio:0.5", "ratio:0.25", "recurrent"]
    assert "copying, after 2 steps" in text


@pytest.mark.slow
def test_attention_pays_where_something_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copying run at its full length: the more tokens attend, the lower its loss."""
    import quickstart

    monkeypatch.chdir(ROOT)
    quickstart.copying(tmp_path / "data", tmp_path / "run", quickstart.COPY_STEPS)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = {line["plan"]: line["loss"] for line in lines if line["kind"] == "evaluation"}  # the last of each
    assert losses["attention"] + 0.2 < losses["ratio:0.5"] < losses["recurrent"] - 0.2


def test_fits_a_terminal(quickstart: tuple[Path, str]) -> None:
    run, text = quickstart
    before, _, rest = text.partition("\n4. Text")  # what the model writes may be as wide as it likes
    own = (before + rest.partition("\n5. ")[2]).replace(str(run.parent), "runs")
    wide = [line for line in own.splitlines() if len(line) > 80 and not line.startswith("$")]
    assert wide == []
