"""One model of a retrieval experiment: trained by the engine that users train with, scored under mode plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from experiment import Ablation, Experiment, Outcome, ScoringConfig, TaskConfig, outcome_path, write_json
from torch import Tensor

from oryx_megatron import parallel, platform
from oryx_megatron.config import to_dict
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import ConfigError
from oryx_megatron.eval.grid import Cell, run_grid
from oryx_megatron.eval.retrieval import (
    IGNORED,
    AssociativeRecall,
    Needle,
    PhoneBook,
    RetrievalBatch,
    RetrievalTask,
    WordCodec,
)
from oryx_megatron.model import OryxMixer, SequenceInfo
from oryx_megatron.model.mixer import Parts, ReferenceSteps
from oryx_megatron.modes import Plan, draw_plan
from oryx_megatron.ops import backends
from oryx_megatron.ops.fused import KeysValues
from oryx_megatron.train.engine import MegatronEngine, take_step
from oryx_megatron.train.step import Microbatch


def build_task(task: TaskConfig, vocab_size: int) -> RetrievalTask:
    """The task that is scored. Raises ConfigError where its words are more than `vocab_size`."""
    if task.kind == "mqar":
        return AssociativeRecall(vocab_size, task.pairs, queries=task.queries, tail=task.tail)
    codec = WordCodec(task.digits)
    if codec.vocab_size > vocab_size:
        raise ConfigError(f"run.model.vocab_size: {vocab_size} is below the {codec.vocab_size} words of {task.kind}")
    return Needle(codec, task.digits, needles=task.pairs) if task.kind == "needle" else PhoneBook(codec, task.digits)


def build_lessons(task: TaskConfig, vocab_size: int) -> RetrievalTask:
    """The task to train on."""
    if task.easiest is None:
        return build_task(task, vocab_size)
    if task.kind == "needle":
        return EasyAndHardNeedles(task.digits, task.easiest, task.pairs, task.length)
    return EasyAndHard(vocab_size, task.easiest, task.pairs / task.length)


@dataclass(frozen=True)
class EasyAndHard:
    """Associative recall with few to many pairs, log-uniform, and queries in all the rest of the text."""

    vocab_size: int
    least: int
    most: float
    """Pairs per token of the text."""
    name: str = "mqar"

    def sample(self, length: int, count: int, seed: int) -> RetrievalBatch:
        """See eval.retrieval.RetrievalTask; answers are counted in the groups."""

        def draw(rng: np.random.Generator) -> RetrievalTask:
            pairs = log_uniform(rng, self.least, self.most * length)
            rest = length - 2 * pairs
            return AssociativeRecall(self.vocab_size, pairs, queries=rest, tail=rest)

        return sample_in_groups(draw, length, count, seed)


@dataclass(frozen=True)
class EasyAndHardNeedles:
    """Few to many needles and questions, log-uniform, among as many plain sentences as there is room for."""

    digits: int
    least: int
    most: int
    """In texts of `length` tokens; shorter ones have proportionally fewer."""
    length: int
    name: str = "needle"

    def sample(self, length: int, count: int, seed: int) -> RetrievalBatch:
        """See eval.retrieval.RetrievalTask; answers are counted in the groups."""

        codec, most = WordCodec(self.digits), max(self.least, round(self.most * length / self.length))

        def draw(rng: np.random.Generator) -> RetrievalTask:
            task = Needle(codec, self.digits, needles=log_uniform(rng, self.least, most))
            return replace(task, questions=log_uniform(rng, 1, task.most_questions(length)))

        return sample_in_groups(draw, length, count, seed)


def log_uniform(rng: np.random.Generator, least: float, most: float) -> int:
    """A whole number between the two."""
    return round(least * (most / least) ** rng.random())


def sample_in_groups(
    draw: Callable[[np.random.Generator], RetrievalTask], length: int, count: int, seed: int, group: int = 8
) -> RetrievalBatch:
    """`count` texts, every `group` of them of a task that was drawn."""
    rng = np.random.default_rng([seed, length])
    parts = []
    for start in range(0, count, group):
        task = draw(rng)
        parts.append(task.sample(length, min(group, count - start), int(rng.integers(2**62))))
    return RetrievalBatch(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.answers for part in parts]),
    )


def ablate(model: torch.nn.Module, ablation: Ablation) -> None:
    """Change every mixer of a model; they must run the reference steps (`kernels.mixer: reference`)."""
    for mixer in model.modules():
        if isinstance(mixer, OryxMixer):
            if ablation.activation != "own":
                mixer.activation = "silu" if ablation.activation == "silu" else None
            if ablation.recurrence_gradient != 1.0:
                _scale_gradient_of_recurrence(mixer, ablation.recurrence_gradient)


def _scale_gradient_of_recurrence(mixer: OryxMixer, factor: float) -> None:
    plain = mixer.mix_heads

    def view(x: Tensor | None) -> Tensor | None:  # a tensor of its own: attention reads the other
        if x is None or not x.requires_grad:
            return x
        x = x.view_as(x)
        x.register_hook(lambda gradient: gradient * factor)
        return x

    def mix_heads(steps: ReferenceSteps, parts: Parts) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        keys_values = steps.keys_values

        def scaled(projected: Tensor) -> KeysValues:
            read = keys_values(projected)
            return read._replace(recurrent_keys=view(read.recurrent_keys), recurrent_values=view(read.recurrent_values))

        steps.keys_values = scaled
        return plain(steps, parts)

    mixer.mix_heads = mix_heads


class Training:
    """One model, its optimizer, and its stream of generated batches. Process groups must exist."""

    def __init__(self, experiment: Experiment, model: str, seed: int) -> None:
        self.experiment, self.run = experiment, experiment.run(model, seed)
        run = self.run
        backends.select(run.kernels, backends.Workload(run.model, run.precision.dtype))
        self.task = build_task(experiment.task, run.model.vocab_size)
        self.lessons = build_lessons(experiment.task, run.model.vocab_size)
        self.engine = MegatronEngine(run)
        self.chunks = self.engine.chunks
        if model in experiment.ablations:
            ablate(self.chunks[0], experiment.ablations[model])
        self.parameters = sum(p.numel() for p in self.chunks[0].parameters())

    def batches(self) -> Iterator[RetrievalBatch]:
        """One global batch per iteration, drawn beside training; the same for every model of a seed."""
        run, task = self.run, self.experiment.task
        # Scores are taken on small seeds (`scores`).
        first = (run.seed + 1) * 1_000_000_000

        def draw(iteration: int) -> RetrievalBatch:
            length = task.short_length if task.short_length and iteration < task.short_iterations else task.length
            return self.lessons.sample(length, run.train.global_batch_size * task.length // length, first + iteration)

        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(draw, i) for i in range(2)]
            for iteration in range(run.train.iterations):
                ahead.append(pool.submit(draw, iteration + 2))
                yield ahead.pop(0).result()

    def step(self, iteration: int, batch: RetrievalBatch) -> float:
        """One optimizer step; returns the loss per answer token."""
        train, (rows, length) = self.run.train, batch.tokens.shape
        size = rows * train.micro_batch_size // train.global_batch_size
        microbatches = [
            Microbatch(tokens, labels.clamp(min=0), (labels != IGNORED).float(), self._plan(iteration, m, length))
            for m, (tokens, labels) in enumerate(zip(batch.tokens.split(size), batch.labels.split(size)))
        ]
        loss, _ = take_step(self.engine, microbatches)
        return loss

    def _plan(self, iteration: int, microbatch: int, length: int) -> Plan:
        run = self.run
        return draw_plan(run.modes, seed=run.seed, iteration=iteration, microbatch=microbatch, length=length)

    def logits(self, tokens: Tensor, plan: Plan) -> Tensor:
        """[n, s] → [n, s, vocabulary]"""
        info = SequenceInfo.build(plan, device=platform.device())
        return self.chunks[0].module(
            tokens.to(platform.device()), None, None, packed_seq_params=info, runtime_gather_output=True
        )

    def predict(self, tokens: Tensor, plan: Plan) -> Tensor:
        """Most likely next token after each, for eval.grid."""
        # Not inference_mode: training continues, and tables that ops keep would be of no use to it.
        with torch.no_grad():
            return self.logits(tokens, plan).argmax(-1).cpu()

    def scores(
        self, plans: Sequence[str], tasks: Sequence[RetrievalTask] = (), *, part: int = 1, seed: int = 0
    ) -> list[Cell]:
        """Scores of tasks (default: the experiment's) under those of the plans that the model has, on 1/part texts."""
        scoring, model = self.experiment.scoring, self.run.model
        self.chunks[0].eval()
        cells = run_grid(
            self.predict,
            tasks or [self.task],
            [self.experiment.task.length],
            list(plans) if model.takes_plans else [model.single_mode or "attention"],  # a hybrid ignores it
            chunk=self.run.modes.chunk,
            examples=max(1, scoring.examples // part),
            batch_size=scoring.batch_size,
            seed=seed,
        )
        self.chunks[0].train()
        return cells

    def final_scores(self) -> list[Cell]:
        """All that the experiment asks for."""
        scoring, task = self.experiment.scoring, self.experiment.task
        cells, vocabulary = self.scores(scoring.plans), self.run.model.vocab_size
        variants = [replace(task, pairs=n, queries=min(n, task.queries or n)) for n in scoring.pairs]
        tasks = [replace(build_task(variant, vocabulary), name=f"{task.kind}-{variant.pairs}") for variant in variants]
        return cells + (self.scores(_plans_on_the_way(scoring), tasks, part=2) if tasks else [])

    def fit(self, *, deadline: float, report: Callable[[Outcome], None]) -> Outcome:
        """Train until the end or until `deadline` (time.time()), then score.

        `report` gets the outcome so far about every two seconds of training.
        """
        experiment, run = self.experiment, self.run
        outcome = Outcome(experiment.name, run.model.name, run.seed, parameters=self.parameters, run=to_dict(run))
        outcome.kernels = backends.describe(backends.Workload(run.model, run.precision.dtype))
        outcome.device = torch.cuda.get_device_name() if platform.has_gpu() else "CPU"
        interval, tokens = experiment.scoring.interval, run.train.global_batch_size * experiment.task.length
        begun = reported = time.time()
        losses: list[float] = []
        for iteration, batch in enumerate(self.batches()):
            losses.append(self.step(iteration, batch))
            outcome.iterations = iteration + 1
            outcome.tokens += tokens
            now = time.time()
            due = interval > 0 and outcome.iterations % interval == 0
            if due or outcome.iterations in (1, run.train.iterations):
                point = {"iteration": outcome.iterations, "loss": sum(losses) / len(losses)}
                if due:
                    cells = self.scores(_plans_on_the_way(experiment.scoring), part=8)
                    point |= {cell.plan: cell.accuracy for cell in cells}
                outcome.curve.append(point)
                losses = []
            if due or now - reported > 2:
                outcome.seconds, reported = now - begun, now
                report(outcome)
            if now > deadline:
                break
        outcome.seconds = time.time() - begun
        outcome.cells = [asdict(cell) for cell in self.final_scores()]
        outcome.finished = outcome.iterations == run.train.iterations
        return outcome


def _plans_on_the_way(scoring: ScoringConfig) -> list[str]:
    return ["attention", "recurrent", scoring.focus]


def train_one(experiment: Experiment, model: str, seed: int, *, deadline: float, folder: Path) -> Outcome:
    """Train and score one model in this process: outcome in `folder`/MODEL-SEED.json, weights of Oryx models in .pt."""
    parallel.initialize(experiment.run(model, seed).parallel, seed=seed)
    path = outcome_path(folder, model, seed)
    try:
        training = Training(experiment, model, seed)
        outcome = training.fit(deadline=deadline, report=lambda so_far: write_json(path, asdict(so_far)))
        if training.run.model.takes_plans:  # for policy.py
            with replacing(path.with_suffix(".pt")) as temporary:
                torch.save(training.chunks[0].module.state_dict(), temporary)
        write_json(path, asdict(outcome))
    finally:
        parallel.destroy()
    return outcome
