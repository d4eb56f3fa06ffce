#!/usr/bin/env python
"""Retrieval after mixed training: Oryx against a Transformer and against recurrence alone, on generated texts.

    python benchmarks/fidelity/retrieval.py benchmarks/fidelity/mqar-cpu.yaml --out runs/mqar-cpu
    python benchmarks/fidelity/retrieval.py benchmarks/fidelity/mqar-h200.yaml --out runs/mqar-h200 --processes 18 \\
        --budget 300

Trains every model of the config with every seed, several processes side by side, scores them under mode plans, and
writes one JSON file per training, then summary.md, summary.json, accuracy.png, pairs.png and curves.png. Started again
it does what is missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import experiment as ex

from oryx_megatron.cli import main_guard
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import ConfigError

SCORING_SECONDS = 20.0
"""Of the time budget, kept for scores after training; a process that takes twice as long is ended."""
LEARNED = 0.1
"""Share of answers below which a model is no yardstick."""
WORKER_ENVIRONMENT = {
    # Small models: nothing is worth compiling, and a process has one core.
    "TORCHDYNAMO_DISABLE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "NVTE_TORCH_COMPILE": "0",
    "OMP_NUM_THREADS": "1",
}


@main_guard
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="experiment (YAML)")
    ex.add_options(parser)
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "SEED", "DEADLINE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    experiment = ex.load_experiment(arguments.config, ex.parse_overrides(arguments.set), arguments.models_of)
    if arguments.worker:
        from training import train_one  # torch and megatron-core: seconds that the process above is spared

        model, seed, deadline = arguments.worker
        train_one(experiment, model, int(seed), deadline=float(deadline), folder=arguments.out)
        return 0
    failed = 0
    if not arguments.summarize:
        models, seeds = arguments.models or list(experiment.runs), arguments.seeds or list(experiment.seeds)
        jobs = [Job(model, seed) for seed, model in itertools.product(seeds, models)]
        for job in jobs:
            experiment.run(job.model, job.seed)
        failed = run_jobs(jobs, arguments)
    outcomes = ex.read_outcomes(arguments.out)
    if not outcomes:
        if failed:  # the reasons were printed
            return 1
        raise ConfigError(f"{arguments.out}: holds no results")
    summarize(experiment, outcomes, arguments.out)
    return 1 if failed else 0


# -------------------------------------------------------------------------------------------------------- processes


@dataclass
class Job:
    """One training in a process of its own."""

    model: str
    seed: int
    process: subprocess.Popen | None = None

    @property
    def name(self) -> str:
        return f"{self.model}-{self.seed}"


def run_jobs(jobs: list[Job], arguments: argparse.Namespace) -> int:
    """Run what is not finished yet, some at a time; returns how many failed."""
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    deadline = begun + arguments.budget - SCORING_SECONDS
    waiting = [job for job in jobs if not _state(folder, job).get("finished")]
    running: list[Job] = []
    failed, slot, shown = 0, itertools.count(), begun
    try:
        while waiting or running:
            while waiting and len(running) < arguments.processes and time.time() < deadline:
                job = waiting.pop(0)
                _start(job, next(slot), deadline, arguments)
                running.append(job)
            if waiting and not running:
                print(f"out of time before {', '.join(job.name for job in waiting)}", flush=True)
                break
            time.sleep(0.5)
            for job in list(running):
                assert job.process is not None
                if job.process.poll() is None and time.time() > deadline + 2 * SCORING_SECONDS:
                    job.process.kill()
                    job.process.wait()
                if job.process.poll() is not None:
                    running.remove(job)
                    failed += _finish(folder, job, time.time() - begun)
            if time.time() - shown > 15:
                shown = time.time()
                _show(folder, running, shown - begun)
    finally:
        for job in running:
            if job.process is not None and job.process.poll() is None:
                job.process.kill()
    return failed


def _start(job: Job, slot: int, deadline: float, arguments: argparse.Namespace) -> None:
    environment = ex.on_gpu(slot, arguments.gpus) | WORKER_ENVIRONMENT
    command = [sys.executable, "-W", "ignore", __file__, arguments.config, "--out", str(arguments.out)]
    command += ["--worker", job.model, str(job.seed), str(deadline)]
    command += ["--models-of", arguments.models_of] if arguments.models_of else []
    command += ["--set", *arguments.set] if arguments.set else []
    with (arguments.out / f"{job.name}.log").open("w") as log:
        job.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _state(folder: Path, job: Job) -> dict[str, Any]:
    path = ex.outcome_path(folder, job.model, job.seed)
    return json.loads(path.read_text()) if path.is_file() else {}


def _finish(folder: Path, job: Job, seconds: float) -> int:
    state = _state(folder, job)
    if job.process is not None and job.process.returncode == 0 and state.get("cells"):
        scores = " ".join(f"{plan} {accuracy:.3f}" for plan, accuracy in ex.Outcome(**state).accuracies().items())
        how = "" if state["finished"] else f" (stopped at {state['iterations']} iterations)"
        print(f"{seconds:5.0f} s  {job.name}{how}, {state['seconds']:.0f} s of training: {scores}", flush=True)
        return 0
    log = (folder / f"{job.name}.log").read_text().strip().splitlines()
    print(f"{seconds:5.0f} s  {job.name} FAILED:", *log[-12:], sep="\n    ", flush=True)
    return 1


def _show(folder: Path, running: list[Job], seconds: float) -> None:
    parts = []
    for job in running:
        state = _state(folder, job)
        loss = f" {state['curve'][-1]['loss']:.2f}" if state.get("curve") else ""
        parts.append(f"{job.name} {state.get('iterations', 0)}{loss}")
    print(f"{seconds:5.0f} s  iterations, loss: {', '.join(parts)}", flush=True)


# ---------------------------------------------------------------------------------------------------------- summary


def summarize(experiment: ex.Experiment, outcomes: list[ex.Outcome], folder: Path) -> None:
    """Write and print the tables, and draw the plots."""
    order = {name: number for number, name in enumerate(experiment.runs)}
    models = sorted({o.model for o in outcomes}, key=lambda name: order.get(name, len(order)))
    by = {model: [o for o in outcomes if o.model == model] for model in models}
    task = experiment.task.kind
    lines = [
        f"# {experiment.name}",
        "",
        f"{outcomes[0].device}; {experiment.task.length} tokens a text; mean (lowest to highest) over seeds.",
        "",
        "| model | parameters | seeds | tokens trained | loss | iterations to 0.9 | plan: answers found |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    for model in models:
        some = by[model]
        plans = list(some[0].accuracies(task))
        found = {plan: [o.accuracies(task)[plan] for o in some] for plan in plans}
        trained = sorted({o.tokens for o in some})
        by_layer = 0 < some[0].attention_layers < 1
        told = "; ".join(f"{'by layer' if by_layer else plan} {ex.spread(values)}" for plan, values in found.items())
        loss = ex.spread([o.curve[-1]["loss"] for o in some])
        millions = " to ".join(f"{tokens / 1e6:.1f} M" for tokens in dict.fromkeys((trained[0], trained[-1])))
        unfinished = "" if all(o.finished for o in some) else " (cut short)"
        first = [next((str(step) for step, share in _on_the_way(experiment, o) if share >= 0.9), "–") for o in some]
        lines.append(
            f"| {model} | {some[0].parameters:,} | {len(some)} | {millions}{unfinished} | {loss} | {', '.join(first)} "
            f"| {told} |"
        )
        rows.append({"model": model, "parameters": some[0].parameters, "tokens": trained, "accuracy": found})
    claims = _claims(experiment, by)
    text = "\n".join([*lines, "", *claims]) + "\n"
    ex.write_text(folder / "summary.md", text)
    ex.write_json(folder / "summary.json", {"experiment": experiment.name, "models": rows, "claims": claims})
    print(text, flush=True)
    plot_accuracy(experiment, by, folder / "accuracy.png")
    plot_curves(experiment, by, folder / "curves.png")
    if experiment.scoring.pairs:
        plot_pairs(experiment, by, folder / "pairs.png")


def _claims(experiment: ex.Experiment, by: dict[str, list[ex.Outcome]]) -> list[str]:
    """The issue's three claims, seed by seed, against the best attention-only model of that seed."""
    task, focus, lines = experiment.task.kind, experiment.scoring.focus, []
    for oryx in ("gdn", "mamba2"):
        for outcome in by.get(oryx, []):
            own = outcome.accuracies(task)
            same = {name: o for name, outcomes in by.items() for o in outcomes if o.seed == outcome.seed}
            transformers = {n: same[n].accuracies(task)["attention"] for n in ("transformer", "attention") if n in same}
            only = same.get(f"{oryx}-only")
            parts = [
                f"all attention {own['attention']:.3f}, {focus} {own[focus]:.3f} (attention share "
                f"{_share(outcome, focus):.1%}), all recurrent {own['recurrent']:.3f}"
            ]
            parts += [f"{n} {value:.3f}: {_ratios(own, focus, value)}" for n, value in transformers.items()]
            if only is not None:
                parts.append(f"{oryx}-only {only.accuracies(task)['recurrent']:.3f}")
            if (hybrid := same.get(f"{oryx}-hybrid")) is not None:
                parts.append(f"{oryx}-hybrid {hybrid.accuracies(task)['attention']:.3f}")
            lines.append(f"- {oryx}, seed {outcome.seed}: {'; '.join(parts)}")
    return lines


def _ratios(own: dict[str, float], focus: str, transformer: float) -> str:
    if transformer < LEARNED:
        return "did not learn the task"
    return f"attention {own['attention'] / transformer:.3f} of it, {focus} {own[focus] / transformer:.3f} of it"


def _share(outcome: ex.Outcome, plan: str) -> float:
    return next(cell["attention_share"] for cell in outcome.cells if cell["plan"] == plan)


def legend_below(axes: Any, columns: int = 4) -> None:
    """Names of the curves, outside of the data."""
    axes.legend(fontsize=7, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def figure(path: Path, columns: int, draw: Any) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.8), layout="constrained")
    draw(figure.subplots(1, columns, squeeze=False, sharey=True)[0])
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")


def plot_accuracy(experiment: ex.Experiment, by: dict[str, list[ex.Outcome]], path: Path) -> None:
    """Answers found against the share of attention tokens: a panel per variant, a point per seed, lines of means."""
    task, length = experiment.task.kind, experiment.task.length

    def draw(panels: Any) -> None:
        for axes, oryx in zip(panels, ("gdn", "mamba2")):
            others = {"transformer": "s", "attention": "D", f"{oryx}-only": "v", f"{oryx}-hybrid": "P"}
            for model, style in ((oryx, None), *others.items()):
                outcomes = by.get(model, [])
                if not outcomes:
                    continue
                if style is not None:
                    x = outcomes[0].attention_layers
                    values = [accuracy for o in outcomes for accuracy in o.accuracies(task).values()]
                    axes.plot([x] * len(values), values, style, ms=6, mfc="none", label=model)
                    continue
                shares = {c["plan"]: c["attention_share"] for c in outcomes[0].cells if c["task"] == task}
                kinds = {"last": "C0", "ratio": "C1", "prefix": "C2"}
                mean = {plan: statistics.mean(o.accuracies(task)[plan] for o in outcomes) for plan in shares}
                for kind, colour in kinds.items():
                    plans = [p for p in shares if p.partition(":")[0] in (kind, "attention", "recurrent")]
                    if len(plans) < 3:
                        continue
                    plans.sort(key=shares.__getitem__)
                    axes.plot([shares[p] for p in plans], [mean[p] for p in plans], "-", color=colour, alpha=0.5)
                    dots = [(shares[p], o.accuracies(task)[p]) for p in plans for o in outcomes]
                    axes.plot(*zip(*dots), "o", ms=3, color=colour, label=f"{oryx}, {kind}:…")
            axes.axvline(0.1, color="grey", lw=0.7, ls=":")
            axes.set(title=f"{experiment.name}: {oryx}", xlabel=f"share of attention tokens (of {length})")
            axes.set_ylim(-0.03, 1.05)
            axes.grid(alpha=0.3)
            legend_below(axes)
        panels[0].set_ylabel("answers found")

    figure(path, 2, draw)


def plot_pairs(experiment: ex.Experiment, by: dict[str, list[ex.Outcome]], path: Path) -> None:
    """Answers found against the number of pairs: what the states hold, and what attention at the queries adds."""

    kind = experiment.task.kind

    def draw(panels: Any) -> None:
        for number, (model, outcomes) in enumerate(by.items()):
            for plan in outcomes[0].accuracies(f"{kind}-{experiment.scoring.pairs[0]}"):
                points = []
                for pairs in experiment.scoring.pairs:
                    values = [o.accuracies(f"{kind}-{pairs}")[plan] for o in outcomes]
                    points.append((pairs, statistics.mean(values)))
                style = {"attention": "-", "recurrent": ":"}.get(plan, "--")
                panels[0].plot(*zip(*points), f"o{style}", ms=3, color=f"C{number}", label=f"{model}: {plan}")
        panels[0].set_xscale("log", base=2)
        panels[0].set(title=experiment.name, ylabel="answers found", ylim=(-0.03, 1.05))
        panels[0].set_xlabel("needles" if kind == "needle" else "key-value pairs")
        panels[0].grid(alpha=0.3)
        legend_below(panels[0], 2)

    figure(path, 1, draw)


def _own_plan(experiment: ex.Experiment, outcome: ex.Outcome) -> str:
    """The plan that matters for a model: attention at the questions, or the only one it has."""
    return experiment.scoring.focus if outcome.takes_plans else next(iter(outcome.accuracies()))


def _on_the_way(experiment: ex.Experiment, outcome: ex.Outcome) -> list[tuple[float, float]]:
    """Iteration and share of answers found of the scores during training."""
    plan = _own_plan(experiment, outcome)
    return [(point["iteration"], point[plan]) for point in outcome.curve if plan in point]


def plot_curves(experiment: ex.Experiment, by: dict[str, list[ex.Outcome]], path: Path) -> None:
    """Loss, and answers found on the way under the plan that matters for each model."""

    def draw(panels: Any) -> None:
        for number, (model, outcomes) in enumerate(by.items()):
            for outcome in outcomes:
                label = model if outcome is outcomes[0] else None
                plan = _own_plan(experiment, outcome)
                if points := _on_the_way(experiment, outcome):
                    panels[0].plot(*zip(*points), color=f"C{number}", lw=1, label=f"{label}: {plan}" if label else None)
        panels[0].set(title=experiment.name, xlabel="iteration", ylabel="answers found", ylim=(-0.03, 1.05))
        panels[0].grid(alpha=0.3)
        if panels[0].get_legend_handles_labels()[0]:
            legend_below(panels[0], 2)

    figure(path, 1, draw)


if __name__ == "__main__":
    sys.exit(main())
