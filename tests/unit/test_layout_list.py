"""The list of layouts: what is started on which GPUs, what becomes of cases that fail, and where it continues."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import layout_list  # noqa: E402
import layouts  # noqa: E402
from layout_cases import Found, parse_layout, table, versus_gpt, versus_one, with_data  # noqa: E402

from oryx_megatron.config.schema import ParallelConfig, PrecisionConfig  # noqa: E402
from oryx_megatron.config.validate import validate  # noqa: E402

STAND_IN = """
import argparse, json, os, sys, time
from pathlib import Path
from types import SimpleNamespace

parser = argparse.ArgumentParser()
for name in ("cases", "report", "profile"):
    parser.add_argument("--" + name, type=Path)
parser.add_argument("--compile", action="store_true")
a = parser.parse_args()
rank = os.environ["RANK"]
with Path({log!r}).open("a") as file:
    gpus, what = os.environ["CUDA_VISIBLE_DEVICES"], "compile" if a.compile else "measure"
    file.write(json.dumps([time.time(), rank, gpus, what]) + chr(10))
if a.compile:
    time.sleep(0.3)
    sys.exit(0)
for number, plain in enumerate(json.loads(a.cases.read_text())):
    case = SimpleNamespace(**plain)

    def tell(**line):
        if rank == "0":
            with a.report.open("a") as file:
                file.write(json.dumps(line) + chr(10))

    if number and "data=1" in a.cases.read_text():
        tell(anew="9.9 GiB are still held")
        break
    tell(begun=number)
    if "recompute=mixer" in case.layout and rank == "1":
        a.report.with_suffix(".1.error").write_text(json.dumps({{"failed": "RuntimeError: rank 1 has no kernel"}}))
        os._exit(1)
    if "recompute=mixer" in case.layout or "recompute=full" in case.layout:
        time.sleep(60)
    if "optimizer" in case.plan:
        tell(case=number, failed="such a run would be refused")
        continue
    if case.plan == "killed":
        os.kill(os.getpid(), 9)
    time.sleep(0.2)
    speed = 100.0 * case.gpus * (2 if case.model == "gpt" else 1)
    tell(case=number, found=dict(
        model=case.model, layout=case.layout, micro=case.micro, graphs=case.graphs, peak_gib=1, planned_gib=1,
        outside_gib=1, tokens_per_second=speed, planned_tokens_per_second=speed, idle=0, exchange=0, loss=1,
        gpus=case.gpus, sequence=case.sequence, batch=case.batch, plan=case.plan, fp8=case.fp8,
    ))
"""
HEAD = "models: [tiny-gdn, gpt]\ngpt: tiny-transformer\nsequence: 64\nmicro: 1\nmicrobatches: 2\ncases:\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Work through a list with ranks that only say what they would have measured; returns results and what started."""
    log = tmp_path / "log"
    (tmp_path / "layouts.py").write_text(STAND_IN.format(log=str(log)))
    monkeypatch.setattr(layout_list, "HERE", tmp_path)
    monkeypatch.setattr(layout_list, "POLL", 0.02)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def go(cases: str, *more: str, gpus: int = 2, head: str = HEAD) -> tuple[layout_list.Results, list[list]]:
        (tmp_path / "list.yaml").write_text(head + textwrap.indent(textwrap.dedent(cases).strip("\n"), "  ") + "\n")
        log.write_text("")
        out = tmp_path / "out"
        asked = [str(tmp_path / "list.yaml"), "--gpus", str(gpus), "--out", str(out), *more]
        assert layout_list.main(asked) == 0
        return layout_list.Results(out / "layouts.json"), [json.loads(line) for line in log.read_text().splitlines()]

    return go


def test_what_fails_is_said_and_the_next_case_begins(run, capsys) -> None:
    cases = """
    - {layout: "recompute=mixer"}
    - {layout: tensor=2, plan: optimizer}
    - {layout: tensor=2, plan: killed, models: [tiny-gdn]}
    - {layout: tensor=2}
    - {layout: tensor=4}
    """
    head = HEAD.replace("cases:", "together: 5\ncases:")
    results, started = run(cases, head=head)
    assert [(r.model, r.layout) for r in results.found] == [("tiny-gdn", "tensor=2"), ("gpt", "tensor=2")]
    why = {(case.model, case.plan): why for case, why in results.failed}
    assert why["tiny-gdn", "ratio:0.5"] == why["gpt", "ratio:0.5"] == "RuntimeError: rank 1 has no kernel"
    assert why["gpt", "optimizer"] == "such a run would be refused"
    assert why["tiny-gdn", "killed"].startswith(("rank 0 ended with signal 9", "rank 1 ended with signal 9"))
    assert len(started) == 2 * 4  # both ranks, anew after each of three deaths
    printed = capsys.readouterr().out
    assert "gpt data=2,recompute=mixer (64 tokens, graphs): RuntimeError: rank 1 has no kernel" in printed
    assert "2 measured, 5 failed, 0 left" in printed


def test_a_case_that_hangs_costs_its_seconds_alone(run) -> None:
    begun = time.monotonic()
    cases = """
    - {layout: "tensor=2,recompute=full", models: [tiny-gdn]}
    - {layout: tensor=2, models: [tiny-gdn]}
    """
    results, _ = run(cases, "--case-seconds", "3")
    assert time.monotonic() - begun < 20
    assert [why for _, why in results.failed] == ["did not end within 3 s"]
    assert [r.layout for r in results.found] == ["tensor=2"]


def test_continues_where_it_was_cut_off(run, capsys) -> None:
    cases = """
    - {layout: tensor=2, models: [tiny-gdn]}
    - {layout: "data=2,recompute=full", models: [tiny-gdn]}
    """
    results, _ = run(cases, "--minutes", "0.1")
    assert [r.layout for r in results.found] == ["tensor=2"]
    assert results.failed == []
    printed = capsys.readouterr().out
    assert "cut off, the 0.1 minutes are over" in printed
    assert "1 measured, 0 failed, 1 left: the same command continues" in printed
    results, started = run(cases.replace("recompute=full", "overlap=false"))
    assert [r.layout for r in results.found] == ["tensor=2", "data=2,overlap=false"]
    assert len(started) == 2  # ranks of one start


def test_ranks_that_hold_memory_begin_anew(run, capsys) -> None:
    results, started = run("- {one_gpu: true}")
    assert [r.model for r in results.found] == ["tiny-gdn", "gpt"]
    assert results.failed == []
    assert len(started) == 2
    assert "9.9 GiB are still held" in capsys.readouterr().out


class EndsWhenAsked:
    """A rank that says its last words just before it is seen to have ended."""

    pid, returncode = 0, 0

    def __init__(self, report: Path) -> None:
        self.report = report

    def poll(self) -> int:
        with self.report.open("a") as file:
            file.write(json.dumps({"anew": "9.9 GiB are still held"}) + "\n")
        return 0

    def wait(self) -> int:
        return 0


def test_last_words_of_ranks_that_have_ended_count(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(HEAD + "  - {one_gpu: true}\n")
    [launch] = layout_list.launches(layout_list.read_list(tmp_path / "list.yaml"), 1)
    launch.report = tmp_path / "report"
    launch.report.touch()
    launch.ranks = [EndsWhenAsked(launch.report)]
    arguments = argparse.Namespace(gpus=1, minutes=1, case_seconds=60, out=tmp_path)
    runner = layout_list.Runner([], layout_list.Results(tmp_path / "layouts.json"), arguments)
    runner.running = [launch]
    runner._watch(launch)
    assert runner.kept.failed == []
    assert [again.cases for again in runner.queue] == [launch.cases]


def test_side_by_side_on_own_gpus(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One-GPU cases of two models run at once; kernels are compiled first, shapes side by side, once a shape."""
    monkeypatch.setattr(layout_list, "has_gpu", lambda: True)
    cases = """
    - {one_gpu: true, beside: true, models: [tiny-gdn, gpt, tiny-mamba2]}
    - {layout: tensor=2}
    - {layout: data}
    """
    results, started = run(cases)
    assert len(results.found) == 3 + 4
    compiled = [gpus for _, _, gpus, what in started if what == "compile"]
    assert len(compiled) == len(results.compiled) == 3  # 4 heads of both mixers, 2 heads of one
    assert compiled[:2] == ["0", "1"]
    alone = [row for row in started if row[3] == "measure" and "," not in row[2]]
    assert {row[2] for row in alone} == {"0", "1"}
    assert len(alone) == 3
    assert [row[2] for row in started if row[3] == "measure" and row not in alone] == ["0,1"] * 4
    data = [r for r in results.found if r.layout == "data=2"]
    assert [versus_gpt(r, results.found) for r in data] == [0.5, 1.0]
    assert [versus_one(r, results.found) for r in data] == [2.0, 2.0]


def test_each_peer_is_a_base_of_its_own() -> None:
    """Against the best of megatron-core's hybrid under the same layout, and against GPT there."""
    speeds = [("1.4b-gdn", 90.0), ("gpt", 60.0), ("mcore-gdn", 45.0), ("mcore-gdn-plain", 50.0)]
    found = [
        Found(model, layout, 2, False, 1, 1, 1, speed * factor, 1, 0, 0, 1, gpus=2, sequence=64, batch=8)
        for layout, factor in (("data=2", 1.0), ("tensor=2", 0.5))
        for model, speed in speeds
    ]
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table(found).splitlines())
    against = [row[head.index("vs GPT") : head.index("vs mcore-gdn") + 1] for row in rows]
    assert against == 2 * [["1.50", "1.80"], ["1.00", "1.20"], ["0.75", "0.90"], ["0.83", "1.00"]]
    assert {len(row) for row in rows} == {len(head)}


def test_a_peer_has_the_shape_of_a_preset(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(
        "models: [tiny-gdn, gpt, mcore-gdn]\ngpt: tiny-transformer\nhybrid: tiny-gdn-hybrid\ncases: [{layout: data}]\n"
    )
    (launch,) = layout_list.launches(layout_list.read_list(tmp_path / "list.yaml"), 2)
    assert [case.shape_of for case in launch.cases] == ["tiny-gdn", "tiny-transformer", "tiny-gdn-hybrid"]


@pytest.mark.parametrize(
    ("text", "gpus", "found"),
    [
        ("", 8, "data=8"),
        ("tensor=2", 8, "tensor=2,data=4"),
        ("tensor=2", 2, "tensor=2"),
        ("tensor=4", 2, None),
        ("data=8", 4, None),
        ("recompute=full", 1, "data=1,recompute=full"),
        ("pipeline=2,virtual_pipeline=2", 4, "pipeline=2,virtual_pipeline=2,data=2"),
        ("expert=8", 4, None),
        ("expert=4", 8, "data=8,expert=4"),
        ("tensor=2,context=2", 8, "tensor=2,context=2,data=2"),
    ],
)
def test_layouts_on_fewer_gpus(text: str, gpus: int, found: str | None) -> None:
    assert with_data(text, gpus) == found
    if found is not None:
        parse_layout(found, gpus)


@pytest.mark.parametrize("gpus", [8, 4, 2, 1])
def test_the_list_for_eight_gpus(gpus: int) -> None:
    """Every case is a run that is accepted, on any number of GPUs."""
    plan = layout_list.read_list(ROOT / "benchmarks/layouts-8.yaml")
    cases = [case for launch in layout_list.launches(plan, gpus) for case in launch.cases]
    assert len(cases) > {8: 60, 4: 40, 2: 25, 1: 10}[gpus]
    for case in cases:
        run = layouts.run_config(case)
        validate(dataclasses.replace(run, precision=PrecisionConfig(fp8=run.precision.fp8)), case.gpus)
        if case.model != "gpt":
            assert layout_list.shape(case)
            assert layouts.share_of(case).parallel == ParallelConfig()


def test_errors(tmp_path: Path, capsys) -> None:
    (tmp_path / "wrong.yaml").write_text(HEAD + "  - {layout: tensor=2, sequense: 64}\n")
    asked = [str(tmp_path / "wrong.yaml"), "--gpus", "2", "--out", str(tmp_path / "out")]
    assert layout_list.main(asked) == 2
    assert "cases[0].sequense" in capsys.readouterr().err
    (tmp_path / "wrong.yaml").write_text(HEAD + "  - {layout: tensr=2}\n")
    assert layout_list.main(asked) == 2
    assert "tensr=2: expected field=value" in capsys.readouterr().err
