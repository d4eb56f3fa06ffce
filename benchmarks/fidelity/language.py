#!/usr/bin/env python
"""Language modelling after mixed training: Oryx under several mode plans against models of one mode, equal tokens.

    python benchmarks/fidelity/language.py benchmarks/fidelity/language.yaml --out runs/language

Every model of the config with every seed is an ordinary run, `python -m oryx_megatron.train OUT/MODEL-SEED/run.yaml`;
then their metrics become summary.md, summary.json, and training.csv: the training loss of every run, unfinished ones
too. Started again, finished runs are skipped and others resumed from their last checkpoint. How to make the data stands
in the config.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import experiment as ex

from oryx_megatron import arch
from oryx_megatron.cli import main_guard
from oryx_megatron.config import to_yaml
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.errors import ConfigError


@main_guard
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="models and their run (YAML)")
    ex.add_options(parser)
    arguments = parser.parse_args(argv)
    data = ex.read_experiment(arguments.config, {"name", "seeds", "run", "models", "equal_to"}, arguments.models_of)
    runs = ex.build_runs(data, {"output_dir": "none"}, ex.parse_overrides(arguments.set), arguments.config)
    unknown = set(arguments.models or []) - set(runs)
    if unknown:
        raise ConfigError(f"--models {min(unknown)}: unknown; known: {', '.join(runs)}")
    named = [
        replace(runs[name], seed=seed, output_dir=str(arguments.out / f"{name}-{seed}"))
        for seed, name in itertools.product(arguments.seeds or data["seeds"], arguments.models or list(runs))
    ]
    failed = 0 if arguments.summarize else train(named, arguments)
    results = [found for run in named if (found := read_result(run)) is not None]
    if not results:
        raise ConfigError(f"{arguments.out}: holds no finished run")
    sys.stdout.write(summarize(data["name"], results, arguments.out))
    ex.write_text(arguments.out / "training.csv", training_losses(named))
    return 1 if failed else 0


def train(runs: Sequence[RunConfig], arguments: argparse.Namespace) -> int:
    """Train what is not finished, some at a time; returns how many failed."""
    begun = time.monotonic()
    waiting = [run for run in runs if read_result(run) is None]
    running: list[tuple[RunConfig, subprocess.Popen]] = []
    failed, slots = 0, itertools.count()
    try:
        while waiting or running:
            left = arguments.budget - (time.monotonic() - begun)
            while waiting and len(running) < arguments.processes and left > 0:
                run = waiting.pop(0)
                running.append((run, _start(run, next(slots), arguments.gpus)))
            if not running:
                break
            time.sleep(0.5)
            for run, process in list(running):
                if left <= 0 and process.poll() is None:
                    process.terminate()
                    process.wait()
                    print(f"{run.output_dir}: out of time", flush=True)
                    running.remove((run, process))
                elif process.poll() is not None:
                    running.remove((run, process))
                    failed += process.returncode != 0
                    how = f"failed, see {run.output_dir}/log.txt" if process.returncode else "done"
                    print(f"{time.monotonic() - begun:5.0f} s  {run.output_dir}: {how}", flush=True)
    finally:
        for _, process in running:
            process.kill()
    return failed


def _start(run: RunConfig, slot: int, gpus: int) -> subprocess.Popen:
    folder = Path(run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "run.yaml"
    config.write_text(to_yaml(run))
    environment = ex.on_gpu(slot, gpus)
    with (folder / "log.txt").open("a") as log:
        command = [sys.executable, "-m", "oryx_megatron.train", str(config)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


# ---------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Result:
    """One finished run."""

    model: str
    seed: int
    parameters: int
    tokens: int
    losses: dict[str, float]
    """Validation loss at the end, nats per token, by plan."""
    bits_per_byte: dict[str, float]
    tokens_per_second: float
    """By the median step."""
    sets: dict[str, dict[str, float]] = field(default_factory=dict)
    """Bits per byte of further validation sets (data.validation), by plan."""


def read_metrics(run: RunConfig) -> list[dict[str, Any]]:
    """What the run wrote so far."""
    path = Path(run.output_dir) / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:  # cut off by a kill
            continue
    return lines


def training_losses(runs: Sequence[RunConfig], window: int = 50) -> str:
    """CSV: mean training loss over every `window` steps, a column per run; empty where a run has not been."""
    columns = {}
    for run in runs:
        losses = {line["iteration"]: line["loss"] for line in read_metrics(run) if line.get("kind") == "step"}
        means = {}
        for first in range(1, run.train.iterations + 1, window):
            steps = range(first, min(first + window, run.train.iterations + 1))
            if all(step in losses for step in steps):
                means[f"{first}-{steps[-1]}"] = f"{statistics.mean(losses[step] for step in steps):.4f}"
        if means:
            columns[Path(run.output_dir).name] = means
    rows = list(dict.fromkeys(row for means in columns.values() for row in means))
    lines = [",".join(["steps", *columns])]
    lines += [",".join([row, *(means.get(row, "") for means in columns.values())]) for row in rows]
    return "\n".join(lines) + "\n"


def read_result(run: RunConfig) -> Result | None:
    """The result of a run, or None while it is not finished."""
    lines = read_metrics(run)
    ends = [line for line in lines if line.get("kind") == "evaluation" and line["iteration"] == run.train.iterations]
    last = [line for line in ends if line["dataset"] == "valid"]
    sets = {name: [line for line in ends if line["dataset"] == name] for name in run.data.validation}
    steps = {line["iteration"]: line for line in lines if line.get("kind") == "step"}
    if not steps or any(
        {line["plan"] for line in some} != set(run.evaluation.plans) for some in (last, *sets.values())
    ):
        return None
    seconds = statistics.median(line["seconds"] for line in steps.values())
    tokens = next(iter(steps.values()))["tokens"]
    return Result(
        run.model.name,
        run.seed,
        arch.parameter_counts(run.model).total,
        tokens * run.train.iterations,
        {line["plan"]: line["loss"] for line in last},
        {line["plan"]: line["bits_per_byte"] for line in last},
        tokens / seconds,
        {name: {line["plan"]: line["bits_per_byte"] for line in some} for name, some in sets.items()},
    )


def summarize(name: str, results: list[Result], folder: Path) -> str:
    """Write and return the tables of validation losses."""
    lines = [f"# {name}", "", "Validation loss in nats per token, mean (lowest to highest) over seeds.", ""]
    lines += ["| model | parameters | seeds | tokens | tokens/s | loss by plan |", "|---|---|---|---|---|---|"]
    models = {model: [r for r in results if r.model == model] for model in dict.fromkeys(r.model for r in results)}
    for model, some in models.items():
        told = "; ".join(f"{plan} {ex.spread([r.losses[plan] for r in some], 4)}" for plan in some[0].losses)
        rate = statistics.median(r.tokens_per_second for r in some)
        lines.append(
            f"| {model} | {some[0].parameters / 1e6:.1f} M | {len(some)} | {some[0].tokens / 1e6:.0f} M | {rate:,.0f} "
            f"| {told} |"
        )
    sets = list(results[0].sets)
    if sets:
        lines += ["", "Bits per byte of held-out text.", ""]
        lines += [f"| model | plan | {' | '.join(sets)} |", f"|---|---|{'---|' * len(sets)}"]
        for model, some in models.items():
            for plan in some[0].losses:
                cells = [ex.spread([r.sets[each][plan] for r in some]) for each in sets]
                lines.append(f"| {model} | {plan} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    ex.write_text(folder / "summary.md", text)
    ex.write_json(folder / "summary.json", {"experiment": name, "results": [vars(result) for result in results]})
    return text


if __name__ == "__main__":
    sys.exit(main())
