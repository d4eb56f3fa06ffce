"""The benchmarks of scale-out run, and recompute keeps less for the backward pass (no time is looked at)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oryx_megatron.testing import run_distributed

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


def _lines(script: str, *arguments: str) -> list[list[str]]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_layouts_agree_on_the_loss() -> None:
    script = str(ROOT / "benchmarks" / "layouts.py")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    sizes = ["--sequence", "64", "--batch", "4", "--micro", "2", "--chunk", "16", "--steps", "1", "--warm", "1"]
    asked = ["--layout", "tensor=2", "--layout", "pipeline=2,recompute=full", "--layout", "data=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command, "tiny-gdn", *sizes, *asked],
        capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| tiny")]
    assert [row[2].strip() for row in rows] == asked[1::2]
    assert len({float(row[-1]) for row in rows}) == 1


LIST = """
models: [tiny-gdn, gpt]
gpt: tiny-transformer
sequence: 64
micro: 2
microbatches: 2
chunk: 16
warm: 1
steps: 1
together: 3
cases:
  - {layout: tensor=2}
  - {layout: pipeline=2, fp8: tensorwise, models: [gpt]}
  - {layout: "context=2,pipeline=1"}
"""


def test_a_list_of_layouts(tmp_path: Path) -> None:
    """Both models under each layout, GPT's losses equal too; what is refused says so; all of it in a file."""
    (tmp_path / "list.yaml").write_text(LIST)
    out = tmp_path / "out"
    lines = _lines("layout_list.py", str(tmp_path / "list.yaml"), "--gpus", "2", "--out", str(out), "--plot")
    kept = json.loads((out / "layouts.json").read_text())
    losses: dict[str, list[float]] = {}
    for one in kept["results"]:
        losses.setdefault(one["found"]["model"], []).append(one["found"]["loss"])
    for found in losses.values():
        assert found == pytest.approx([found[0]] * 2, rel=1e-5)
    assert set(losses) == {"tiny-gdn", "gpt"}
    assert [one["why"] for one in kept["failed"]] == ["precision.fp8: tensorwise needs precision.dtype bf16, not fp32"]
    assert lines[-1][:4] == ["4", "measured,", "1", "failed,"]
    assert (out / "layouts.png").read_bytes().startswith(b"\x89PNG")


def models_left() -> list[bool]:
    """Whether the model, gradients and optimizer of a case are gone after it: Oryx's and GPT's, under overlap."""
    import gc
    import weakref

    import layouts
    from layout_cases import Case
    from peers import gpt_engine

    from oryx_megatron import parallel
    from oryx_megatron.testing.layouts import session
    from oryx_megatron.train.engine import MegatronEngine

    gone = []
    for model, build in (("tiny-gdn", MegatronEngine), ("gpt", gpt_engine)):
        case = Case(model, "data=1", 1, 32, 2, 1, "ratio:0.5", False, chunk=16, gpt="tiny-transformer")
        if gone:
            parallel.release()
        with session(layouts.run_config(case), build=build) as opened:
            opened.steps(2)
            chunk = opened.chunks[0]
            held = [weakref.ref(x) for x in (chunk, opened.optimizer, chunk.buffers[0].grad_data)]
            del chunk, opened
        gc.collect()
        gone += [one() is None for one in held]
    return gone


def test_a_case_leaves_nothing_in_memory() -> None:
    assert run_distributed(models_left, 1) == [[True] * 6]


def test_links_count_every_collective() -> None:
    script = str(ROOT / "benchmarks" / "links.py")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, "--mib", "1", "2"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command, "--repeats", "1"],
        capture_output=True, text=True, timeout=280, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    names = ["all-to-all", "all-gather", "reduce-scatter", "all-reduce"]
    assert [(row[0].strip(), int(row[1])) for row in rows] == [(name, mib) for mib in (1, 2) for name in names]
    assert all(float(row[2]) > 0 for row in rows)


def test_seconds_until_the_first_step(tmp_path: Path) -> None:
    """With an empty and with a warm cache; a run that does not get there is one line behind its own last ones."""
    lines = _lines("first_step.py", "tiny-gdn", "--sequence", "256", "--micro", "2", "--out", str(tmp_path))
    assert [(line[0], line[-4:-2]) for line in lines] == [(kind, ["first", "step"]) for kind in ("empty", "warm")]
    found = json.loads((tmp_path / "first_step.json").read_text())["runs"]
    assert [(run["cache"], run["first step"] > 0) for run in found] == [("empty", True), ("warm", True)]
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks/first_step.py"), "tiny-gdn", "--sequence", "255"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 2
    assert "modes.chunk" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: tiny-gdn: no first step within ")


def test_recompute_keeps_less() -> None:
    lines = _lines("recompute.py", "tiny-gdn", "--layers", "2", "--sequence", "128", "--plans", "ratio:0.5")
    kept = {line[1]: float(line[2]) for line in lines if line[:1] == ["ratio:0.5"]}
    assert kept["swiglu"] == kept["none"]  # reference kernels
    assert kept["mixer"] < 0.8 * kept["none"]
    assert kept["full"] < 0.6 * kept["mixer"]
