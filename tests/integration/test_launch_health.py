"""oryx_megatron.health on gloo ranks that stand for nodes, with faults that are real to it: it must name the node."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from oryx_megatron import health
from oryx_megatron.errors import ConfigError
from oryx_megatron.health import Options, Report, judge
from oryx_megatron.health.rank import ring
from oryx_megatron.testing import run_distributed

REPOSITORY = Path(__file__).parents[2]
RUN = str(REPOSITORY / "configs/run/quickstart.yaml")
LENIENT = {"min_free_gb": 0.0, "min_write_mbs": 0.0, "write_mb": 1, "reduce_mb": 0.1, "slow": 0.0, "timeout": 100.0}
"""Nothing that a busy machine could fail."""


def on_node(**changes: object) -> Report:
    """This rank as the only one of a node of its own."""
    os.environ["SLURMD_NODENAME"] = f"n{os.environ['RANK']}"
    os.environ["LOCAL_RANK"] = "0"
    clock = changes.pop("clock", time.time)
    return health.check(Options(**LENIENT | changes), clock)


def with_faults(folder: str) -> Report:
    """n1: wrong clock, another file system, another config. n2: another package, other code, slow network."""
    rank = os.environ["RANK"]
    if rank == "1":
        health.rank.PATIENCE = 1.0
        return on_node(
            config=RUN, overrides=("seed=5",), output=f"{folder}/other", clock=lambda: time.time() + 30.0, slow=0.3
        )
    if rank == "2":
        import sys

        import torch.distributed as dist

        from oryx_megatron import platform

        package = Path(folder, "path", "numpy-0.1.dist-info")
        package.mkdir(parents=True)
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
        sys.path.insert(0, str(package.parent))
        platform.git_commit = lambda: "0123abc"
        all_reduce = dist.all_reduce

        def slow_all_reduce(*args: object, **kwargs: object) -> object:
            time.sleep(0.5)
            return all_reduce(*args, **kwargs)

        dist.all_reduce = slow_all_reduce
    return on_node(config=RUN, output=f"{folder}/out", slow=0.3)


def with_a_missing_rank(folder: str) -> Report | None:
    """Rank 1 dies before it says a word."""
    os.environ["ORYX_NODES"] = "n0 n1 n2"
    here = Path(folder, "here")
    if os.environ["RANK"] == "0":
        while not here.exists():  # so that rank 0 waits for rank 1 alone, and briefly
            time.sleep(0.05)
        return on_node(timeout=4.0)
    if os.environ["RANK"] == "2":
        here.touch()
        return on_node()
    return None


def texts(report: Report, check: str) -> list[str]:
    return [str(finding) for finding in report.findings if finding.check == check]


def test_names_the_bad_nodes(tmp_path) -> None:
    reports = run_distributed(with_faults, 3, str(tmp_path))
    report = reports[0]
    assert reports[1] == reports[2] == report  # every rank exits alike
    assert [t.partition(" (")[0] for t in texts(report, "clock")] == ["n1: clock is 30 s ahead of that of n0"]
    assert texts(report, "disk") == [
        f"n1: output folder {tmp_path}/other is not the same as on n0; use one on a file system that all nodes share"
    ]
    (config,) = texts(report, "config")
    assert config.startswith("n1: config hash ")
    assert config.endswith(" on n0 and 1 more")
    (versions,) = texts(report, "versions")
    assert versions.startswith("n2: numpy 0.1, but 2.")
    (code,) = texts(report, "code")
    assert code.startswith("n2: commit 0123abc, but ")
    (slow,) = texts(report, "all-reduce")
    assert slow.startswith("n2: all-reduce between nodes: with n0 ")
    assert set(report.measured["all-reduce between nodes in GB/s"]) == {"n0–n1", "n1–n2", "n2–n0"}
    assert report.measured["clock difference in s"]["n2"] < 1
    assert not list(Path(tmp_path, "out").iterdir())
    assert report.lines()[-1] == "health: 3 nodes, 3 ranks: 6 findings"


def test_names_the_missing_node(tmp_path) -> None:
    first, _, last = run_distributed(with_a_missing_rank, 3, str(tmp_path))
    assert first == last
    assert texts(first, "present") == ["n1: rank 1 did not report"]
    assert "bandwidth was not measured" in texts(first, "all-reduce")[0]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without torchrun or Slurm; leaves the environment as it was."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURMD_NODENAME", "here")


def test_command_line(alone, capsys, tmp_path) -> None:
    """All well: 0. A finding: 1, with the node, also as JSON."""
    arguments = [RUN, f"output_dir={tmp_path}/out", "--write-mb=1", "--min-write-mbs=0", "--reduce-mb=0.1"]
    assert health.main([*arguments, "--min-free-gb=0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "health: 1 nodes, 1 ranks: all well"
    assert health.main([*arguments, "--min-free-gb=1e9", "--gpus=8", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {(f["nodes"][0], f["check"]) for f in report["findings"]} == {("here", "disk"), ("here", "gpus")}
    assert any(f["text"] == "sees 0 GPUs of 8" for f in report["findings"])
    (tmp_path / "file").touch()
    assert health.main([RUN, f"output_dir={tmp_path}/file/out", "--min-free-gb=0"]) == 1
    expected = f"health: here: output folder {tmp_path}/file/out cannot be written to: Not a directory"
    assert capsys.readouterr().out.splitlines()[0] == expected
    assert health.main([RUN, "train.iterations=many"]) == 1
    expected = "health: here: override `train.iterations=many`: train.iterations: expected integer"
    assert expected in capsys.readouterr().out
    assert health.main(["--slow=-1"]) == 2
    assert capsys.readouterr().err == "error: --slow: -1 should not be negative\n"


def test_full_disk(alone, tmp_path) -> None:
    """A file system that fills up while the test file is written."""
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        report = health.check(Options(output=str(small), **LENIENT | {"write_mb": 4}))
        assert texts(report, "disk") == [f"here: output folder {small} cannot be written to: No space left on device"]
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_unreachable_first_node(alone, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError, match=r"here: cannot reach rank 0 at 127\.0\.0\.1:1: ") as caught:
        health.check(Options(timeout=1.0))
    assert caught.value.rank_local


@pytest.mark.parametrize("count", range(1, 9))
def test_turns_of_the_ring_are_disjoint_and_cover_it(count: int) -> None:
    """Turns are disjoint; together they are the ring's edges, each once."""
    nodes = [f"n{i}" for i in range(count)]
    turns = ring(nodes)
    for turn in turns:
        ends = [node for pair in turn for node in pair]
        assert len(ends) == len(set(ends))
    edges = sorted(tuple(sorted(pair)) for turn in turns for pair in turn)
    wanted = {tuple(sorted((nodes[i], nodes[(i + 1) % count]))) for i in range(count)} if count > 1 else set()
    assert edges == sorted(wanted)


def test_a_node_slow_with_both_neighbours_is_blamed_else_the_pair() -> None:
    """Slow with both neighbours: the node. Slow with one: the pair."""

    def blamed(**speeds: float | str) -> list[tuple[str, ...]]:
        pairs = {name.replace("_", "–"): value for name, value in speeds.items()}
        return [f.nodes for f in judge.judge_pairs(pairs, Options(slow=0.6))]

    assert blamed(a_b=10.0, b_c=9.0, c_d=8.0, d_a=10.0) == []
    assert blamed(a_b=10.0, b_c=2.0, c_d=1.0, d_a=10.0) == [("c",)]
    assert blamed(a_b=10.0, b_c="timed out", c_d=1.0, d_a=10.0) == [("c",)]
    assert blamed(a_b=10.0, b_c=2.0, c_d=9.0, d_a=10.0) == [("b", "c")]
    assert blamed(a_b=10.0, b_c=1.0, c_a=1.0) == [("c",)]
    assert blamed(a_b="failed") == [("a", "b")]
    slow = judge.judge_pairs({"a–b": 3.0}, Options(min_gbps=5.0))
    assert str(slow[0]).startswith("a, b: all-reduce between the two: 3 GB/s (should be at least 5)")
