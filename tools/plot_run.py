"""Draw runs: training loss, loss under every evaluation plan, loss of each mode, loss against attention share.

    oryx plot runs/mine --out mine.png
    oryx plot runs/a runs/b --names small large --out both.svg
    oryx plot runs/code runs/copies --beside --smooth 20 --out two.html

PNG, SVG, PDF, or an HTML page that needs no other file.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import contextlib
import functools
import html
import importlib.util
import io
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oryx_megatron import storage
from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.config import load_run
from oryx_megatron.config.plans import attention_share
from oryx_megatron.data.files import MARK, check_output, is_marked, mark, replacing
from oryx_megatron.display import plain_texts, shown
from oryx_megatron.errors import ConfigError, DataError, OryxError
from oryx_megatron.paths import expand_arguments, is_url
from oryx_megatron.reading import reason
from oryx_megatron.train import metrics
from oryx_megatron.train.records import is_amount

SUFFIXES = (".png", ".svg", ".pdf", ".html")
GREY = "#8a8a8a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#8c510a")  # Okabe and Ito
MODE_COLOURS = {"recurrent": 0, "attention": 1}
"""Their places in COLOURS: attention is orange wherever modes have colours."""
BESIDE_PLANS = 6
"""Place of the first run's colour in a panel beside others whose colours are plans."""
LINES = ("-", "--", ":", "-.")
LOADS = {"expert_load_max": "busiest expert", "expert_load_min": "idlest expert", "dropped_share": "share dropped"}
ROUTERS = {
    "router_entropy": "entropy of the scores (nats)",
    "load_balancing_loss": "load-balancing loss (1: even)",
    "router_z_loss": "z-loss",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Two curves of one panel differ in colour, or in line and marker: 4 and 7 give 28 pairs for each colour."""
SMOOTH = 50
"""The smoothed curve averages over a fiftieth of the run."""
SHORT = 5
"""Steps on each side that it averages over at least, where the run has enough: a fiftieth of few is noise."""
MODES = ("attention", "recurrent", "mixed")
PANELS = ("plans", "modes", "share", "experts", "heads")
"""Training loss and plans; training loss by mode; loss against attention share; load of experts and what their routers
did; loss of each head of multi-token prediction."""
ROW = 3
"""Panels of a row."""
LATEST = 10
"""The last tenth of a run's steps are drawn against their attention share."""


@dataclass
class Curves:
    """What one run's metrics.jsonl holds, by iteration or by tokens."""

    name: str
    steps: list[tuple[float, float]] = field(default_factory=list)
    """Position and training loss of every step with a finite loss."""
    evaluations: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    """Position and loss by validation set and plan."""
    load: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Position and figure of every step of a run with experts: busiest and idlest expert, share dropped."""
    routers: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Position and figure of every step of a run with experts: entropy and losses of the routers, unweighted."""
    heads: list[list[tuple[float, float]]] = field(default_factory=list)
    """Position and loss of every step by head of multi-token prediction."""
    by_expert: list[list[float]] = field(default_factory=list)
    """Latest load by layer and expert, over an even share."""
    by_mode: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Position and training loss of the main rank's microbatches in one mode, or in both (`mixed`)."""
    drawn: list[tuple[float, float]] = field(default_factory=list)
    """Attention share and training loss of every step."""
    plan_shares: dict[str, float] = field(default_factory=dict)
    """Attention share of the plans of which it is known."""
    shares: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    """Attention share and loss by validation set and plan, of the last evaluation."""


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Draw; see --help."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder (the config's output_dir) or metrics.jsonl")
    parser.add_argument("--out", required=True, metavar="FILE", help=f"picture to write: {', '.join(SUFFIXES)}")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier picture of this command")
    parser.add_argument(
        "--x",
        choices=("iteration", "tokens", "share"),
        default="iteration",
        help="horizontal axis; share: the last evaluation's losses against the plans' attention share",
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="of the runs, in their order (default: the folders')"
    )
    parser.add_argument(
        "--smooth",
        type=int,
        metavar="N",
        help="steps that the training curves average over; 1: none (default: a 50th, at least 11)",
    )
    parser.add_argument(
        "--panels",
        nargs="+",
        choices=PANELS,
        default=list(PANELS),
        metavar="PANEL",
        help=f"what to draw: {', '.join(PANELS)} (default: all that the runs have)",
    )
    parser.add_argument("--beside", action="store_true", help="a panel for each run, not one over the other")
    arguments = parser.parse_args(argv)
    expand_arguments(arguments, "runs", urls=True)
    expand_arguments(arguments, "--out")
    if arguments.smooth is not None and arguments.smooth < 1:
        raise ConfigError(f"--smooth {arguments.smooth}: give a number of steps of at least 1")
    if arguments.names and len(arguments.names) != len(arguments.runs):
        raise ConfigError(f"--names: {len(arguments.names)} names for {len(arguments.runs)} runs; give one for each")
    if arguments.names and len(set(arguments.names)) != len(arguments.names):
        raise ConfigError("--names: two runs have one name; give each its own")
    out = Path(arguments.out)
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: the name must end in one of {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib; `pip install oryx-megatron[plots]`")
    check_output(out, ours=is_marked, overwrite=arguments.overwrite, inputs=arguments.runs)
    paths = [_curves_of(run) for run in arguments.runs]
    names = [shown(name) for name in arguments.names] if arguments.names else _names(paths)
    runs = [read_curves(path, arguments.x, name) for path, name in zip(paths, names, strict=True)]
    if arguments.x == "share":
        _write(out, draw_shares(runs), runs)
        print(shown(out))
        return 0
    figure = draw(runs, arguments.x, smooth=arguments.smooth, beside=arguments.beside, wanted=arguments.panels)
    _write(out, figure, runs)
    print(shown(out))
    return 0


def _curves_of(run: str) -> Path:
    """metrics.jsonl of a run folder, or the file itself; of a URL, a copy."""
    if not is_url(run):
        return Path(run) / metrics.NAME if Path(run).is_dir() else Path(run)
    followed = storage.FollowedFiles(run.removesuffix(f"/{metrics.NAME}"), (metrics.NAME,))
    followed.look()
    if not (followed.folder / metrics.NAME).is_file():
        raise DataError(f"{run} does not exist; give a run folder (the config's output_dir)")
    return followed.folder / metrics.NAME


def read_curves(path: Path, x: str, name: str) -> Curves:
    """Curves of one run.

    Raises:
        DataError: the file is missing or has no step.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a run folder (the config's output_dir)")
    curves = Curves(name)
    positions: dict[int, float] = {}
    tokens = 0
    try:
        lines = metrics.read_lines(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from None
    for line in lines:
        if line["kind"] == "step":
            tokens += line["tokens"]
            positions[line["iteration"]] = tokens if x == "tokens" else line["iteration"]
            if math.isfinite(line["loss"]):
                curves.steps.append((positions[line["iteration"]], line["loss"]))
                if "attention_share" in line:
                    curves.drawn.append((line["attention_share"], line["loss"]))
            for mode, loss in line.get("loss_by_mode", {}).items():
                if mode in MODES and math.isfinite(loss):
                    curves.by_mode.setdefault(mode, []).append((positions[line["iteration"]], loss))
            for group, figures in ((curves.load, LOADS), (curves.routers, ROUTERS)):
                for figure in figures:
                    if math.isfinite(value := line.get(figure, math.nan)):
                        group.setdefault(figure, []).append((positions[line["iteration"]], value))
            heads = line.get("mtp_losses") or [line["mtp_loss"]] if "mtp_loss" in line else []
            for head, loss in enumerate(heads):
                curves.heads += [[]] if head == len(curves.heads) else []
                if math.isfinite(loss):
                    curves.heads[head].append((positions[line["iteration"]], loss))
        elif line["kind"] == "routing":
            curves.by_expert = line["expert_load"]
    for line in lines:
        if line["kind"] == "evaluation" and line["iteration"] in positions and math.isfinite(line["loss"]):
            plans = curves.evaluations.setdefault(shown(line["dataset"]), {})
            plans.setdefault(shown(line["plan"]), []).append((positions[line["iteration"]], line["loss"]))
            share: Any = line.get("attention_share")
            if is_amount(share) and share <= 1:
                curves.shares.setdefault(shown(line["dataset"]), {})[shown(line["plan"])] = (share, line["loss"])
    if not curves.steps:
        raise DataError(f"{path} holds no step yet")
    curves.plan_shares = _shares(
        path.parent / "config.yaml", {plan for plans in curves.evaluations.values() for plan in plans}
    )
    curves.plan_shares |= {plan: share for plans in curves.shares.values() for plan, (share, _) in plans.items()}
    return curves


def _shares(config: Path, plans: set[str]) -> dict[str, float]:
    """Attention share of plans at the run's sequence length; without a config to read, of whole modes alone."""
    found = {"attention": 1.0, "recurrent": 0.0}
    logger = logging.getLogger("oryx_megatron.config")
    level = logger.level
    with contextlib.suppress(OryxError):
        logger.setLevel(logging.ERROR)  # names of older versions are no matter here
        try:
            run = load_run(config)
        finally:
            logger.setLevel(level)
        for plan in plans:
            with contextlib.suppress(OryxError):
                length, chunk, layers = run.data.sequence_length, run.modes.chunk, run.model.reads_plans
                found[plan] = attention_share(plan, length, chunk=chunk, layers=layers)
    return {plan: share for plan, share in found.items() if plan in plans}


def draw(
    runs: list[Curves],
    x: str,
    *,
    smooth: int | None = None,
    beside: bool = False,
    wanted: Sequence[str] = PANELS,
) -> Any:
    """A matplotlib figure.

    One run, or `beside`: for each run a panel of its training loss and plans for every validation set, and where it
    knows them one of the loss of each mode. Else: a panel of all training losses, and one for each validation set.
    Last, in both, loss against attention share. Legends lie below their panels.

    Args:
        runs: What `read_curves` gave.
        x: Name of the horizontal axis.
        smooth: Steps to average over; None: a fiftieth of each run, 11 at least where it is long enough.
        beside: See above.
        wanted: Kinds of panels, of PANELS.

    Raises:
        ConfigError: the runs have none of the panels wanted.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = _panels(runs, smooth, beside=beside, wanted=wanted)
    if not panels:
        raise ConfigError(f"--panels {' '.join(wanted)}: the runs have nothing of it yet")
    columns = min(len(panels), ROW)
    rows = -(-len(panels) // columns)
    width = 5.6 * columns + 1.4 * (columns == 1)
    figure, grid = plt.subplots(rows, columns, figsize=(width, 5 * rows), squeeze=False, layout="constrained")
    for ax in grid.flat[len(panels) :]:
        ax.remove()
    tallest = 0
    for ax, (title, panel) in zip(grid.flat, panels, strict=False):
        ax.set(title=title, xlabel=x, ylabel="loss (nats per token)")
        legend = panel(ax)  # not by label: matplotlib hides those that begin with _
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if legend:
            beside_each_other = 1 if max(len(label) for _, label in legend) > 28 else 2
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": beside_each_other}
            ax.legend(*zip(*legend), frameon=False, fontsize=9, **place)
            tallest = max(tallest, -(-len(legend) // beside_each_other))
    figure.set_figheight(rows * (4.3 + 0.21 * tallest))
    plain_texts(figure)
    return figure


def _panels(
    runs: list[Curves], smooth: int | None, *, beside: bool, wanted: Sequence[str]
) -> list[tuple[str, Callable[[Any], list[tuple[Any, str]]]]]:
    """Title of each panel, and what draws it into axes and gives its legend; arguments as of `draw`."""
    panels: list[tuple[str, Callable[[Any], list[tuple[Any, str]]]]] = []
    sets = list(dict.fromkeys(name for run in runs for name in run.evaluations))
    plans = list(dict.fromkeys(plan for run in runs for found in run.evaluations.values() for plan in found))
    if len(runs) == 1 or beside:
        for run in runs:
            for name in (list(run.evaluations) or [""]) if "plans" in wanted else ():
                title = f"{run.name}: {name}" if name and len(run.evaluations) > 1 else run.name
                panels.append((title, functools.partial(_plans, run=run, name=name, plans=plans, smooth=smooth)))
            if len(run.by_mode) > 1 and "modes" in wanted:
                title = f"{run.name}: training by mode"
                panels.append((title, functools.partial(_modes, run=run, smooth=smooth)))
    elif "plans" in wanted:
        panels.append(("training", functools.partial(_training, runs=runs, smooth=smooth)))
        panels += [(name, functools.partial(_set, runs=runs, name=name)) for name in sets]
    if any(len(run.plan_shares) > 1 for run in runs) and "share" in wanted:
        first = BESIDE_PLANS if len(runs) == 1 or beside else 0  # else a run has its colour of the other panels
        panels.append(("loss against attention share", functools.partial(_against_share, runs=runs, first=first)))
    if (routed := [run for run in runs if run.load]) and "experts" in wanted:
        panels.append(("load of experts", functools.partial(_load, runs=routed, alone=len(runs) == 1)))
        panels.append(("routers", functools.partial(_routers, runs=routed, alone=len(runs) == 1)))
        if len(runs) == 1 and runs[0].by_expert:
            panels.append(("latest load by expert", functools.partial(_experts, run=runs[0])))
    if (ahead := [run for run in runs if any(run.heads)]) and "heads" in wanted:
        panels.append(("heads, each a token further", functools.partial(_heads, runs=ahead, smooth=smooth)))
    return panels


def _style(run: int, curve: int = 0, curves: int = 1) -> dict[str, Any]:
    """Look of a curve that no other of the panel has: a run has a colour, each of its curves a line and a marker.

    With more runs than colours, those of one colour have other lines and markers.
    """
    number = curve + curves * (run // len(COLOURS))
    return {
        "color": COLOURS[run % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markerfacecolor": "none",  # plans may be as good as equal: one must not hide another
        "markersize": 6,
    }


def _smoothed(ax: Any, points: list[tuple[float, float]], smooth: int | None, **style: Any) -> Any:
    """Every step, pale, and the smoothed curve, whose line is returned."""
    ax.plot(*zip(*points), color=style["color"], alpha=0.2, linewidth=0.7)
    return ax.plot(*zip(*smoothed(points, smooth)), linewidth=1.6, **style)[0]


def _of_plans(plans: Sequence[str]) -> dict[str, int]:
    """Number of each plan's look; the two modes have theirs, as on the monitor's page and in `generate`."""
    others = [plan for plan in plans if plan not in MODE_COLOURS]
    return MODE_COLOURS | {plan: len(MODE_COLOURS) + i for i, plan in enumerate(others)}


def _plans(ax: Any, *, run: Curves, name: str, plans: list[str], smooth: int | None) -> list[tuple[Any, str]]:
    legend = [(_smoothed(ax, run.steps, smooth, color=GREY), "training, drawn plans")]
    for plan, points in run.evaluations.get(name, {}).items():
        j = _of_plans(plans)[plan]  # a plan looks the same in all panels
        style = _style(j) | {"marker": MARKERS[j % len(MARKERS)]}
        legend.append((ax.plot(*zip(*points), **style)[0], f"{name}, {plan}"))
    return legend


def _modes(ax: Any, *, run: Curves, smooth: int | None) -> list[tuple[Any, str]]:
    curves = [(mode, run.by_mode[mode]) for mode in MODES if mode in run.by_mode]
    return [
        (_smoothed(ax, points, smooth, color=COLOURS[j], linestyle=LINES[j]), f"microbatches {mode}")
        for mode, points in curves
        for j in [MODE_COLOURS.get(mode, len(MODE_COLOURS))]
    ]


def _training(ax: Any, *, runs: list[Curves], smooth: int | None) -> list[tuple[Any, str]]:
    legend = []
    for i, run in enumerate(runs):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS) % len(LINES)]}
        legend.append((_smoothed(ax, run.steps, smooth, **style), run.name))
    return legend


def _set(ax: Any, *, runs: list[Curves], name: str) -> list[tuple[Any, str]]:
    plans = list(dict.fromkeys(plan for run in runs for plan in run.evaluations.get(name, {})))
    legend = []
    for i, run in enumerate(runs):
        for plan, points in run.evaluations.get(name, {}).items():
            line = ax.plot(*zip(*points), **_style(i, plans.index(plan), len(plans)))[0]
            legend.append((line, f"{run.name}, {plan}"))
    return legend


def _against_share(ax: Any, *, runs: list[Curves], first: int) -> list[tuple[Any, str]]:
    """The last evaluation of each plan; for a single run also its last steps, whose plans were drawn.

    `first`: place in COLOURS of the first run's.
    """
    ax.set(xlabel="tokens read by attention", xlim=(-0.03, 1.03))
    ax.xaxis.set_major_formatter("{x:.0%}")
    legend = []
    if len(runs) == 1 and (drawn := runs[0].drawn[-max(len(runs[0].drawn) // LATEST, 1) :]):
        legend.append((ax.scatter(*zip(*drawn), s=10, color=GREY, alpha=0.5), "training, last steps"))
    for i, run in enumerate(runs):
        for j, (name, plans) in enumerate(run.evaluations.items()):
            points = sorted(
                (run.plan_shares[plan], found[-1][1]) for plan, found in plans.items() if plan in run.plan_shares
            )
            if points:
                label = name if len(runs) == 1 else f"{run.name}, {name}"
                legend.append((ax.plot(*zip(*points), **_style(first + i, j, len(run.evaluations)))[0], label))
    return legend


def _load(ax: Any, *, runs: list[Curves], alone: bool) -> list[tuple[Any, str]]:
    """Busiest and idlest expert and the share dropped; a colour is a figure, with several runs a run."""
    legend = []
    for i, run in enumerate(runs):
        for j, (name, points) in enumerate(run.load.items()):
            if name == "dropped_share" and not any(share for _, share in points):
                continue
            style = _style(j) if alone else _style(i, j, len(LOADS))
            line = ax.plot(*zip(*smoothed(points)), color=style["color"], linestyle=style["linestyle"])[0]
            legend.append((line, LOADS[name] if alone else f"{run.name}, {LOADS[name]}"))
    ax.axhline(1.0, color=GREY, linewidth=0.8)
    ax.set(ylabel="tokens over an even share")
    return legend


def _routers(ax: Any, *, runs: list[Curves], alone: bool) -> list[tuple[Any, str]]:
    """Entropy and losses of the routers, without those that are not asked for; colours as in `_load`."""
    legend = []
    for i, run in enumerate(runs):
        for j, (name, label) in enumerate(ROUTERS.items()):
            points = run.routers.get(name, [])
            if not any(value for _, value in points):
                continue
            style = _style(j) if alone else _style(i, j, len(ROUTERS))
            line = ax.plot(*zip(*smoothed(points)), color=style["color"], linestyle=style["linestyle"])[0]
            legend.append((line, label if alone else f"{run.name}, {label}"))
    ax.set(ylabel="mean over layers")
    return legend


def _heads(ax: Any, *, runs: list[Curves], smooth: int | None) -> list[tuple[Any, str]]:
    """Training loss of every head of multi-token prediction, beside the model's own."""
    legend = []
    for i, run in enumerate(runs):
        curves = [("the model's own", run.steps), *((f"head {k}", points) for k, points in enumerate(run.heads, 1))]
        for j, (label, points) in enumerate(curves):
            style = _style(j) if len(runs) == 1 else _style(i, j, len(curves))
            line = _smoothed(ax, points, smooth, color=style["color"], linestyle=style["linestyle"])
            legend.append((line, label if len(runs) == 1 else f"{run.name}, {label}"))
    return legend


def _experts(ax: Any, *, run: Curves) -> list[tuple[Any, str]]:
    """Latest load of every expert by layer."""
    image = ax.imshow(run.by_expert, aspect="auto", cmap="viridis", vmin=0.0)
    ax.figure.colorbar(image, ax=ax, label="tokens over an even share")
    ax.set(xlabel="expert", ylabel="layer with experts")
    return []


def draw_shares(runs: list[Curves]) -> Any:
    """A matplotlib figure: loss of the last evaluation against the attention share of its plans, a panel for each set.

    Raises:
        DataError: no set was evaluated under plans of two shares or more.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    sets = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.shares)
        if any(len({share for share, _ in run.shares.get(name, {}).values()}) > 1 for run in runs)
    ]
    if not sets:
        raise DataError(
            "no validation set was evaluated under plans of several attention shares; set evaluation.plans to "
            "[recurrent, 'ratio:0.25', 'ratio:0.5', attention], for instance"
        )
    figure, grid = plt.subplots(1, len(sets), figsize=(7 if len(sets) == 1 else 6 * len(sets), 4.8), squeeze=False)
    for ax, name in zip(grid[0], sets, strict=True):
        legend = []
        for i, run in enumerate(run for run in runs if name in run.shares):
            points = sorted(run.shares[name].values())
            (line,) = ax.plot(
                *zip(*points),
                color=COLOURS[i % len(COLOURS)],
                linestyle=LINES[i // len(COLOURS) % len(LINES)],
                marker=MARKERS[i % len(MARKERS)],
            )
            legend.append((line, run.name))
        ax.set(title=name, xlabel="share of tokens in attention mode", ylabel="loss (nats per token)")
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(*zip(*legend), frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.14))
    plain_texts(figure)
    figure.tight_layout()
    return figure


def smoothed(points: list[tuple[float, float]], steps: int | None = None) -> list[tuple[float, float]]:
    """Mean of each point and those around it, `steps` in all, fewer at the ends.

    By default a fiftieth of the run, at least 11 of a run of 80 or more, an eighth of a shorter one.

    The first mean is the first point, where losses fall steeply. The last ones lose only the steps that are not there,
    so that a curve does not end in the noise of one step.
    """
    half = max(len(points) // (2 * SMOOTH), min(len(points) // 16, SHORT)) if steps is None else steps // 2
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    means = []
    for i, (x, _) in enumerate(points):
        first, end = i - min(half, i), min(i + min(half, i) + 1, len(points))
        means.append((x, (sums[end] - sums[first]) / (end - first)))
    return means


def _write(out: Path, figure: Any, runs: list[Curves]) -> None:
    buffer = io.BytesIO()
    form = "svg" if out.suffix == ".html" else out.suffix[1:]
    figure.savefig(buffer, format=form, dpi=150, metadata=mark(form))
    content = buffer.getvalue()
    if out.suffix == ".html":
        content = _page(content.decode(), runs).encode()
    try:
        with replacing(out) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from error


def _page(svg: str, runs: list[Curves]) -> str:
    """A page that needs no other file: the figure and a table of the latest losses."""
    rows = []
    for run in runs:
        curves = {"training": run.steps}
        curves |= {f"{name}, {plan}": pts for name, plans in run.evaluations.items() for plan, pts in plans.items()}
        for what, points in curves.items():
            position, loss = points[-1]
            cells = (run.name, what, f"{position:g}", f"{loss:.4f}")
            rows.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    title = html.escape(", ".join(run.name for run in runs))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="generator" content="{MARK}">'
        f"<title>{title}</title>"
        "<style>body{font:15px sans-serif;margin:2em}td,th{padding:.2em 1em;text-align:left}svg{max-width:100%;"
        f"height:auto}}</style>{svg[svg.index('<svg') :]}<table><tr><th>run<th>curve<th>at<th>loss</tr>"
        f"{''.join(rows)}</table></html>\n"
    )


def _names(paths: list[Path]) -> list[str]:
    """The run folders' names, or as much of their paths as tells them apart."""
    folders = [path.resolve().parent for path in paths]
    for depth in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            return [shown(name) for name in names]
    return [shown(folder) for folder in folders]


if __name__ == "__main__":
    sys.exit(main())
