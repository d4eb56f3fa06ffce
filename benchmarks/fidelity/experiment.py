"""Retrieval experiments: their configs and results. What trains them is training.py; nothing here imports torch.

An experiment is a YAML file: a task, a run config without data (`run`), and models, each a change of that run config.
All models see the same batches in the same order; their SwiGLU is as wide as gives them equally many parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from oryx_megatron import arch
from oryx_megatron.config import from_dict, validate
from oryx_megatron.config.schema import ModelConfig, RunConfig
from oryx_megatron.config.yaml_text import parse_yaml
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The generated texts."""

    kind: Literal["mqar", "needle", "phonebook"]
    """Task of oryx_megatron/eval/retrieval.py."""
    length: int
    """Tokens per text."""
    pairs: int = 8
    """mqar: key-value pairs at the start; needle: needles."""
    queries: int | None = None
    """mqar: keys asked for."""
    tail: int | None = None
    """mqar: tokens at the end among which they stand."""
    digits: int = 5
    """needle, phonebook: digits of a number."""
    easiest: int | None = None
    """mqar, needle: training texts have from this many pairs to `pairs`, and queries in all (mqar) or some of the rest;
    null: as in scoring."""
    short_length: int | None = None
    """Training begins with texts of this length (proportionally fewer pairs, more texts: as many tokens a step)."""
    short_iterations: int = 0
    """How many iterations it does so."""


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How trained models are scored."""

    plans: tuple[str, ...]
    """Mode plans of models with both modes."""
    focus: str
    """The plan of the claim: the query region alone attends."""
    examples: int = 256
    """Texts."""
    batch_size: int = 64
    """Texts per forward pass."""
    pairs: tuple[int, ...] = ()
    """mqar, needle: further scores with so many pairs, all recurrent, all attention and under `focus`."""
    interval: int = 0
    """Iterations between scores (an eighth of the texts; all, recurrent, focus) on the way; 0: none."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What no run config changes, to find causes: a model's `ablation`, of retrieval experiments alone."""

    activation: Literal["own", "silu", "none"] = "own"
    """After the convolutions; own: the variant's."""
    recurrence_gradient: float = 1.0
    """Factor of the gradient from the recurrence to the keys and values that it shares with attention."""


@dataclass(frozen=True)
class Experiment:
    """One YAML file."""

    name: str
    task: TaskConfig
    scoring: ScoringConfig
    seeds: tuple[int, ...]
    runs: dict[str, RunConfig] = field(repr=False)
    """By model's name, in order; seeds are set later."""
    ablations: dict[str, Ablation] = field(default_factory=dict)
    """Of the models that have one."""

    def run(self, model: str, seed: int) -> RunConfig:
        """The run of one model and seed."""
        if model not in self.runs:
            raise ConfigError(f"model `{model}` is unknown; known: {', '.join(self.runs)}")
        return replace(self.runs[model], seed=seed)


def load_experiment(
    path: str | Path, overrides: Mapping[str, Any] | None = None, models_of: str | Path | None = None
) -> Experiment:
    """The experiment of a YAML file; `overrides` change its `run` section, e.g. {"train": {"iterations": 10}}.

    `models_of`: another YAML file, whose `models` and `equal_to` replace those of the first.

    Raises ConfigError for what does not parse or fit.
    """
    source = str(path)
    data = read_experiment(path, {"name", "task", "scoring", "seeds", "run", "models", "equal_to"}, models_of)
    task = from_dict(TaskConfig, data["task"], source=source, prefix="task")
    scoring = from_dict(ScoringConfig, data["scoring"], source=source, prefix="scoring")
    base = {"data": {"sequence_length": task.length, "tokenizer": "none", "blend": ["none"]}, "output_dir": "none"}
    models: dict[str, Any] = {name: dict(changes or {}) for name, changes in data["models"].items()}
    ablations = {
        name: from_dict(Ablation, changes.pop("ablation"), source=f"{source}: {name}", prefix="ablation")
        for name, changes in models.items()
        if "ablation" in changes
    }
    data["models"] = models
    runs = build_runs(data, {**base, "evaluation": {"plans": []}}, overrides or {}, source)
    for name in ablations:
        if runs[name].kernels.mixer != "reference":
            raise ConfigError(f"{source}: {name}: ablation: needs kernels.mixer: reference")
    return Experiment(data["name"], task, scoring, tuple(data["seeds"]), runs, ablations)


def build_runs(
    data: Mapping[str, Any], base: Mapping[str, Any], overrides: Mapping[str, Any], source: str
) -> dict[str, RunConfig]:
    """A run per entry of `models`: `base`, the `run` section, the entry's changes and `overrides`, in this order.

    All get as many parameters as the model `equal_to`. Raises ConfigError.
    """
    runs = {}
    for name, changes in data["models"].items():
        plain: dict[str, Any] = {}
        for part in (base, data["run"], changes or {}, overrides, {"model": {"name": name}}):
            plain = merge(plain, part)
        runs[name] = from_dict(RunConfig, plain, source=f"{source}: {name}")
    if data["equal_to"] not in runs:
        raise ConfigError(f"{source}: equal_to: {data['equal_to']} is none of the models")
    wanted = arch.parameter_counts(runs[data["equal_to"]].model).total
    runs = {name: replace(run, model=equalised(run.model, wanted)) for name, run in runs.items()}
    for run in runs.values():
        validate(run, 1)
    return runs


def read_experiment(path: str | Path, keys: set[str], models_of: str | Path | None) -> dict[str, Any]:
    """`read_yaml`, with `models` and `equal_to` of another file if one is given. Raises ConfigError."""
    data = read_yaml(path, keys)
    if models_of is not None:
        data |= read_yaml(models_of, {"models", "equal_to"})
        data["name"] += f", models of {Path(models_of).stem}"
    return data


def read_yaml(path: str | Path, keys: set[str]) -> dict[str, Any]:
    """The mapping in a YAML file, which must have exactly these keys. Raises ConfigError."""
    try:
        data = parse_yaml(Path(path).read_text(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(data, dict) or set(data) != keys:
        raise ConfigError(f"{path}: expected exactly the keys {', '.join(sorted(keys))}")
    if "seeds" in keys and not (
        isinstance(data["seeds"], list) and all(isinstance(seed, int) for seed in data["seeds"])
    ):
        raise ConfigError(f"{path}: seeds: expected a list of integers, got {data['seeds']!r}")
    return data


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """["train.iterations=10"] → {"train": {"iterations": 10}}; values are YAML. Raises ConfigError."""
    changes: dict[str, Any] = {}
    for item in items:
        path, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: expected key=value, e.g. train.iterations=100")
        change: Any = parse_yaml(value, f"--set {item}")
        for key in reversed(path.split(".")):
            change = {key: change}
        changes = merge(changes, change)
    return changes


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mapping by mapping."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def equalised(model: ModelConfig, parameters: int) -> ModelConfig:
    """`model` with the SwiGLU width (a multiple of 8) that brings it nearest to this many parameters."""
    rest = arch.parameter_counts(replace(model, ffn_hidden_size=8)).total
    per_eight = model.num_layers * 3 * model.hidden_size * 8
    return replace(model, ffn_hidden_size=max(8, 8 * (1 + round((parameters - rest) / per_eight))))


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every script that trains models of a YAML file is given."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--models-of", metavar="FILE", help="take `models` and `equal_to` from this file (ablations)")
    parser.add_argument("--seeds", nargs="*", type=int, help="instead of the config's")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to spread them over")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds in all; what is under way then is cut short")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="changes of the config's `run`")
    parser.add_argument("--summarize", action="store_true", help="only read results and write the summary")


def on_gpu(slot: int, gpus: int) -> dict[str, str]:
    """The environment of a training that is the `slot`-th on the first `gpus` GPUs that this process may use."""
    if gpus <= 1:
        return dict(os.environ)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return os.environ | {"CUDA_VISIBLE_DEVICES": seen.split(",")[:gpus][slot % gpus]}


# ----------------------------------------------------------------------------------------------------------- results


@dataclass
class Outcome:
    """One trained and scored model; what its JSON file holds."""

    experiment: str
    model: str
    seed: int
    finished: bool = False
    """Whether all iterations were done."""
    iterations: int = 0
    tokens: int = 0
    """Trained on."""
    parameters: int = 0
    seconds: float = 0.0
    """Of training."""
    kernels: str = ""
    device: str = ""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Iteration, loss (mean since the point before), and scores by plan where they were taken."""
    cells: list[dict[str, Any]] = field(default_factory=list)
    """Scores at the end: fields of eval.grid.Cell."""
    run: dict[str, Any] = field(default_factory=dict)
    """The resolved run config."""

    @property
    def attention_layers(self) -> float:
        """Share of the layers that attend, or may."""
        kinds = self._model.layer_modes
        return sum(kind != "recurrent" for kind in kinds) / len(kinds)

    @property
    def takes_plans(self) -> bool:
        """Whether modes are chosen by a plan: hybrids and models of one mode are what they are."""
        return self._model.takes_plans

    @property
    def _model(self) -> ModelConfig:
        return from_dict(ModelConfig, self.run["model"], source=self.model, prefix="model")

    def accuracies(self, task: str | None = None) -> dict[str, float]:
        """Share of answers found, by plan; empty where a task was not scored. None: the experiment's own task."""
        task = task or self.cells[0]["task"]
        return {cell["plan"]: cell["accuracy"] for cell in self.cells if cell["task"] == task}


def outcome_path(folder: Path, model: str, seed: int) -> Path:
    """Where the outcome of one model and seed lies."""
    return folder / f"{model}-{seed}.json"


def read_outcomes(folder: Path) -> list[Outcome]:
    """Outcomes of a folder that have scores, by name and seed."""
    found = [Outcome(**json.loads(path.read_text())) for path in sorted(folder.glob("*-*.json"))]
    return [outcome for outcome in found if outcome.cells]


def write_json(path: Path, data: Any) -> None:
    """Write JSON by atomic rename."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file by atomic rename."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean (lowest to highest)."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
