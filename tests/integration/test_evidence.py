"""evidence.py: its text, schedule and cut-off, and the tables of routing. Trainings are in test_fidelity.py."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FIDELITY = Path(__file__).resolve().parents[2] / "benchmarks" / "fidelity"
SENTENCE = "the quick brown fox jumps over the lazy dog and runs away from the old house near the river "


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of benchmarks/fidelity by name."""
    monkeypatch.syspath_prepend(str(FIDELITY))
    return importlib.import_module


# ------------------------------------------------------------------------------------------------------------ texts


def test_text_of_packages(module: Callable[[str], Any], tmp_path: Path) -> None:
    """Packages are held out whole; code, documents and sentences; what training text has is not held out."""
    texts = module("texts")
    site, out = tmp_path / "site", tmp_path / "out"
    paragraph = (SENTENCE * 3).strip().capitalize() + "."
    shared = "# shared\n" + "x = 1\n" * 50
    for number in range(40):
        package = site / f"package{number}"
        package.mkdir(parents=True)
        (package / "code.py").write_text(
            f'"""About {number}.\n\n{paragraph[:-1]} {number} times.\n"""\n' + "y = 2\n" * 50
        )
        (package / "shared.py").write_text(shared)
        (package / "guide.md").write_text(f"# Guide {number}\n\n" + "- item\n" * 40)
        (package / "binary.py").write_bytes(b"\xff\xfe" * 200)
        (package / "names.txt").write_text("name\n" * 100)
        described = site / f"package{number}-1.0.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Name: p\nLicense: MIT\n\nRead {number}. " + paragraph * 2)
    found = list(texts.files([site], 0.3))
    held_out = {file.package for file in found if file.held_out}
    assert 4 < len(held_out) < 24
    assert all(file.held_out == (file.package in held_out) for file in found)
    out.mkdir()
    sizes = texts.gather(found, out, most=dict.fromkeys(("train", *texts.KINDS), 1e9), processes=2)
    read = {name: [json.loads(line)["text"] for line in (out / f"{name}.jsonl").open()] for name in sizes}
    assert set(read) == {"train", "code", "docs", "prose"}
    assert read["train"].count(shared) == 1
    assert shared not in read["code"]
    assert len(read["code"]) == len(held_out)
    assert len(read["docs"]) == 2 * len(held_out)
    assert len(read["train"]) == 3 * (40 - len(held_out)) + 1
    assert all("License" not in text and "name\nname" not in text for some in read.values() for text in some)
    told = "".join(read["prose"])
    assert all(f" {name.removeprefix('package')} times." in told for name in held_out)
    assert sizes["code"] == sum(len(text.encode()) for text in read["code"])


# --------------------------------------------------------------------------------------------------------- schedule


def job(evidence: Any, folder: Path, name: str, code: str, *after: str, pool: str = "cpu", **more: Any) -> Any:
    """A job that runs Python, done when its file is there; `WROTE` in the code writes it."""
    path = folder / name
    code = code.replace("WROTE", f"open({str(path)!r}, 'w').close()")
    return evidence.Job(name, pool, [sys.executable, "-c", code], path.is_file, after, **more)


def test_jobs_follow_each_other_and_the_time_ends(
    module: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence = module("evidence")
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {0!r}]); time.sleep(60)"
    late = f"import time; time.sleep(8); open({str(tmp_path / 'late')!r}, 'w')"
    grows, kept = tmp_path / "grows", tmp_path / "kept" / "grows"
    jobs = [
        job(evidence, tmp_path, "first", "WROTE"),
        job(evidence, tmp_path, "second", f"assert open({str(tmp_path / 'first')!r}); WROTE", "first"),
        job(evidence, tmp_path, "wrong", "print('the reason'); raise SystemExit(3)"),
        job(evidence, tmp_path, "after wrong", "WROTE", "wrong"),
        job(evidence, tmp_path, "long", f"open({str(grows)!r}, 'w').write('so far'); " + child.format(late)),
        job(evidence, tmp_path, "no time", "WROTE", pool="train"),
    ]
    jobs += [job(evidence, tmp_path, f"after {name}", "WROTE", name) for name in ("after wrong", "no time")]
    idle = evidence.Schedule(time.time() + 20, tmp_path / "out", time.time())
    assert idle.run([*jobs[2:4], *jobs[5:]], {"cpu": 4, "train": 1}) == ["wrong"]
    assert idle.left > 10  # what needs a job that is lost is not waited for
    capsys.readouterr()
    schedule = evidence.Schedule(time.time() + 5, tmp_path / "out", time.time(), kept=[(grows, kept)])
    assert schedule.run(jobs, {"cpu": 4, "train": 1}) == ["wrong"]
    assert time.time() < schedule.end + 3
    told = capsys.readouterr().out
    for line in (
        "second: done in ",
        "wrong: FAILED (3) in ",
        "    the reason\n",
        "long: out of time",
        "no time: no time left for it",
    ):
        assert line in told
    assert "the reason" in (tmp_path / "out" / "logs" / "wrong.txt").read_text()
    assert not (tmp_path / "after wrong").exists()
    assert not (tmp_path / "no time").exists()
    assert kept.read_text() == "so far"
    time.sleep(max(0.0, schedule.begun + 9.5 - time.time()))
    assert not (tmp_path / "late").exists()  # what a job started ends with it
    again = evidence.Schedule(time.time() + 5, tmp_path / "out", time.time())
    assert again.run(jobs[:2], {"cpu": 1}) == []
    assert "done" not in capsys.readouterr().out  # both were


def test_processes_are_spread_over_gpus(module: Callable[[str], Any], tmp_path: Path) -> None:
    """Each sees the one with the fewest others; what needs none keeps what it was given."""
    evidence = module("evidence")
    see = "import os, time; WROTE; open({!r}, 'w').write(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.7)"
    jobs = []
    for i, on_gpu in enumerate([True, True, True, True, False]):
        code = see.format(str(tmp_path / f"gpu of {i}"))
        hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
        jobs.append(job(evidence, tmp_path, f"{i}", code, pool="router", on_gpu=on_gpu, environment=hidden))
    schedule = evidence.Schedule(time.time() + 20, tmp_path / "out", time.time(), ["3", "GPU-5a", "7"])
    assert schedule.run(jobs, {"router": 5}) == []
    assert [(tmp_path / f"gpu of {i}").read_text() for i in range(5)] == ["3", "GPU-5a", "7", "3", ""]


def test_what_runs(module: Callable[[str], Any], tmp_path: Path) -> None:
    """Trainings in order of worth with the iterations that the tokens make, a router after each of Oryx's."""
    evidence = module("evidence")
    seen = {}

    class Stop(Exception):
        pass

    def run(self: Any, jobs: Any, slots: dict[str, int]) -> list[str]:
        seen.update(jobs=jobs, slots=slots, kept=self.kept)
        raise Stop

    arguments = ["--out", str(tmp_path / "out"), "--tokens", "6.5536", "--seeds", "4", "5", "--gpus", "0", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence.Schedule, "run", run)
        with pytest.raises(Stop):
            evidence.main.__wrapped__(arguments)
    names = [job.name for job in seen["jobs"]]
    warm = ["kernels-gdn", "reading-gdn", "kernels-mamba2", "reading-mamba2"]
    assert names[:7] == ["texts", *warm, "language-gdn-4", "routing-gdn-4"]
    trainings = [name.removeprefix("language-") for name in names if name.startswith("language-")]
    assert trainings == [
        "gdn-4", "mamba2-4", "gdn-5", "mamba2-5", "gdn-hybrid-4", "mamba2-hybrid-4", "gdn-hybrid-5", "mamba2-hybrid-5",
    ]  # fmt: skip
    assert (seen["slots"]["train"], seen["slots"]["router"]) == (4, 4)
    assert "routing-gdn-hybrid-4" not in names
    assert {"needle-gdn-hybrid-5", "policy-needle-gdn-5", "mqar-cpu-mamba2-hybrid-4"} <= set(names)
    assert {"policy-mqar-cpu-gdn-4", "policy_3-mqar-cpu-gdn-4"} <= set(names)
    by_name = {job.name: job for job in seen["jobs"]}
    assert by_name["language-mamba2-5"].after == ("texts", "kernels-gdn", "kernels-mamba2")
    assert by_name["routing-gdn-4"].after == ("language-gdn-4", "reading-gdn")
    assert "data.documents=isolated" in by_name["reading-mamba2"].command
    policies = by_name["policy-needle-gdn-5"]
    assert policies.after == ("needle-gdn-5",)
    written = tmp_path / "out" / "needle" / "policy" / "gdn-5.json"
    written.parent.mkdir(parents=True)
    for finished in (False, True):
        written.write_text(json.dumps({"finished": finished, "rows": []}))
        assert policies.done() is finished
    text = (tmp_path / "out.work" / "language" / "gdn-hybrid-4" / "run.yaml").read_text()
    assert "iterations: 100\n" in text
    assert f"{tmp_path}/out.work/texts/prose" in text
    command = by_name["needle-gdn-4"].command()
    assert command[:3] == ["nice", "-n", "10"]
    assert 300 < float(command[command.index("--budget") + 1]) < 540


# ---------------------------------------------------------------------------------------------------------- routing


def result(seed: int, gap: float) -> dict[str, Any]:
    """Two sets of 100 and 300 tokens; a policy closes part of the gap."""
    rows = []
    for policy, wanted, share, part in (
        ("attention", None, 1.0, 1.0),
        ("recurrent", None, 0.0, 0.0),
        ("router", 0.1, 0.08, 0.4),
        ("router", 0.2, 0.16, 0.8),
        ("random", 0.1, 0.1, 0.1),
        ("seen", None, 0.5, 0.9),
    ):
        for name, tokens in (("code", 100), ("prose", 300)):
            loss = 3.0 - gap * part
            rows.append({"policy": policy, "wanted": wanted, "set": name, "loss": loss, "share": share,
                         "tokens": tokens, "bytes": 4 * tokens})  # fmt: skip
    return {"model": "gdn", "seed": seed, "rows": rows, "finished": False}


def test_routing_tables(module: Callable[[str], Any], tmp_path: Path) -> None:
    routing = module("routing")
    for seed, gap in ((1, 0.5), (2, 0.25)):
        (tmp_path / f"gdn-{seed}.json").write_text(json.dumps(result(seed, gap)))
    (tmp_path / "mamba2-1.json").write_text(json.dumps(result(1, 0.5) | {"rows": []}))  # only begun
    cut = result(3, 0.5)
    cut["rows"] = cut["rows"][:3]  # one of the two sets of `recurrent` is missing
    (tmp_path / "gdn-3.json").write_text(json.dumps(cut))
    first = result(1, 0.5)
    shares, parts = zip(*routing.closed(first, "router", ["code", "prose"]))
    assert (shares, parts) == (pytest.approx((0.08, 0.16)), pytest.approx((0.4, 0.8)))
    assert routing.closed_at([(0.08, 0.4), (0.16, 0.8)], 0.1) == pytest.approx(0.5)
    assert routing.closed_at([(0.08, 0.4), (0.16, 0.8)], 0.04) == pytest.approx(0.2)
    assert routing.closed_at([(0.08, 0.4)], 0.1) is None
    (attention,) = routing.curve(first, "attention", ["code", "prose"])
    assert attention.bits == pytest.approx(2.5 / 4 / 0.6931, rel=1e-3)
    text = routing.summarize(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("| gdn")]
    assert len(lines) == 3 + len(routing.POLICIES)
    assert "| gdn | router | 10% (10% to 10%) | 25% (25% to 25%) | 50% (50% to 50%) | 82% (82% to 82%) |" in lines
    assert lines[0].startswith(
        "| gdn | 2 | all | 1.082 (1.082 to 1.082) | 0.947 (0.902 to 0.992) | 50% (50% to 50%) |  | 10%"
    )
    assert lines[0].endswith("| 90% at 50% |")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert "gdn,1,code,router,0.1,0.0800,2.80000,1.00989" in (tmp_path / "routing.csv").read_text().splitlines()
