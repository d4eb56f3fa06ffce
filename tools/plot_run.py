"""Plot the training loss of runs, their loss under every evaluation plan and the load of experts."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import argparse
import html
import importlib.util
import io
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oryx_megatron import storage
from oryx_megatron.cli import main_guard
from oryx_megatron.data.files import MARK, check_output, is_marked, mark, replacing
from oryx_megatron.display import plain_texts, shown
from oryx_megatron.errors import ConfigError, DataError
from oryx_megatron.paths import expand_arguments, is_url
from oryx_megatron.reading import reason
from oryx_megatron.train import metrics
from oryx_megatron.train.records import is_amount

SUFFIXES = (".png", ".svg", ".pdf", ".html")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#666666")  # Okabe and Ito
LINES = ("-", "--", ":", "-.")
LOADS = {"expert_load_max": "busiest expert", "expert_load_min": "idlest expert", "dropped_share": "share dropped"}
MARKERS = ("o", "s", "^", "D", "v")
SMOOTH = 50  # the smoothed curve averages over a fiftieth of the run


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
    by_expert: list[list[float]] = field(default_factory=list)
    """Latest load by layer and expert, over an even share."""
    shares: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    """Attention share and loss by validation set and plan, of the last evaluation."""


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Draw; see --help."""
    parser = argparse.ArgumentParser(prog="plot_run.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder (the config's output_dir) or metrics.jsonl")
    parser.add_argument("--out", required=True, metavar="FILE", help=f"picture to write: {', '.join(SUFFIXES)}")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier picture of this command")
    parser.add_argument(
        "--x",
        choices=("iteration", "tokens", "share"),
        default="iteration",
        help="horizontal axis; share: the last evaluation's losses against the plans' attention share",
    )
    arguments = parser.parse_args(argv)
    expand_arguments(arguments, "runs", urls=True)
    expand_arguments(arguments, "--out")
    out = Path(arguments.out)
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: the name must end in one of {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib; `pip install oryx-megatron[plots]`")
    check_output(out, ours=is_marked, overwrite=arguments.overwrite, inputs=arguments.runs)
    paths = [_curves_of(run) for run in arguments.runs]
    runs = [read_curves(path, arguments.x, name) for path, name in zip(paths, _names(paths), strict=True)]
    _write(out, draw_shares(runs) if arguments.x == "share" else draw(runs, arguments.x), runs)
    print(shown(out))
    return 0


def _curves_of(run: str) -> Path:
    """metrics.jsonl of a run folder, or the file itself; of a URL, a copy."""
    if not is_url(run):
        return Path(run) / metrics.NAME if Path(run).is_dir() else Path(run)
    followed = storage.Followed(run.removesuffix(f"/{metrics.NAME}"), (metrics.NAME,))
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
    positions: dict[int, float] = {0: 0}
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
            for figure in LOADS:
                if math.isfinite(value := line.get(figure, math.nan)):
                    curves.load.setdefault(figure, []).append((positions[line["iteration"]], value))
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
    return curves


def draw(runs: list[Curves], x: str) -> Any:
    """A matplotlib figure: one panel for a single run, else one for training and one per validation set.

    With one run a colour is a plan; with several a colour is a run and a line style a plan. Runs with experts have one
    more for their load, and a single one another for that of every expert.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    sets = list(dict.fromkeys(name for run in runs for name in run.evaluations))
    single = len(runs) == 1 and len(sets) <= 1
    panels = 1 if single else 1 + len(sets)
    routed = [run for run in runs if run.load]
    tables = [run for run in routed if run.by_expert] if len(runs) == 1 else []
    more = bool(routed) + len(tables)
    width = (8 if single else 6.5 * panels) + 6.5 * more
    figure, grid = plt.subplots(1, panels + more, figsize=(width, 4.8), squeeze=False)
    axes = grid[0][:panels]
    if routed:
        _draw_load(grid[0][panels], routed, x)
    for run, ax in zip(tables, grid[0][panels + 1 :]):
        _draw_experts(figure, ax, run)
    legends: list[list[tuple[Any, str]]] = [[] for _ in axes]  # not by label: matplotlib hides those that begin with _
    for i, run in enumerate(runs):
        colour = "#444444" if len(runs) == 1 else COLOURS[i % len(COLOURS)]
        axes[0].plot(*zip(*run.steps), color=colour, alpha=0.25, linewidth=0.8)
        label = "training, drawn plans" if len(runs) == 1 else run.name
        line = axes[0].plot(*zip(*smooth(run.steps)), color=colour, linewidth=1.6)
        legends[0].append((line[0], label))
    for i, run in enumerate(runs):
        for name, plans in run.evaluations.items():
            panel = 0 if single else 1 + sets.index(name)
            for j, (plan, points) in enumerate(plans.items()):
                several = len(runs) > 1
                line = axes[panel].plot(
                    *zip(*points),
                    color=COLOURS[(i if several else j) % len(COLOURS)],
                    linestyle=LINES[j % len(LINES)] if several else "-",
                    marker=MARKERS[j % len(MARKERS)],
                    markersize=6,
                    markerfacecolor="none",  # plans may be as good as equal: one must not hide another
                )
                legends[panel].append((line[0], f"{run.name if several else name}, {plan}"))
    titles = [runs[0].name] if single else ["training", *sets]
    for ax, title, legend in zip(axes, titles, legends, strict=True):
        ax.set(title=title, xlabel=x, ylabel="loss (nats per token)")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if legend:
            ax.legend(*zip(*legend), frameon=False, fontsize=9)
    plain_texts(figure)
    figure.tight_layout()
    return figure


def _draw_load(ax: Any, runs: list[Curves], x: str) -> None:
    """Busiest and idlest expert and the share dropped; a colour is a figure, with several runs a run."""
    lines = []
    for i, run in enumerate(runs):
        for j, (name, points) in enumerate(run.load.items()):
            several = len(runs) > 1
            if name == "dropped_share" and not any(share for _, share in points):
                continue
            colour = COLOURS[(i if several else j) % len(COLOURS)]
            (line,) = ax.plot(*zip(*smooth(points)), color=colour, linestyle=LINES[j] if several else "-")
            lines.append((line, f"{run.name}, {LOADS[name]}" if several else LOADS[name]))
    ax.axhline(1.0, color="#888888", linewidth=0.8)
    ax.set(title="load of experts", xlabel=x, ylabel="tokens over an even share")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(*zip(*lines), frameon=False, fontsize=9)


def _draw_experts(figure: Any, ax: Any, run: Curves) -> None:
    """Latest load of every expert by layer."""
    image = ax.imshow(run.by_expert, aspect="auto", cmap="viridis", vmin=0.0)
    figure.colorbar(image, ax=ax, label="tokens over an even share")
    ax.set(title="latest load by expert", xlabel="expert", ylabel="layer with experts")


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


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean of each point and those up to a hundredth of the run before and after it, fewer at the ends."""
    half = len(points) // (2 * SMOOTH)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smoothed = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        smoothed.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return smoothed


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
