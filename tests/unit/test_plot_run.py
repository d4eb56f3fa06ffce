"""tools/plot_run.py: pictures of runs, and pages that run nothing that a run's name says."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest

from oryx_megatron.display import shown
from oryx_megatron.tools import plot_run

HOSTILE = "a--><script>alert(1)<"


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two runs, one with a hostile name, whose steps read 100 and 200 tokens."""
    folders = []
    for i, name in enumerate(("first", HOSTILE)):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = [{"kind": "step", "iteration": n, "tokens": 100 * (i + 1), "loss": 5.0 - n / 10} for n in range(1, 11)]
        lines[4]["loss"] = float("nan")
        for plan in ("attention", "recurrent"):
            lines.append({"kind": "evaluation", "iteration": 10, "dataset": "valid", "plan": plan, "loss": 4.5 + i})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(str(folder))
    return folders


def test_a_page_shows_every_run_and_runs_no_script(runs, tmp_path, capsys) -> None:
    out = tmp_path / "pages" / "runs.html"
    assert plot_run.main([*runs, "--x", "tokens", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = out.read_text()
    assert "<svg" in page
    assert "<script" not in page
    assert "a--&gt;&lt;script&gt;alert(1)&lt;" in page
    assert "<td>first</td><td>training</td><td>1000</td><td>4.0000</td>" in page
    assert "<td>valid, recurrent</td><td>2000</td><td>5.5000</td>" in page
    assert [path.name for path in out.parent.iterdir()] == ["runs.html"]


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures(runs, tmp_path, suffix, magic) -> None:
    out = tmp_path / f"run.{suffix}"
    assert plot_run.main([runs[0], "--out", str(out)]) == 0
    assert out.read_bytes().startswith(magic)


def test_loss_against_attention_share(tmp_path, capsys) -> None:
    """The last evaluation of every plan; a run without plans of several shares is told so."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"kind": "step", "iteration": n, "tokens": 100, "loss": 5.0} for n in (1, 2)]
    plans = {"recurrent": 0.0, "ratio:0.25": 0.25, "attention": 1.0}
    lines += [
        {"kind": "evaluation", "iteration": n, "dataset": "valid", "plan": plan, "attention_share": share,
         "loss": 4.0 - share - n / 10}
        for n in (0, 2) for plan, share in plans.items()
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = plot_run.read_curves(folder / "metrics.jsonl", "share", "run")
    assert curves.shares == {"valid": {"recurrent": (0.0, 3.8), "ratio:0.25": (0.25, 3.55), "attention": (1.0, 2.8)}}
    (line,) = plot_run.draw_shares([curves]).axes[0].lines
    assert list(zip(*line.get_data())) == [(0.0, 3.8), (0.25, 3.55), (1.0, 2.8)]
    out = tmp_path / "share.png"
    assert plot_run.main([str(folder), "--x", "share", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    assert plot_run.main([str(folder), "--x", "share", "--out", str(tmp_path / "none.png")]) == 2
    assert "no validation set was evaluated under plans of several attention shares" in capsys.readouterr().err


def test_steps_without_a_finite_loss_are_left_out(runs) -> None:
    """A step without a finite loss is left out, and counts as tokens."""
    curves = plot_run.read_curves(Path(runs[0], "metrics.jsonl"), "tokens", "first")
    assert [position for position, _ in curves.steps] == [100, 200, 300, 400, 600, 700, 800, 900, 1000]
    assert curves.evaluations == {"valid": {"attention": [(1000, 4.5)], "recurrent": [(1000, 4.5)]}}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", "x.jpg"], "error: --out x.jpg: the name must end in one of .png, .svg, .pdf, .html"),
        (["nowhere", "--out", "x.png"], "nowhere does not exist; give a run folder"),
        (["empty", "--out", "x.png"], "metrics.jsonl holds no step yet"),
    ],
)
def test_runs_that_cannot_be_drawn_are_named(runs, tmp_path, capsys, monkeypatch, arguments, expected) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty/metrics.jsonl").touch()
    assert plot_run.main([runs[0], *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not Path("x.png").exists()


ODD = [r"$\bad{$", "$x_1$", "_hidden", "\x1b[31m\n", "größe-模型", "<b>&|`", "%s{0}"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
@pytest.mark.parametrize("several", [False, True])
def test_names_are_shown_as_given(tmp_path: Path, capsys, name: str, several: bool) -> None:
    """Of runs, datasets and plans: in titles, legends, pages and on the terminal."""
    folders = []
    for folder in (tmp_path / name, *([tmp_path / "other"] if several else [])):
        folder.mkdir()
        lines = [{"kind": "step", "iteration": n, "tokens": 1, "loss": 2.0} for n in (1, 2)]
        lines.append({"kind": "evaluation", "iteration": 2, "dataset": name, "plan": name, "loss": 2.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(str(folder))
    paths = [Path(folder) / "metrics.jsonl" for folder in folders]
    curves = [plot_run.read_curves(path, "iteration", own) for path, own in zip(paths, plot_run._names(paths))]
    figure = plot_run.draw(curves, "iteration")
    figure.canvas.draw()
    texts = [text.get_text() for ax in figure.axes for text in ax.get_legend().get_texts()]
    given = shown(name)
    both = f"{given}, {given}"
    assert texts == ([given, "other", both, f"other, {given}"] if several else ["training, drawn plans", both])
    assert (figure.axes[-1] if several else figure.axes[0]).get_title() == given
    assert not any(text.get_parse_math() for ax in figure.axes for text in (ax.title, *ax.get_legend().get_texts()))
    out = tmp_path / "page\n.html"
    assert plot_run.main([*folders, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{shown(out)}\n"
    assert f"<td>{html.escape(given)}</td>" in out.read_text()


def test_load_of_experts(runs, tmp_path) -> None:
    """A panel for runs with experts, and for one alone a table of its latest load; damaged tables are left out."""
    path = Path(runs[0]) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[:10]:
        line |= {"expert_load_max": 2.0 - line["iteration"] / 20, "expert_load_min": 0.5, "dropped_share": 0.0}
        line |= {"router_entropy": 1.3, "load_balancing_loss": 1.0 + line["iteration"] / 10, "router_z_loss": 0.0}
    tables = ([[1.5, 0.5], [1.0, 1.0]], [[1.25, 0.75], [1.0, 1.0]], [[1.0], [1.0, 2.0]], [[]], "none", [["a", 1.0]])
    lines += [{"kind": "routing", "iteration": n, "expert_load": table} for n, table in enumerate(tables)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = [plot_run.read_curves(Path(run) / "metrics.jsonl", "iteration", run) for run in runs]
    assert curves[0].load["expert_load_max"][0] == (1, 1.95)
    assert curves[0].by_expert == tables[1]
    assert curves[1].load == {}
    alone, both = plot_run.draw(curves[:1], "iteration"), plot_run.draw(curves, "iteration")
    titles = [[ax.get_title() for ax in figure.axes] for figure in (alone, both)]
    assert {"load of experts", "routers", "latest load by expert"} <= set(titles[0])
    assert {"load of experts", "routers"} <= set(titles[1])
    (panel,) = (ax for ax in alone.axes if ax.get_title() == "routers")
    named = [text.get_text() for text in panel.get_legend().get_texts()]
    assert named == ["entropy of the scores (nats)", "load-balancing loss (1: even)"]  # no z-loss was asked for
    assert panel.lines[1].get_xydata()[-1].tolist() == [10, 2.0]
    assert "latest load by expert" not in titles[1]
    (panel,) = (ax for ax in alone.axes if ax.get_title() == "load of experts")
    shown_lines = [text.get_text() for text in panel.get_legend().get_texts()]
    assert shown_lines == ["busiest expert", "idlest expert"]  # nothing was dropped
    assert plot_run.main([runs[0], "--out", str(tmp_path / "load.png")]) in (0, None)


def test_losses_of_heads(runs, tmp_path) -> None:
    """A curve for every head beside the model's own; one head writes `mtp_loss` alone."""
    for run, heads in zip(runs, (2, 1)):
        path = Path(run) / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in (line for line in lines if line["kind"] == "step"):
            losses = [4.5 + k - line["iteration"] / 20 for k in range(heads)]
            line |= {"mtp_loss": sum(losses) / heads} | ({"mtp_losses": losses} if heads > 1 else {})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = [plot_run.read_curves(Path(run) / "metrics.jsonl", "iteration", run) for run in runs]
    assert [[points[0] for points in found.heads] for found in curves[:2]] == [[(1, 4.45), (1, 5.45)], [(1, 4.45)]]
    (panel,) = plot_run.draw(curves[:1], "iteration", wanted=["heads"]).axes
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["the model's own", "head 1", "head 2"]
    assert plot_run.main([*runs, "--panels", "heads", "--out", str(tmp_path / "heads.svg")]) in (0, None)


def test_damaged_lines_are_left_out_and_said_once(runs, tmp_path, caplog) -> None:
    path = Path(runs[0], "metrics.jsonl")
    good = plot_run.read_curves(path, "tokens", "first")
    with path.open("ab") as file:
        file.write(b'{"kind": "step", "iteration": 11, "loss": 1.0}\n' + b"[" * 100_000 + b"\n\xff\xfe\n{}\n1\n")
    caplog.clear()
    assert plot_run.read_curves(path, "tokens", "first") == good
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: left out 5 damaged lines, the first is line 13"
    ]


def curves_of(figure) -> list[list[tuple]]:
    """Look of every curve, by panel; the pale lines of single steps left out."""
    return [
        [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in ax.lines if line.get_alpha() is None]
        for ax in figure.axes
    ]


def test_no_two_curves_look_alike_and_legends_lie_outside() -> None:
    """Ten runs of five plans: 50 looks in one panel; a legend names each and covers none."""
    plans = ["attention", "recurrent", "ratio:0.5", "ratio:0.25", "every:3"]
    runs = [
        plot_run.Curves(
            f"run {i}",
            steps=[(n, 5.0 - n / 100) for n in range(1, 60)],
            evaluations={"valid": {plan: [(20, 4.0), (40, 3.0)] for plan in plans}},
            plan_shares={"attention": 1.0, "recurrent": 0.0},
        )
        for i in range(10)
    ]
    figure = plot_run.draw(runs, "iteration")
    training, valid, share = curves_of(figure)
    assert (len(training), len(valid), len(share)) == (10, 50, 10)
    assert all(len(set(looks)) == len(looks) for looks in (training, valid, share))
    figure.canvas.draw()
    for ax in figure.axes:
        legend = ax.get_legend().get_window_extent()
        assert legend.y1 < ax.get_window_extent().y0
        assert len(ax.get_legend().get_texts()) == len(ax.lines) - (len(runs) if ax is figure.axes[0] else 0)


def test_panels_of_one_run(tmp_path: Path) -> None:
    """Plans, modes, and loss against attention share: of plans as the run's config reads them, and of drawn steps."""
    lines = [
        {"kind": "step", "iteration": n, "tokens": 10, "loss": 4.0 + n % 2, "attention_share": n / 40,
         "loss_by_mode": {"attention": 3.0, "recurrent": 5.0}}
        for n in range(1, 41)
    ]  # fmt: skip
    lines += [
        {"kind": "evaluation", "iteration": 40, "dataset": "valid", "plan": plan, "loss": loss}
        for plan, loss in (("attention", 3.0), ("last:64", 4.5), ("recurrent", 5.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shipped = Path(__file__).parents[2] / "configs/run/quickstart.yaml"
    (tmp_path / "config.yaml").write_text(shipped.read_text())  # sequences of 256 tokens
    run = plot_run.read_curves(tmp_path / "metrics.jsonl", "iteration", "one")
    assert run.plan_shares == {"attention": 1.0, "last:64": 0.25, "recurrent": 0.0}
    figure = plot_run.draw([run], "iteration", smooth=2)
    assert [ax.get_title() for ax in figure.axes] == ["one", "one: training by mode", "loss against attention share"]
    (line,) = figure.axes[2].lines
    assert line.get_xydata().tolist() == [[0.0, 5.0], [0.25, 4.5], [1.0, 3.0]]
    assert len(figure.axes[2].collections[0].get_offsets()) == 4  # the last tenth of the steps
    beside = plot_run.draw([run, run], "iteration", beside=True)
    assert [ax.get_title() for ax in beside.axes][:2] == ["one", "one: training by mode"]
    assert len(beside.axes) == 5


def test_smoothing_averages_and_keeps_the_ends() -> None:
    points = [(float(n), float(n % 2)) for n in range(200)]
    assert plot_run.smoothed(points, 1) == points
    middle = plot_run.smoothed(points, 20)[10:-10]
    assert all(abs(y - 0.5) < 0.05 for _, y in middle)
    level = [(float(i), 1.0) for i in range(99)] + [(99.0, 5.0)]
    assert plot_run.smoothed(level, 20)[-1] == (99.0, 15 / 11)  # one step's noise is no end of a curve
    falling = [(float(i), 9.0 - i) for i in range(9)]
    assert plot_run.smoothed(falling, 4)[0] == (0.0, 9.0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--names", "a"], "1 names for 2 runs"),
        (["--names", "a", "a"], "two runs have one name"),
        (["--smooth", "0"], "--smooth 0: give a number of steps"),
    ],
)
def test_names_and_smoothing_are_checked(runs, capsys, arguments, expected) -> None:
    assert plot_run.main([*runs, "--out", "x.png", *arguments]) == 2
    assert expected in capsys.readouterr().err
