"""The monitor and the summary, from files that grow, break off, are replaced, or are not there."""

import dataclasses
import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oryx_megatron import monitor
from oryx_megatron.config import to_yaml
from oryx_megatron.errors import ConfigError
from oryx_megatron.monitor import Followed, table
from oryx_megatron.testing.layouts import tiny_run
from oryx_megatron.train import web
from oryx_megatron.train.callbacks import MetricsFile
from oryx_megatron.train.clock import PARTS
from oryx_megatron.train.history import Events, read_events, summarize, summary_lines
from oryx_megatron.train.intervals import Intervals, seconds_left
from oryx_megatron.train.signals import Stop, write_marker
from oryx_megatron.train.stragglers import slowest
from oryx_megatron.train.watching import fact_text


def step(iteration: int, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "iteration": iteration,
        "loss": 2.0,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 1000,
        "seconds": 2.0,
        "data_seconds": 0.25,
        "forward_backward_seconds": 1.25,
        "optimizer_seconds": 0.5,
        "model_flops": 1e12,
        "skipped": False,
    } | fields


def write(folder: Path, *lines: dict[str, Any], end: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines) + end)


def test_a_growing_file(tmp_path: Path) -> None:
    run = Followed(tmp_path / "run", "run")
    run.look()
    assert run.state(time.time()) == "no files"
    write(run.folder, step(1), step(2, loss=3.0), end='{"kind": "step", "iterat')
    (run.folder / "config.yaml").write_text("train: {iterations: 12}\n")
    run.look()
    assert ([line["iteration"] for line in run.steps], run.tokens) == ([1, 2], 2000)
    header, line, *_ = table([run], time.time())
    assert line.split() == ["run", "2/12", "2.5000", "1.00", "1.0e-03", "500", "0:20", "running"]
    assert header.split() == ["run", "step", "loss", "grad", "lr", "tok/s", "left", "state"]
    with (run.folder / "metrics.jsonl").open("a") as file:  # the rest of the line that was cut off
        file.write('ion": 3, "loss": NaN}\nnonsense\n')
    write(run.folder, {"kind": "evaluation", "iteration": 2, "dataset": "valid", "plan": "recurrent", "loss": 2.5})
    run.look()
    assert len(run.steps) == 2  # that step lacks what is shown
    assert "  valid, recurrent: loss 2.5000 at step 2" in table([run], time.time())


def test_a_replaced_file(tmp_path: Path) -> None:
    """A resumed run writes its metrics anew, without the steps that are done again."""
    run = Followed(tmp_path, "run")
    write(tmp_path, *(step(i) for i in range(1, 9)))
    run.look()
    write(tmp_path / "new", step(1), step(2), step(3, skipped=True, loss=float("nan")))
    os.replace(tmp_path / "new" / "metrics.jsonl", tmp_path / "metrics.jsonl")
    run.look()
    assert ([line["iteration"] for line in run.steps], run.skipped) == ([1, 2, 3], 1)
    assert "1 steps skipped" in table([run], time.time())[2]
    (tmp_path / "metrics.jsonl").unlink()
    run.look()
    assert not run.steps
    assert run.state(time.time()) == "no files"


@pytest.mark.parametrize("kind", [Followed, web.Recorded])
def test_an_extended_run(kind: type[Followed], tmp_path: Path) -> None:
    """A run that is done is resumed with more iterations while it is watched: the table and the page count to those."""
    run = kind(tmp_path, "run")
    for iterations in (4, 8, 6):
        length = tiny_run(train__iterations=iterations, train__exit_after=None, evaluation__batches=None)
        (tmp_path / "new.yaml").write_text(to_yaml(length))
        os.replace(tmp_path / "new.yaml", tmp_path / "config.yaml")
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        write(tmp_path, *(step(i) for i in range(1, 5)))
        run.look()
        line = table([run], time.time())[1].split()
        assert (line[1], line[6]) == (f"4/{iterations}", f"0:{2 * (iterations - 4):02}")
        if isinstance(run, web.Recorded):
            facts = run.facts(time.time())
            assert (facts["iterations"], facts["left"]) == (iterations, line[6])
            assert facts["loss"] == line[2]  # the page, the table and the summary show one loss
    (tmp_path / "config.yaml").write_text("train: [")  # no longer a config: no length, and no error
    run.look()
    assert table([run], time.time())[1].split()[1] == "4/?"


def test_states_follow_the_events(tmp_path: Path) -> None:
    run = Followed(tmp_path, "run")
    events = Events(tmp_path)
    events.start(0, ranks=2)
    run.look()
    assert run.state(time.time()) == "starting"
    write(tmp_path, step(1))
    run.look()
    assert run.state(time.time()) == "running"
    assert run.state(time.time() + 3600).startswith("silent 1:00:0")
    write_marker(tmp_path, Stop("SIGTERM", 1))
    assert run.state(time.time()) == "stopped"
    events.add("end", 1)
    run.look()
    assert run.state(time.time()) == "done"


def test_eighty_columns(tmp_path: Path) -> None:
    runs = []
    for name in ("short", "a-run-with-a-very-long-name-indeed-gdn-130m"):
        write(tmp_path / name, step(99_999_999, loss=12345.678, grad_norm=1e9, seconds=1e-4))
        Events(tmp_path / name).add("slow", 7, text="rank 5 (" + "host" * 30 + ") is slow")
        runs.append(Followed(tmp_path / name, name))
        runs[-1].look()
    for lines in (table(runs, time.time()), table(runs[:1], time.time())):
        assert max(map(len, lines)) <= 80
        assert len(lines) >= 3


def test_the_command_tells_runs_of_one_name_apart(tmp_path: Path) -> None:
    """Two runs of one name are told apart by their parents; a second look without news prints nothing."""
    for parent in ("a", "b"):
        write(tmp_path / parent / "run", step(1))
    command = [sys.executable, "-X", "importtime", "-m", "oryx_megatron.monitor"]
    command += [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"), str(tmp_path / "none"), "--once"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["run", "a/run", "b/run", f"{tmp_path.name}/none"[:20]] or names[1:3] == ["a/run", "b/run"]
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}  # starts at once
    out = io.StringIO()
    assert monitor.main([str(tmp_path / "a" / "run"), "--interval", "0"], out) == 2


DAMAGED = (
    b'{"kind": "step", "iteration": 5, "loss": 1.0}',
    b'{"kind": "step", "iteration": "five", "loss": "x", "tokens": "y"}',
    b'{"kind": "step", "iteration": 5, "loss": null, "tokens": 1}',
    b'{"kind": "step", "iteration": 5, "loss": 1.0, "tokens": 1, "seconds": "long"}',
    b'{"kind": "step", "iteration": 5, "loss": 1.0, "tokens": 1, "seconds": NaN}',
    b'{"kind": "step", "iteration": 5, "loss": 1.0, "tokens": -1}',
    b'{"kind": "step", "iteration": true, "loss": 1.0, "tokens": 1}',
    b'{"kind": "step", "iteration": 5, "loss": 1.0, "tokens": 1, "skipped": "no"}',
    b'{"kind": "evaluation", "iteration": 5, "dataset": ["valid"], "plan": {}, "loss": 1.0}',
    b'{"kind": ["step"], "iteration": 5}',
    b'{"event": "start", "time": "noon", "iteration": 5}',
    b'{"event": "checkpoint", "time": 1.0, "iteration": 5, "seconds": "many"}',
    b'{"event": "checkpoint", "time": 1e999, "iteration": 5}',
    b'{"event": 5, "time": 1.0, "iteration": 5}',
    b'{"kind": "step", "event": "x", "time": 1, "iteration": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\xff\xfe\x00",
    b"null",
    b"\x00" * 100,
)
"""Lines that a crash, a disk or another program left in metrics.jsonl and in events.jsonl."""


def test_damaged_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Everything is as if they were not there, and that they are is said once."""
    folder = tmp_path / "run"
    write(folder, step(1), step(2, skipped=True, loss=float("nan")))
    events = Events(folder)
    events.start(0, ranks=2)
    events.add("end", 2)
    time.sleep(0.01)
    expected = summarize(folder)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(b"".join(line + b"\n" for line in DAMAGED) + b"\n")
    write(folder, {"kind": "later", "iteration": 2, "loss": "unknown kinds are left alone"})
    assert summarize(folder) == expected
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}/{name}: left out {len(DAMAGED)} damaged lines, the first is line 3"
        for name in ("metrics.jsonl", "events.jsonl")
    ]
    out = io.StringIO()
    assert monitor.main([str(folder), "--once"], out) == 0
    text = out.getvalue()
    assert text.count("damaged") == 2
    assert f"left out {len(DAMAGED)} damaged lines of metrics.jsonl of run" in text
    assert text.splitlines()[1].endswith(" done")


def test_a_resumed_run_among_damaged_lines(tmp_path: Path) -> None:
    """It keeps the steps up to its checkpoint, and its events do not join a line that was cut off."""
    write(tmp_path, step(1), step(2), end='{"kind": "step", "iterat')
    (tmp_path / "events.jsonl").write_text('{"event": "start", "time": 1.0, "iteration": 0}\n{"event": "sto')
    reporter = MetricsFile(tmp_path / "metrics.jsonl")
    reporter.on_start(tiny_run(), 1)
    reporter.on_end()
    Events(tmp_path).start(1)
    assert [json.loads(line)["iteration"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "lost", "start"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "unreadable YAML", "deep YAML"])
def test_files_that_are_no_files(tmp_path: Path, kind: str) -> None:
    """Nothing hangs; the monitor shows what there is."""
    for name in ("metrics.jsonl", "events.jsonl", "config.yaml", "requeue"):
        path = tmp_path / name
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif name == "config.yaml":
            path.write_bytes(b"\xff" if kind == "unreadable YAML" else b"[" * 50_000)
    out = io.StringIO()
    assert monitor.main([str(tmp_path), "--once"], out) == 0
    assert len(out.getvalue().splitlines()) == 2


def test_summary(tmp_path: Path) -> None:
    """Two starts, the first of which was killed: each step counts once, what was lost counts against goodput."""
    write(tmp_path, *(step(i) for i in range(1, 9)), step(9, skipped=True), step(10))
    lines = [
        {"event": "start", "time": 1000.0, "iteration": 0},
        {"event": "checkpoint", "time": 1010.0, "iteration": 4, "seconds": 3.0},
        {"event": "lost", "time": 1020.0, "iteration": 4},
        {"event": "start", "time": 2000.0, "iteration": 4},
        {"event": "skip", "time": 2010.0, "iteration": 9},
        {"event": "evaluation", "time": 2015.0, "iteration": 10, "seconds": 2.0},
        {"event": "end", "time": 2020.0, "iteration": 10},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "sta')
    summary = summarize(tmp_path, peak_flops=2e12)
    assert summary["seconds"] == {
        "running": 40.0,  # 980 seconds in the queue are not running
        "data": 2.5,
        "forward_backward": 12.5,
        "optimizer": 5.0,
        "checkpoint": 3.0,
        "evaluation": 2.0,
        "other": 15.0,
    }
    assert summary["goodput"] == 18.0 / 40.0
    assert summary["mfu"] == 10e12 / 20.0 / 2e12
    assert (summary["tokens"], summary["iterations"], summary["restarts"]) == (10_000, 10, 1)
    assert (summary["skipped_steps"], summary["rollbacks"]) == (1, 0)
    text = summary_lines(summary)
    assert max(map(len, text)) <= 80
    assert text[0] == "10 steps, 10.0k tokens, 500 tokens/s while stepping, MFU 25.0%"
    assert all(any(part.replace("_", "-") in line for line in text) for part in PARTS)


def test_final_loss_is_one_number(tmp_path: Path) -> None:
    """Mean of the steps behind the last line on the terminal, without bad ones: in the summary and in the monitor."""
    write(tmp_path, *(step(i) for i in range(1, 21)), step(21, loss=3.0), step(22, loss=9.0, skipped=True),
          step(23, loss=2.0))  # fmt: skip
    summary = summarize(tmp_path, interval=10)
    assert (summary["loss"], summary["loss_steps"]) == (2.5, [21, 23])
    assert "final training loss 2.5000 (mean of steps 21–23)" in summary_lines(summary)
    events = Events(tmp_path)
    events.start(0)
    events.add("stop", 23, reason="train.exit_after", saved=23)
    run = tiny_run(train__iterations=30, logging__interval=10)
    (tmp_path / "config.yaml").write_text(to_yaml(run))
    out = io.StringIO()
    assert monitor.main([str(tmp_path), "--once"], out) == 0
    head, row, told, *_ = out.getvalue().splitlines()
    assert head.split()[2] == "loss"
    assert row.split()[2] == "2.5000"
    assert row.split()[-1] == "stopped"
    assert told.endswith("final training loss 2.5000 (mean of steps 21–23)")


def test_a_changed_field_is_shown_old_to_new() -> None:
    event = {"event": "change", "time": 1.0, "iteration": 80, "field": "optimizer.lr", "before": 0.002, "after": 0.001}
    assert fact_text(event) == "optimizer.lr 0.002 → 0.001"
    assert fact_text({"event": "evaluation", "time": 1.0, "iteration": 8, "seconds": 61.04}) == "seconds 61.0"
    assert fact_text({"event": "skip", "time": 1.0, "iteration": 8, "loss": 0.00125}) == "loss 0.00125"


def test_resumes_and_restarts(tmp_path: Path) -> None:
    kinds = ("start", "lost", "start", "stop", "start", "end", "start")
    lines = [{"event": kind, "time": 1000.0 + i, "iteration": i} for i, kind in enumerate(kinds)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = summarize(tmp_path)
    assert (summary["resumes"], summary["restarts"]) == (2, 1)
    write(tmp_path, step(1))
    run = web.Recorded(tmp_path, "run")
    run.look()
    assert "2 resumes, 1 restart" in table([run], 2000.0)
    assert run.facts(2000.0)["starts"] == [2, 1]
    run.events = run.events[:1]
    assert not any("resume" in line for line in table([run], 2000.0))


def test_time_left_counts_evaluations_and_saves() -> None:
    """From step 5 on: evaluations after 6, 8, 9 and 12, saves after 10 and 12, of which the last is the end."""
    run = tiny_run(
        train__iterations=12, train__global_batch_size=2, evaluation__interval=3, evaluation__steps=(0, 8, 40),
        checkpoint__interval=10,
    )  # fmt: skip
    intervals = Intervals(run)
    assert [i for i in range(13) if intervals.evaluate(i)] == [0, 3, 6, 8, 9, 12]
    assert [i for i in range(13) if intervals.save(i, 12)] == [10, 12]
    assert intervals.left(5, 12) == intervals.left(6, 12) == (4, 2)  # a line is written before what its step brings
    assert intervals.left(6, 12, {"evaluation"}) == (3, 2)
    assert intervals.left(10, 12, {"evaluation", "checkpoint"}) == intervals.left(11, 12) == (1, 1)
    assert seconds_left(run, 5, 12, sample=0.5, evaluation=100.0, save=1000.0) == 7 * 2 * 0.5 + 400.0 + 2000.0
    # None was measured yet: 3 plans × 8 batches × 2 samples, each a third of a step's half second.
    assert seconds_left(run, 5, 12, sample=0.5, evaluation=0.0, save=1000.0) == 7 * 2 * 0.5 + 4 * 8.0 + 2000.0
    best = dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, keep_best="valid/recurrent"))
    assert Intervals(best).left(5, 12) == (5, 2)
    assert (Intervals(best).left(10, 12), Intervals(best).left(10, 12, {"evaluation"})) == ((2, 2), (1, 2))
    assert Intervals(run).left(5, 7) == (1, 1)  # train.exit_after=7: saved there, not evaluated


def test_nothing_to_sum_up(tmp_path: Path) -> None:
    summary = summarize(tmp_path)
    assert (summary["iterations"], summary["goodput"], summary["mfu"]) == (0, None, None)
    assert max(map(len, summary_lines(summary))) <= 80


def test_a_start_closes_what_died(tmp_path: Path) -> None:
    events = Events(tmp_path)
    events.start(0)
    write(tmp_path, step(1))
    for name in ("metrics.jsonl", "events.jsonl"):
        os.utime(tmp_path / name, (0, 1000.0))  # the last sign of life
    events.start(0)
    events.add("stop", 3, reason="SIGTERM")
    events.start(3)
    kinds = [(event["event"], event["time"]) for event in read_events(tmp_path)]
    assert [kind for kind, _ in kinds] == ["start", "lost", "start", "stop", "start"]
    assert kinds[1][1] == 1000.0


def test_the_slowest_rank() -> None:
    """Compared with those that hold the same part of the model only: another stage may well take longer."""
    peers = [((0, stage, 0), f"host{replica}") for replica in range(3) for stage in range(2)]
    assert slowest([1.0, 3.0, 1.0, 3.0, 1.2, 3.1], peers, 1.5) is None
    text = slowest([1.0, 3.0, 1.0, 3.0, 1.2, 6.0], peers, 1.5)
    assert text == "rank 5 (host2) is slow: 6.000 s for its part of a step, its peers take 3.000 s"
    assert slowest([1e-4, 9e-4], [((0,), "a"), ((0,), "b")], 1.5) is None  # noise
    assert slowest([1.0, 2.0], [((0,), "a"), ((0,), "b")], 1.5) is not None


# ------------------------------------------------------------------------------------------------- the page (--web)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[web.Server, Path]]:
    """A server of one run with a hostile name, on a free port."""
    folder = tmp_path / "<script>alert(1)<"
    folder.mkdir()
    with web.serve([web.Recorded(folder, folder.name)], 0, 2.0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server, folder
        server.shutdown()
        thread.join()


def fetch(server: web.Server, path: str, host: str | None = None) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(web.HOST, server.server_port, timeout=30)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, dict(answer.headers), answer.read().decode()


def test_page_answers_this_machine_alone(served: tuple[web.Server, Path]) -> None:
    server, _ = served
    assert server.server_address[0] == "127.0.0.1"
    status, headers, page = fetch(server, "/")
    assert status == 200
    nonce = re.search(r'<script nonce="([\w-]+)">', page)
    assert nonce is not None
    assert f"script-src 'nonce-{nonce[1]}'" in headers["Content-Security-Policy"]
    assert "setInterval(look, 2000)" in page
    assert "alert(1)" not in page
    assert re.findall(r"https?://(?!www.w3.org/2000/svg)", page) == []  # nothing from elsewhere
    assert fetch(server, "/", host="evil.example")[0] == 403
    assert fetch(server, "/data.json", host=f"evil.example:{server.server_port}")[0] == 403
    assert fetch(server, "/../etc/passwd")[0] == 404
    assert fetch(server, "/data.json", host=f"localhost:{server.server_port}")[0] == 200


def test_page_has_the_run(served: tuple[web.Server, Path]) -> None:
    """Every step and evaluation, plans at their shares; NaN is null; it grows with the files."""
    server, folder = served
    assert json.loads(fetch(server, "/data.json")[2])["runs"][0]["state"] == "no files"
    (folder / "config.yaml").write_text("{data: {sequence_length: 100}, modes: {chunk: 10}, train: {iterations: 8}}")
    (folder / "events.jsonl").write_text(
        json.dumps({"event": "start", "time": 1.0, "iteration": 0}) + "\n"
        + json.dumps({"event": "checkpoint", "time": 2.0, "iteration": 2, "path": "iteration_0000002"}) + "\n"
    )  # fmt: skip
    lines = [
        {"kind": "step", "iteration": n, "loss": 5.0 - n, "grad_norm": 1.0, "lr": 1e-3, "tokens": 200, "seconds": 0.5,
         "skipped": False, "attention_share": n / 4, "memory_bytes": 2**30, "loss_by_mode": {"attention": 4.0 - n}}
        for n in (1, 2)
    ]  # fmt: skip
    lines[1]["loss"] = float("nan")
    lines += [
        {"kind": "evaluation", "iteration": 2, "dataset": "valid", "plan": plan, "loss": loss}
        for plan, loss in (("attention", 2.0), ("recurrent", 4.0), ("ratio:0.3", 3.0), ("last:25", 2.5))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = json.loads(fetch(server, "/data.json")[2])["runs"]
    assert run["name"] == "<script>alert(1)<"  # the page makes text of it
    assert (run["iteration"], run["iterations"], run["tokens"]) == (2, 8, "400")
    assert run["steps"]["loss"] == [4.0, None]
    assert run["steps"]["speed"] == [400.0, 400.0]
    assert run["steps"]["memory"] == [1.0, 1.0]
    assert run["modes"]["attention"] == [[1, 3.0], [2, 2.0]]
    assert run["mix"] == [[1, 0.25], [2, 0.5]]
    assert run["evaluations"][2] == {"dataset": "valid", "plan": "ratio:0.3", "points": [[2, 3.0]]}
    assert run["shares"] == [{"dataset": "valid", "points": [[0.0, 4.0], [0.25, 2.5], [0.3, 3.0], [1.0, 2.0]]}]
    assert [event["event"] for event in run["events"]] == ["start"]
    assert run["checkpoints"][0]["text"] == "path iteration_0000002"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(lines[0] | {"iteration": 3}) + "\n")
    assert json.loads(fetch(server, "/data.json")[2])["runs"][0]["steps"]["iteration"] == [1, 2, 3]


def test_long_runs_are_thinned() -> None:
    """Curves of a million steps stay small, and keep their means."""
    values = [float(i % 7) for i in range(100_003)]
    found = web.thinned(values)
    assert len(found) == web.POINTS
    assert sum(found) / len(found) == pytest.approx(3.0, abs=0.01)
    assert web.thinned(values[:5]) == values[:5]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--port", "70000"], "--port 70000: "), (["--once"], "leave out one of --web and --once")],
)
def test_page_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert monitor.main([str(tmp_path), "--web", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_page_says_a_port_is_taken(served: tuple[web.Server, Path]) -> None:
    with pytest.raises(ConfigError, match="Address already in use; choose another"):
        web.serve([], served[0].server_port, 1.0)
