#!/usr/bin/env python
"""All of this folder's evidence that GPUs give in some minutes: hybrids, routers on real text, retrieval on the CPU.

    python benchmarks/fidelity/evidence.py --out runs/evidence --minutes 9
    python benchmarks/fidelity/evidence.py --out runs/evidence --summarize

Several processes side by side, in order of worth:

1. on every GPU that is visible: the models of evidence.yaml learn language (ordinary runs), those of Oryx first, and
   right after each its router, compared with other policies on held-out code, documentation and prose (routing.py).
   A process sees one GPU, that with the fewest of them. Kernels compile while the text is made;
2. on the CPU: Oryx and hybrids on retrieval.py's needles and recall, and right after each Oryx model its policies, the
   router among them (policy.py).

OUT holds results and logs, small files that are complete at any time; WORK holds text and weights. At the end of the
time what runs is ended, and OUT/evidence.md and the plots are made of what is there. Started again it does what is
missing; trainings resume from their last checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import experiment as ex
import language
import routing

from oryx_megatron.cli import main_guard
from oryx_megatron.config import load_run, to_yaml
from oryx_megatron.config.schema import RunConfig
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import ConfigError, OryxError
from oryx_megatron.eval.router_training import tokens_at_once

HERE = Path(__file__).resolve().parent
SUMMARY_SECONDS = 35.0
"""Kept at the end for tables and plots."""
ROUTER_SECONDS = 150.0
"""A router and its first comparisons take about so long; an Oryx training that leaves less is not begun."""
POLICY_SECONDS = 120.0
SHORTEST = 45.0
"""Seconds that a training of unknown length must have."""
ENDING = 6.0
"""Seconds in which what is ended may still save."""
WARMING = 100
"""Seconds after which trainings begin whether or not their kernels are compiled."""
LAST_LINES = 20
"""Of a failed job's log, printed."""
ROUTER = {"counted": 1, "held_out": 128, "epochs": 3, "batch_size": 64}
"""Options of `oryx router` here. It learns from half of the texts that its model read, and counts the other half."""


@main_guard
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of text and weights, gigabytes (default: OUT.work)")
    parser.add_argument("--minutes", type=float, default=9.0, help="in all (default: %(default)s)")
    parser.add_argument("--tokens", type=float, default=40.0, help="millions a language model reads (default: 40)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="those for which there is time")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, help="default: all")
    parser.add_argument("--gpus", nargs="*", help="GPUs to spread language models over (default: all visible)")
    parser.add_argument("--trainings", type=int, default=2, help="language models at a time on each (default: 2)")
    parser.add_argument("--routers", type=int, default=2, help="routers at a time on each (default: 2)")
    parser.add_argument("--processes", type=int, help="on the CPU at a time (default: the cores less 4 for each GPU)")
    parser.add_argument("--config", default=str(HERE / "evidence.yaml"), help="language models (YAML)")
    parser.add_argument("--retrieval", nargs="*", default=["needle", "mqar-cpu"], help="names of YAML files here")
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--folders", nargs="*", default=[], help="of text, instead of the installed packages")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="changes of the language runs")
    parser.add_argument("--set-retrieval", nargs="*", default=[], metavar="key=value", help="changes of the others")
    parser.add_argument("--router", nargs="*", default=[], metavar="name=value", help="options of `oryx router`")
    parser.add_argument("--texts", type=int, default=64, help="texts of a held-out set under a policy (default: 64)")
    parser.add_argument("--summarize", action="store_true", help="only read results and write tables and plots")
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.resolve()
    work = (arguments.work or arguments.out.with_name(arguments.out.name + ".work")).resolve()
    runs = language_runs(arguments, work) if "language" in arguments.parts else []
    failed: list[str] = []
    if not arguments.summarize:
        begun = time.time()
        arguments.out.mkdir(parents=True, exist_ok=True)
        gpus = visible_gpus() if arguments.gpus is None else arguments.gpus
        schedule = Schedule(begun + 60 * arguments.minutes - SUMMARY_SECONDS, arguments.out, begun, gpus)
        jobs = [*language_jobs(runs, arguments, work, schedule), *retrieval_jobs(arguments, schedule)]
        count = max(1, len(gpus))
        cpu = arguments.processes or max(1, len(os.sched_getaffinity(0)) - 4 * count)
        slots = {"text": 1, "warm": len(jobs), "train": arguments.trainings * count}
        failed = schedule.run(jobs, slots | {"router": arguments.routers * count, "cpu": cpu})
    sys.stdout.write(summarize(runs, arguments))
    for name in failed:
        print(f"{name} failed: see {arguments.out / 'logs' / name}.txt", flush=True)
    return 1 if failed else 0


PARTS = ("language", "retrieval")


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls them; none on a machine without."""
    if (seen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in seen.split(",") if name.strip()]
    command = [sys.executable, "-W", "ignore", "-c", "import torch; print(torch.cuda.device_count())"]
    return [str(i) for i in range(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))]


# ------------------------------------------------------------------------------------------------------------- jobs


@dataclass
class Job:
    """One process."""

    name: str
    pool: str
    command: list[str] | Callable[[], list[str]]
    done: Callable[[], bool]
    after: tuple[str, ...] = ()
    """Jobs that must be done before."""
    leaves: float = 0.0
    """Seconds that must be left after it, for what follows it."""
    environment: dict[str, str] = field(default_factory=dict)
    on_gpu: bool = False
    gpu: str | None = None
    """The one that it sees, of the schedule's."""
    process: subprocess.Popen | None = None
    begun: float = 0.0


@dataclass
class Schedule:
    """Runs jobs side by side until all are done or the time is over."""

    end: float
    """time.time() at which everything is ended."""
    out: Path
    begun: float
    gpus: Sequence[str] = ()
    kept: list[tuple[Path, Path]] = field(default_factory=list)
    """Files that grow, and where they are copied."""
    took: float = SHORTEST
    """Seconds of the last training: the first ones compile, too."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.time()

    def run(self, jobs: Sequence[Job], slots: dict[str, int]) -> list[str]:
        """Returns the names of jobs that failed; those without time are reported on the way."""
        done = {job.name for job in jobs if job.done()}
        waiting = [job for job in jobs if job.name not in done]
        running: list[Job] = []
        failed: list[str] = []
        told = 0.0
        previous = signal.signal(signal.SIGTERM, _stop)
        try:
            while (waiting or running) and self.left > 0:
                for job in list(waiting):
                    free = sum(other.pool == job.pool for other in running) < slots[job.pool]
                    if free and done.issuperset(job.after):
                        waiting.remove(job)
                        if self._fits(job):
                            job.gpu = self._least_loaded(running) if job.on_gpu else None
                            running.append(self._started(job))
                        else:
                            self._say(f"{job.name}: no time left for it")
                time.sleep(0.25)
                for job in list(running):
                    if job.process is not None and job.process.poll() is not None:
                        running.remove(job)
                        if self._ended(job):
                            done.add(job.name)
                        else:
                            failed.append(job.name)
                # What needs a job that failed or had no time is left out, and what needs that.
                known = done.union(job.name for job in (*waiting, *running))
                waiting = [job for job in waiting if known.issuperset(job.after)]
                if time.time() - told > 10:
                    told = time.time()
                    self.keep()
        finally:
            signal.signal(signal.SIGTERM, previous)
            for job in running:
                self._say(f"{job.name}: out of time")
            _end(running)
            self.keep()
        return failed

    def keep(self) -> None:
        """Copy what has grown."""
        for source, target in self.kept:
            if source.is_file():
                with replacing(target) as temporary:
                    shutil.copyfile(source, temporary)

    def _fits(self, job: Job) -> bool:
        # Others write what they know on the way.
        return self.left > job.leaves + (self.took if job.pool == "train" else 0.0)

    def _least_loaded(self, running: Sequence[Job]) -> str | None:
        """The GPU with the fewest processes; the first of several."""
        load = Counter(job.gpu for job in running)
        return min(self.gpus, key=lambda gpu: load[gpu], default=None)

    def _started(self, job: Job) -> Job:
        log = self._log(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = job.command() if callable(job.command) else job.command
        environment = os.environ | job.environment
        if job.gpu is not None:
            environment |= {"CUDA_VISIBLE_DEVICES": job.gpu}
        with log.open("a") as file:
            job.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        job.begun = time.time()
        return job

    def _ended(self, job: Job) -> bool:
        assert job.process is not None
        code, job.process = job.process.returncode, None
        seconds = time.time() - job.begun
        self.keep()
        done = job.done()
        if done and job.pool == "train":
            self.took = seconds
        self._say(f"{job.name}: {'done' if done else f'FAILED ({code})'} in {seconds:.0f} s")
        if not done:  # OUT may be lost with the machine
            log = self._log(job).read_text(errors="replace").strip().splitlines()
            print("    its last lines:", *(log[-LAST_LINES:] or ["(it wrote nothing)"]), sep="\n    ", flush=True)
        return done

    def _log(self, job: Job) -> Path:
        return self.out / "logs" / f"{job.name}.txt"

    def _say(self, text: str) -> None:
        print(f"{time.time() - self.begun:5.0f} s  {text}", flush=True)


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _end(jobs: Sequence[Job]) -> None:
    """End jobs and what they started, all at once."""
    for wanted, seconds in ((signal.SIGTERM, ENDING), (signal.SIGKILL, 2.0)):
        for job in jobs:
            if job.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.process.pid, wanted)
        until = time.time() + seconds
        for job in jobs:
            if job.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    job.process.wait(max(0.0, until - time.time()))


def _python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", str(HERE / script), *map(str, arguments)]


def language_runs(arguments: argparse.Namespace, work: Path) -> list[RunConfig]:
    """The run of every model and seed, in order of worth, Oryx first; they write into `work`."""
    data = ex.read_experiment(arguments.config, {"name", "seeds", "run", "models", "equal_to"}, None)
    batch = data["run"]["train"]["global_batch_size"] * data["run"]["data"]["sequence_length"]
    iterations = max(2, round(arguments.tokens * 1e6 / batch))
    sets = {name: [str(work / "texts" / name)] for name in ("code", "docs", "prose")}
    ours = {
        "data": {"blend": [str(work / "texts" / "train")], "validation": sets},
        "train": {"iterations": iterations},
        "schedule": {"warmup": max(1, iterations // 10)},
        "evaluation": {"interval": iterations},
        "checkpoint": {"interval": max(1, iterations // 3)},
        "output_dir": "none",
    }
    overrides = ex.merge(ours, ex.parse_overrides(arguments.set))
    runs = ex.build_runs(data, {"output_dir": "none"}, overrides, arguments.config)
    if unknown := set(arguments.models or []) - set(runs):
        raise ConfigError(f"--models {min(unknown)}: unknown; known: {', '.join(runs)}")
    named = [
        replace(runs[name], seed=seed, output_dir=str(work / "language" / f"{name}-{seed}"))
        for seed, name in itertools.product(arguments.seeds, arguments.models or list(runs))
    ]
    return sorted(named, key=lambda run: not run.model.takes_plans)  # routers follow those with both modes


def language_jobs(
    runs: Sequence[RunConfig], arguments: argparse.Namespace, work: Path, schedule: Schedule
) -> Iterator[Job]:
    """Text, then every training, and a router after those of Oryx."""
    if not runs:
        return
    tokens = max(run.train.iterations * run.train.global_batch_size * run.data.sequence_length for run in runs)
    folders = ["--folders", *arguments.folders] if arguments.folders else []
    most = ["--most", f"{max(5.0 * tokens, 2e6):.0f}"]  # bytes: every token once
    tokenizer = runs[0].data.tokenizer
    command = _python("texts.py", "--tokenizer", tokenizer, "--out", work / "texts", *most, *folders)
    last = work / "texts" / "prose.json"
    yield Job("texts", "text", command, last.is_file, leaves=SHORTEST)
    environment = {"OMP_NUM_THREADS": "2"}
    warm: list[str] = []
    read: dict[str, str] = {}
    for run in runs if schedule.gpus else ():
        model = run.model.name
        if run.model.takes_plans and model not in read:
            config = Path(run.output_dir) / "run.yaml"
            warm.append(f"kernels-{model}")
            read[model] = f"reading-{model}"
            for name, changes in ((warm[-1], []), (read[model], _reading(run))):
                mark = work / name
                ended = f'timeout {WARMING} "$0" "$@"; touch {shlex.quote(str(mark))}'  # whatever came of it
                command = [sys.executable, "-W", "ignore", "-m", "oryx_megatron.warmup", str(config), *changes]
                yield Job(name, "warm", ["sh", "-c", ended, *command], mark.is_file, (), 0.0, environment, on_gpu=True)
    for run in runs:
        folder, name = Path(run.output_dir), Path(run.output_dir).name
        kept = arguments.out / "language" / name
        schedule.kept += [(folder / file, kept / file) for file in ("metrics.jsonl", "run.yaml")]
        config = folder / "run.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(to_yaml(run))
        command = [sys.executable, "-W", "ignore", "-m", "oryx_megatron.train", str(config)]
        leaves = ROUTER_SECONDS if run.model.takes_plans else 0.0
        done = lambda run=run: language.read_result(run) is not None  # noqa: E731
        yield Job(f"language-{name}", "train", command, done, ("texts", *warm), leaves, environment, on_gpu=True)
        if run.model.takes_plans:
            result = arguments.out / "routing" / f"{name}.json"
            texts = run.train.iterations * run.train.global_batch_size // 2
            options = [f"{key}={value}" for key, value in (ROUTER | {"texts": texts}).items()] + arguments.router
            command = _python("routing.py", folder, "--out", result, "--texts", arguments.texts, "--router", *options)
            done = lambda result=result: _finished(result)  # noqa: E731
            after = (f"language-{name}", *([read[run.model.name]] if schedule.gpus else []))
            yield Job(f"routing-{name}", "router", command, done, after, 0.0, environment, on_gpu=True)


def _reading(run: RunConfig) -> list[str]:
    """Changes of a run for kernels that compile for texts of plans of their own: isolated documents of one sequence."""
    length = tokens_at_once(run.model.vocab_size)
    batch = ["train.global_batch_size=1", "train.micro_batch_size=1"]
    return ["data.documents=isolated", f"data.sequence_length={length}", *batch]


def retrieval_jobs(arguments: argparse.Namespace, schedule: Schedule) -> Iterator[Job]:
    """Trainings of Oryx and of hybrids, and the policies after those of Oryx."""
    if "retrieval" not in arguments.parts:
        return
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    nice = ["nice", "-n", "10"]  # what feeds the GPU goes first
    for config in _retrieval_configs(arguments):
        experiment = ex.load_experiment(config, ex.parse_overrides(arguments.set_retrieval))
        out = arguments.out / experiment.name
        wanted = [name for name in ("gdn", "mamba2", "gdn-hybrid", "mamba2-hybrid") if name in experiment.runs]
        for seed, model in itertools.product(arguments.seeds, wanted):
            if arguments.models and model not in arguments.models:
                continue
            name, result = f"{experiment.name}-{model}-{seed}", ex.outcome_path(out, model, seed)
            oryx = experiment.run(model, seed).model.takes_plans
            leaves = POLICY_SECONDS if oryx else 0.0

            def command(config=config, out=out, model=model, seed=seed, leaves=leaves) -> list[str]:
                budget = max(1.0, schedule.left - leaves)
                chosen = ["--models", model, "--seeds", seed, "--budget", f"{budget:.0f}"]
                changes = ["--set", *arguments.set_retrieval] if arguments.set_retrieval else []
                return nice + _python("retrieval.py", config, "--out", out, *chosen, *changes)

            def done(result=result, oryx=oryx) -> bool:
                return bool(_json(result).get("cells")) and (not oryx or result.with_suffix(".pt").is_file())

            yield Job(name, "cpu", command, done, (), leaves + SHORTEST, environment)
            for asked in _asked(experiment) if oryx else ():
                chosen = ["--models", model, "--seeds", seed, *asked]
                policy = nice + _python("policy.py", config, "--out", out, *chosen)
                which = "_".join(["policy", *asked[1:]])
                written = out / which / f"{model}-{seed}.json"
                yield Job(f"{which}-{name}", "cpu", policy, partial(_finished, written), (name,), 0.0, environment)


def _retrieval_configs(arguments: argparse.Namespace) -> list[str]:
    return [name if name.endswith(".yaml") else str(HERE / f"{name}.yaml") for name in arguments.retrieval]


def _asked(experiment: ex.Experiment) -> list[list[str]]:
    """Options of policy.py: recall with its questions, and with half of them."""
    task = experiment.task
    return [[], ["--queries", str(task.queries // 2)]] if task.kind == "mqar" and task.queries else [[]]


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _finished(path: Path) -> bool:
    return bool(_json(path).get("finished"))


# ---------------------------------------------------------------------------------------------------------- summary


def summarize(runs: Sequence[RunConfig], arguments: argparse.Namespace) -> str:
    """Make every table and plot that the results in OUT allow; returns and writes evidence.md."""
    out, parts = arguments.out, []
    here = []
    for run in runs:
        folder = out / "language" / Path(run.output_dir).name
        if (folder / "run.yaml").is_file():  # as it was run, with however many tokens
            here.append(replace(load_run(folder / "run.yaml"), output_dir=str(folder)))
    results = [found for run in here if (found := language.read_result(run)) is not None]
    with contextlib.suppress(OryxError, OSError, ValueError):
        ex.write_text(out / "language" / "training.csv", language.training_losses(here))
    for name, make in (
        ("language", lambda: language.summarize("evidence", results, out / "language") if results else None),
        ("routing", lambda: routing.summarize(out / "routing")),
    ):
        try:
            if text := make():
                parts.append(text)
        except (OryxError, OSError, ValueError, KeyError) as error:
            parts.append(f"# {name}\n\nnothing: {error}\n")
    ex.write_text(out / "evidence.md", "\n".join(parts))  # should the time end here
    started = []
    for config in _retrieval_configs(arguments) if "retrieval" in arguments.parts else ():
        experiment = ex.load_experiment(config)
        tables = [("policy.py", "_".join(["policy", *asked[1:]]), asked) for asked in _asked(experiment)]
        for script, name, asked in [("retrieval.py", "summary", []), *tables]:
            command = _python(script, config, "--out", out / experiment.name, "--summarize", *asked)
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            started.append((process, out / experiment.name / f"{name}.md"))
    for process, path in started:
        try:
            code = process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        parts.append(path.read_text() if code == 0 and path.is_file() else f"# {path.parent.name}: no {path.name}\n")
    text = "\n".join(parts)
    ex.write_text(out / "evidence.md", text)
    return text


if __name__ == "__main__":
    sys.exit(main())
