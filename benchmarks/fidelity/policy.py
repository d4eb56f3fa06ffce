#!/usr/bin/env python
"""Which tokens should attend? Policies that choose them from the text itself, against plans fixed beforehand.

    python benchmarks/fidelity/policy.py benchmarks/fidelity/mqar-cpu.yaml --out runs/mqar-cpu

Takes the models with both modes that retrieval.py trained into the folder; writes policy/MODEL-SEED.json, and from all
of these policy.json, policy.md and policy.png: answers found against the share of attention tokens. `--models` and
`--seeds` name some of them, for several processes side by side. With `--queries 3` the texts ask for three keys, and
`policy_3` is the name in place of `policy`: what few questions need.

Policies, token by token and without looking ahead:

- entropy: attend where the prediction of an all-recurrent pass is least certain, above a threshold found on other
  texts for each share;
- seen: attend where the token has occurred in the text before;
- seen+entropy: of those, the least certain;
- learned: where a linear model expects most of attention, from the token, the two before it, whether each occurred
  before, and the entropy; fitted to what attention gained over recurrence at the answers of other texts;
- router: the router of the product (`oryx router`), trained on the same gains of ROUTER_TEXTS texts;
  like there, it counts in the text and knows counts of further texts;
- random, ratio: the same shares without looking at the text;
- asked: exactly the tokens whose answers count, which only the examiner knows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import experiment as ex
import numpy as np
import torch
from torch import Tensor
from training import Training

from oryx_megatron import parallel
from oryx_megatron.cli import main_guard
from oryx_megatron.config.schema import RouterConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.eval.retrieval import IGNORED, RetrievalBatch, score
from oryx_megatron.eval.router_training import Gains, fit
from oryx_megatron.hf.router_oryx import OryxRouter, RouterShape
from oryx_megatron.modes import Mode, ModePlan, parse_plan

ROUTER_TEXTS, COUNTED = 2048, 8192
"""That a router learns from, and that it only counts."""
SHARES = (0.05, 0.02, 0.1, 0.2, 0.4)
"""Of attention tokens, where a policy can be given one; in order of worth."""
Chooser = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Tokens, entropies and labels of one text, each [s] → bool [s]: which tokens attend."""


@main_guard
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="experiment (YAML)")
    parser.add_argument("--out", type=Path, required=True, help="folder of retrieval.py's results")
    parser.add_argument("--examples", type=int, default=128, help="texts (default: 128)")
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--seeds", nargs="*", type=int, help="only these")
    parser.add_argument("--queries", type=int, help="mqar: keys asked for (default: the config's)")
    parser.add_argument("--summarize", action="store_true", help="only read results and write tables and plot")
    arguments = parser.parse_args(argv)
    experiment, name = ex.load_experiment(arguments.config), "policy"
    if arguments.queries is not None:
        experiment = replace(experiment, task=replace(experiment.task, queries=arguments.queries))
        name += f"_{arguments.queries}"  # no -: MODEL-SEED.json beside it are outcomes
    results = arguments.out / name
    found = [
        outcome
        for outcome in ex.read_outcomes(arguments.out)
        if ex.outcome_path(arguments.out, outcome.model, outcome.seed).with_suffix(".pt").is_file()
        and (arguments.models is None or outcome.model in arguments.models)
        and (arguments.seeds is None or outcome.seed in arguments.seeds)
    ]
    if not found and not arguments.summarize:
        raise ConfigError(f"{arguments.out}: holds no weights; train models with both modes by retrieval.py first")
    for outcome in () if arguments.summarize else found:
        path, rows = ex.outcome_path(results, outcome.model, outcome.seed), []
        for row in _try_all(experiment, outcome, arguments.out, arguments.examples):
            rows.append(row)
            ex.write_json(path, {"finished": False, "rows": rows})
        ex.write_json(path, {"finished": True, "rows": rows})
    rows = [row for path in sorted(results.glob("*-*.json")) for row in json.loads(path.read_text())["rows"]]
    if not rows:
        raise ConfigError(f"{results}: holds no results")
    ex.write_json(arguments.out / f"{name}.json", rows)
    text = _table(experiment, rows)
    ex.write_text(arguments.out / f"{name}.md", text)
    sys.stdout.write(text)
    _plot(experiment, rows, arguments.out / f"{name}.png")
    return 0


def _try_all(experiment: ex.Experiment, outcome: ex.Outcome, folder: Path, examples: int) -> Iterator[dict[str, Any]]:
    """Every policy with one model, each as soon as it is known."""
    parallel.initialize(experiment.run(outcome.model, outcome.seed).parallel, seed=outcome.seed)
    try:
        training = Training(experiment, outcome.model, outcome.seed)
        weights = ex.outcome_path(folder, outcome.model, outcome.seed).with_suffix(".pt")
        training.chunks[0].module.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
        training.chunks[0].eval()
        length = experiment.task.length
        texts, others = (training.task.sample(length, examples, seed) for seed in (0, 1))
        entropies, calibration = entropy(training, texts.tokens), entropy(training, others.tokens)
        learned = Learned(others.tokens.numpy(), calibration, gains(training, others))

        @cache
        def routed() -> OryxRouter:
            samples = [training.task.sample(length, count, seed) for count, seed in ((ROUTER_TEXTS, 2), (COUNTED, 3))]
            return router_of(training, samples[0], samples[1].tokens, others.tokens)

        for policy, wanted, choose in policies(others.tokens.numpy(), calibration, length, learned, routed):
            plans = [
                ModePlan.from_mask(choose(*parts))
                for parts in zip(texts.tokens.numpy(), entropies, texts.labels.numpy(), strict=True)
            ]
            yield {
                "model": outcome.model,
                "seed": outcome.seed,
                "policy": policy,
                "wanted": wanted,
                "share": statistics.mean(plan.attention_share for plan in plans),
                "accuracy": answers_found(training, texts, plans),
            }
    finally:
        parallel.destroy()


def policies(
    tokens: np.ndarray, entropies: np.ndarray, length: int, learned: Learned, routed: Callable[[], OryxRouter]
) -> Iterator[tuple[str, float | None, Chooser]]:
    """Name, wanted share (None: the policy's own) and rule, in order of worth.

    Thresholds are from these other texts, both [n, s]. `routed` makes the router, which takes most of the time: it is
    asked for after the policies that do without.
    """
    repeated = np.stack([seen(text) for text in tokens])
    yield "recurrent", None, lambda text, entropy, labels: np.zeros(length, bool)
    yield "attention", None, lambda text, entropy, labels: np.ones(length, bool)
    yield "asked", None, lambda text, entropy, labels: labels != IGNORED
    yield "seen", None, lambda text, entropy, labels: seen(text)
    for share in SHARES:
        gain = learned.threshold(share)
        yield "learned", share, lambda text, entropy, labels, gain=gain: learned.expected_gain(text, entropy) > gain
        evenly = parse_plan(f"ratio:{share}", length, chunk=1).is_attention()
        yield "ratio", share, lambda text, entropy, labels, evenly=evenly: evenly
    for share in SHARES:
        yield "router", share, partial(routes, routed(), share)
    for share in SHARES:
        least = float(np.quantile(entropies, 1 - share))
        yield "entropy", share, lambda text, entropy, labels, least=least: entropy > least
        if share < repeated.mean():
            least = float(np.quantile(entropies[repeated], 1 - share / repeated.mean()))
            yield "seen+entropy", share, lambda text, entropy, labels, least=least: seen(text) & (entropy > least)
        rng = np.random.default_rng(7)
        yield "random", share, lambda text, entropy, labels, share=share, rng=rng: rng.random(length) < share


def router_of(training: Training, texts: RetrievalBatch, counted: Tensor, others: Tensor) -> OryxRouter:
    """The product's router, trained on what attention gains in texts, with counts and thresholds from others."""
    gained = torch.from_numpy(np.concatenate([gains(training, part) for part in _split(texts, 256)])).float()
    torch.manual_seed(0)
    options = RouterConfig(epochs=8, batch_size=32, weight_decay=0.01)  # little to learn by heart here
    router = OryxRouter(RouterShape(training.run.model.vocab_size, table=options.table))
    router.count(counted)
    known = Gains(
        texts.tokens, gained, torch.ones_like(gained, dtype=torch.bool), torch.zeros(2, *gained.shape), texts.labels
    )
    fit(router, known, options, torch.Generator().manual_seed(0))
    with torch.no_grad():
        router.calibrate(router.eval()(others)[0])
    return router


def _split(texts: RetrievalBatch, size: int) -> list[RetrievalBatch]:
    return [
        RetrievalBatch(texts.tokens[i : i + size], texts.labels[i : i + size], texts.answers)
        for i in range(0, len(texts.tokens), size)
    ]


@torch.no_grad()
def routes(router: OryxRouter, share: float, text: np.ndarray, entropy: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A Chooser by a router."""
    scores, _ = router(torch.from_numpy(text)[None])
    return (scores[0] > router.threshold(share)).numpy()


def seen(text: np.ndarray) -> np.ndarray:
    """Where a token [s] has occurred before."""
    first = np.zeros(len(text), bool)
    first[np.unique(text, return_index=True)[1]] = True
    return ~first


class Learned:
    """Ridge regression of attention's gain on what a reader of the text so far can see."""

    def __init__(self, tokens: np.ndarray, entropies: np.ndarray, gained: np.ndarray) -> None:
        """Tokens, entropies and gains of other texts, each [n, s]."""
        self.vocabulary = int(tokens.max()) + 1
        rows = np.concatenate([self._features(*text) for text in zip(tokens, entropies, strict=True)])
        square = rows.T @ rows + np.eye(rows.shape[1])
        self.weights = np.linalg.solve(square, rows.T @ gained.ravel())
        self._others = rows @ self.weights

    def threshold(self, share: float) -> float:
        """The expected gain above which this share of the other texts' tokens lie."""
        return float(np.quantile(self._others, 1 - share))

    def expected_gain(self, text: np.ndarray, entropy: np.ndarray) -> np.ndarray:
        """[s]: nats, for each token of a text."""
        return self._features(text, entropy) @ self.weights

    def _features(self, text: np.ndarray, entropy: np.ndarray) -> np.ndarray:
        """[s, features]"""
        parts = [np.ones((len(text), 1)), entropy[:, None]]
        for back in range(3):
            known = np.concatenate([np.zeros(back, int), np.minimum(text, self.vocabulary - 1)])[: len(text)]
            parts += [np.eye(self.vocabulary)[known], seen(known)[:, None]]
        return np.concatenate(parts, 1)


@torch.no_grad()
def gains(training: Training, texts: RetrievalBatch) -> np.ndarray:
    """[n, s]: nats by which all attention predicts the answers better than all recurrence; 0 where nothing is asked."""
    asked, wanted = texts.labels != IGNORED, texts.labels.clamp(min=0).unsqueeze(-1)
    found = []
    for mode in (Mode.ATTENTION, Mode.RECURRENT):
        plan = ModePlan.uniform(mode, texts.tokens.shape[1])
        logs = torch.cat([training.logits(part, plan).float().log_softmax(-1).cpu() for part in texts.tokens.split(32)])
        found.append(logs.gather(-1, wanted).squeeze(-1))
    return torch.where(asked, found[0] - found[1], 0.0).numpy()


@torch.no_grad()
def entropy(training: Training, tokens: Tensor) -> np.ndarray:
    """Of the predictions after each token [n, s], all of them recurrent; in nats."""
    plan = ModePlan.uniform(Mode.RECURRENT, tokens.shape[1])
    logs = torch.cat([training.logits(part, plan).float().log_softmax(-1) for part in tokens.split(32)])
    return -(logs.exp() * logs).sum(-1).cpu().numpy()


def answers_found(training: Training, texts: RetrievalBatch, plans: list[ModePlan]) -> float:
    """Share of the answers, each text under its own plan; texts of one plan go together."""
    by_plan: dict[ModePlan, list[int]] = defaultdict(list)
    for row, plan in enumerate(plans):
        by_plan[plan].append(row)
    predictions = torch.empty_like(texts.tokens)
    for plan, rows in by_plan.items():
        predictions[rows] = torch.cat([training.predict(part, plan) for part in texts.tokens[rows].split(64)])
    return score(predictions, texts).accuracy


def _table(experiment: ex.Experiment, rows: list[dict[str, Any]]) -> str:
    models = sorted({row["model"] for row in rows})
    lines = [
        f"# {experiment.name}: policies",
        "",
        "Answers found (share of attention tokens); means over seeds.",
        "",
        f"| policy | {' | '.join(models)} |",
        f"|---|{'---|' * len(models)}",
    ]
    for key in sorted(dict.fromkeys((row["policy"], row["wanted"]) for row in rows), key=lambda key: key[1] or 0.0):
        cells = []
        for model in models:
            some = [row for row in rows if (row["policy"], row["wanted"]) == key and row["model"] == model]
            if not some:
                cells.append("")
                continue
            mean = {name: statistics.mean(row[name] for row in some) for name in ("accuracy", "share")}
            cells.append(f"{mean['accuracy']:.3f} ({mean['share']:.1%})")
        lines.append(f"| {key[0]} {'' if key[1] is None else key[1]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plot(experiment: ex.Experiment, rows: list[dict[str, Any]], path: Path) -> None:
    from retrieval import figure, legend_below

    models = sorted({row["model"] for row in rows})

    def draw(panels: Any) -> None:
        for axes, model in zip(panels, models, strict=True):
            for number, policy in enumerate(dict.fromkeys(row["policy"] for row in rows)):
                points: dict[float | None, list[dict[str, Any]]] = defaultdict(list)
                for row in rows:
                    if (row["model"], row["policy"]) == (model, policy):
                        points[row["wanted"]].append(row)
                means = sorted(
                    (statistics.mean(r["share"] for r in some), statistics.mean(r["accuracy"] for r in some))
                    for some in points.values()
                )
                fixed = policy in ("recurrent", "attention", "asked")  # larger: others may lie on them
                style = {"marker": "s", "ms": 10, "mfc": "none", "ls": "none"} if fixed else {"marker": "o", "ms": 4}
                axes.plot(*zip(*means, strict=True), lw=1, color=f"C{number}", label=policy, **style)
            axes.set(title=f"{experiment.name}: {model}", xlabel="share of attention tokens", ylim=(-0.03, 1.05))
            axes.set_xscale("symlog", linthresh=0.02, linscale=0.5)
            axes.set_xlim(-0.003, 1.3)
            axes.set_xticks([0, 0.02, 0.05, 0.1, 0.2, 0.4, 1], ["0", "2 %", "5 %", "10 %", "20 %", "40 %", "all"])
            axes.grid(alpha=0.3)
            legend_below(axes)
        panels[0].set_ylabel("answers found")

    figure(path, len(models), draw)


if __name__ == "__main__":
    sys.exit(main())
