#!/usr/bin/env python
"""A list of layouts on the GPUs of this host, in the order of its worth, within a number of minutes.

    python benchmarks/layout_list.py benchmarks/layouts-8.yaml --gpus 8 --minutes 10 --out runs/layouts
    python benchmarks/layout_list.py benchmarks/layouts-8.yaml --gpus 2 --minutes 10 --out runs/layouts --plot

Ranks are started for an entry or a few (`together`), as many as it needs, and measure one model after the other
(benchmarks/layouts.py). A case that fails says why in a line and the next one begins. OUT/layouts.json is written after
each; the same command continues where it was cut off, and tries again what failed. Before the first layout of a shape
its kernels are compiled for caches on disk, one shape on each GPU side by side; nothing is timed meanwhile.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from layout_cases import PEERS, Case, Found, data_size, parse_layout, plot, row, table, with_data

from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.config import load_model
from oryx_megatron.config.loading import config_text, from_dict
from oryx_megatron.config.yaml_text import parse_yaml
from oryx_megatron.data.files import read_json, replacing
from oryx_megatron.errors import ConfigError
from oryx_megatron.platform import use_kernel_cache
from oryx_megatron.ports import free_port

HERE = Path(__file__).resolve().parent
GRAPHS = {"replayed": (True,), "launched": (False,), "both": (True, False)}
COMPILE_SECONDS = 420.0
"""Within which a shape is compiled: 170 s were measured on an idle host with an empty cache."""
POLL = 0.2


@dataclass(frozen=True)
class Entry:
    """A layout; what it does not say is as in the list."""

    layout: str = "data"
    """Fields of `parallel` as `tensor=2,recompute=full`; data parallelism is what they leave."""
    one_gpu: bool = False
    """On one GPU, whatever --gpus says: the base of the column `× one GPU`."""
    beside: bool = False
    """Models run on GPUs of their own, side by side with those of neighbouring entries."""
    models: tuple[str, ...] | None = None
    sequence: int | None = None
    micro: int | None = None
    microbatches: int | None = None
    """Of each data-parallel rank."""
    plan: str | None = None
    graphs: Literal["as the list", "replayed", "launched", "both"] = "as the list"
    fp8: Literal["none", "tensorwise", "delayed", "blockwise"] = "none"
    optimizer: Literal["adamw", "muon"] = "adamw"


@dataclass(frozen=True)
class LayoutList:
    """A list as its file says it."""

    models: tuple[str, ...]
    cases: tuple[Entry, ...]
    sequence: int = 2048
    micro: int = 4
    microbatches: int = 8
    plan: str = "ratio:0.5"
    graphs: Literal["replayed", "launched", "both"] = "replayed"
    chunk: int = 256
    gpt: str = "1.4b-transformer"
    """Preset that gives `gpt` its size."""
    hybrid: str = "1.4b-gdn-hybrid"
    """Preset or YAML file that gives `mcore-gdn` its shape."""
    warm: int = 3
    steps: int = 5
    together: int = 1
    """Entries that one start of ranks measures: a start takes half a minute."""


@dataclass
class Launch:
    """Cases that one start of ranks measures, or compiles for, one after the other."""

    cases: list[Case]
    gpus: int
    beside: bool
    entries: int = 1
    """Of the list."""
    compiles: bool = False
    devices: list[int] = field(default_factory=list)
    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)
    report: Path = Path()
    begun: float = 0.0
    """When the case under way began."""
    current: int = -1
    """Its number."""
    read: int = 0
    """Lines of the report that were taken in."""
    done: set[int] = field(default_factory=set)
    anew: bool = False
    """The ranks left the rest to another start."""

    @property
    def under_way(self) -> Case | None:
        """The case that a failure concerns."""
        return self.cases[max(self.current, 0)] if max(self.current, 0) not in self.done else None


def read_list(path: Path) -> LayoutList:
    """A list; ConfigError names the file and the field at fault."""
    return from_dict(LayoutList, parse_yaml(config_text(path), str(path)), source=str(path))


def launches(plan: LayoutList, gpus: int) -> Iterator[Launch]:
    """The starts of a list on so many GPUs; an entry that does not come out even there needs none."""
    for entry in plan.cases:
        count = 1 if entry.one_gpu else gpus
        layout = "" if entry.layout == "data" else entry.layout
        text = with_data(layout, count)
        if text is None:
            continue
        micro = entry.micro or plan.micro
        batch = micro * data_size(text, count) * (entry.microbatches or plan.microbatches)
        groups = []
        for model in entry.models or plan.models:
            cases = [
                Case(
                    model=model,
                    layout=text,
                    gpus=count,
                    sequence=entry.sequence or plan.sequence,
                    batch=batch,
                    micro=micro,
                    plan=entry.plan or plan.plan,
                    graphs=graphs,
                    fp8=entry.fp8,
                    optimizer=entry.optimizer,
                    chunk=plan.chunk,
                    gpt=plan.gpt,
                    hybrid=plan.hybrid,
                    warm=plan.warm,
                    steps=plan.steps,
                )
                for graphs in GRAPHS[plan.graphs if entry.graphs == "as the list" else entry.graphs]
            ]
            groups.append(cases)
        for cases in groups if entry.beside else [[case for group in groups for case in group]]:
            yield Launch(cases, count, entry.beside)


def shape(case: Case) -> str:
    """What the kernels of a case are compiled for."""
    layout = parse_layout(case.layout, case.gpus)
    model = load_model(case.model)
    heads = model.num_heads // (layout.tensor * layout.context)
    return f"{case.model}, {heads} heads, {case.sequence} × {case.micro}, tensor {layout.tensor}"


class Results:
    """OUT/layouts.json: what was measured, what failed, and the shapes whose kernels are in the cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kept: dict[str, Any] = read_json(path) if path.exists() else {}
        try:
            self.results = [(Case(**r["case"]), Found(**(r["found"]))) for r in kept.get("results", [])]
            self.failed = [(Case(**f["case"]), f["why"]) for f in kept.get("failed", [])]
            self.compiled = list(kept.get("compiled", []))
        except (TypeError, KeyError) as error:
            raise ConfigError(f"{path}: is no file of this command ({error}); choose another --out") from None

    @property
    def found(self) -> list[Found]:
        """All results."""
        return [found for _, found in self.results]

    def note(self, case: Case, *, found: Found | None = None, why: str = "") -> None:
        """Keep what came of a case."""
        self.failed = [(own, reason) for own, reason in self.failed if own != case]
        if found is not None:
            self.results.append((case, found))
        else:
            self.failed.append((case, why))
        self.write()

    def write(self) -> None:
        """At once and whole."""
        plain = {
            "results": [{"case": dataclasses.asdict(c), "found": dataclasses.asdict(f)} for c, f in self.results],
            "failed": [{"case": dataclasses.asdict(c), "why": why} for c, why in self.failed],
            "compiled": self.compiled,
        }
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(plain, indent=1))


class Runner:
    """Works through launches until a deadline."""

    def __init__(self, queue: list[Launch], kept: Results, arguments: argparse.Namespace) -> None:
        self.queue, self.kept, self.a = queue, kept, arguments
        self.free = list(range(arguments.gpus))
        self.running: list[Launch] = []
        self.begun = time.monotonic()
        self.deadline = self.begun + 60 * arguments.minutes
        self.name, self.count = time.strftime("%Y%m%d-%H%M%S-") + f"{time.time_ns() % 10**9:09d}", 0

    def run(self) -> None:
        """Until the queue is empty or the time is up; ends every rank in any case."""
        try:
            while (self.queue or self.running) and time.monotonic() < self.deadline:
                self._start_what_fits()
                for launch in list(self.running):
                    self._watch(launch)
                time.sleep(POLL)
            for launch in self.running:
                self._take_in(launch)
                if (case := launch.under_way) is not None and not launch.compiles:
                    say(f"{case.name()}: cut off, the {self.a.minutes:g} minutes are over")
        finally:
            for launch in self.running:
                end(launch)

    def _start_what_fits(self) -> None:
        compiles = False
        while self.queue and self._fits(self.queue[0]):
            compiles = compiles or self.queue[0].compiles
            self._start(self.queue.pop(0))
        if compiles:  # later shapes too, on GPUs that would wait
            for launch in [launch for launch in self.queue if launch.compiles][: len(self.free)]:
                self.queue.remove(launch)
                self._start(launch)

    def _fits(self, launch: Launch) -> bool:
        if launch.gpus > len(self.free):
            return False
        alike = all(other.beside and other.compiles == launch.compiles for other in self.running)
        return not self.running or (launch.beside and alike)

    def _start(self, launch: Launch) -> None:
        self.count += 1
        launch.devices, self.free = self.free[: launch.gpus], self.free[launch.gpus :]
        stem = self.a.out / "starts" / f"{self.name}-{self.count:03d}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        launch.report, asked = stem.with_suffix(".report"), stem.with_suffix(".cases")
        asked.write_text(json.dumps([dataclasses.asdict(case) for case in launch.cases]))
        launch.report.touch()
        launch.begun, launch.current, launch.read, launch.done = time.monotonic(), -1, 0, set()
        command = [sys.executable, str(HERE / "layouts.py"), "--cases", str(asked), "--report", str(launch.report)]
        command += ["--compile"] if launch.compiles else ["--profile", str(self.a.out / "profiles")]
        common = os.environ | {
            "WORLD_SIZE": str(launch.gpus),
            "LOCAL_WORLD_SIZE": str(launch.gpus),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "CUDA_VISIBLE_DEVICES": visible(launch.devices),
        }
        common.setdefault("OMP_NUM_THREADS", "1")  # as torchrun has it
        for rank in range(launch.gpus):
            with stem.with_suffix(f".rank{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    command,
                    env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            launch.ranks.append(process)
        self.running.append(launch)

    def _watch(self, launch: Launch) -> None:
        codes = [process.poll() for process in launch.ranks]
        self._take_in(launch)  # after: the last words of ranks that have just ended count
        limit = COMPILE_SECONDS if launch.compiles else self.a.case_seconds
        if len(launch.done) == len(launch.cases) or all(code == 0 for code in codes):
            self._finish(launch, "ended without a result")
        elif any(code not in (None, 0) for code in codes):
            time.sleep(1.0)  # the others may have more to say than that one of them is gone
            self._take_in(launch)
            self._finish(launch, why_failed(launch))
        elif time.monotonic() - launch.begun > limit:
            self._finish(launch, f"did not end within {limit:g} s")

    def _take_in(self, launch: Launch) -> None:
        """What rank 0 told since the last time."""
        text = launch.report.read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()
        for line in map(json.loads, lines[launch.read :]):
            if "begun" in line:
                launch.current, launch.begun = line["begun"], time.monotonic()
                continue
            if "anew" in line:
                launch.anew = True
                say(line["anew"])
                continue
            number = line["case"]
            launch.done.add(number)
            if "found" in line:
                found = Found(**line["found"])
                self.kept.note(launch.cases[number], found=found)
                say(row(found, self.kept.found))
            else:
                self._failed(launch.cases[number], line["failed"])
        launch.read = len(lines)

    def _failed(self, case: Case, why: str) -> None:
        self.kept.note(case, why=why)
        say(f"{case.name()}: {why}")

    def _finish(self, launch: Launch, why: str) -> None:
        """A launch is over: what it was at failed, and what comes after it gets another one."""
        end(launch)
        self.running.remove(launch)
        self.free = sorted(self.free + launch.devices)
        seconds = time.monotonic() - self.begun
        if launch.compiles:
            if all(process.returncode == 0 for process in launch.ranks):
                self.kept.compiled.append(shape(launch.cases[0]))
                self.kept.write()
                say(f"compiled: {self.kept.compiled[-1]} ({seconds:.0f} s since the start)")
            else:
                say(f"not compiled ahead: {shape(launch.cases[0])}: {why}")
            return
        left = [i for i in range(len(launch.cases)) if i not in launch.done]
        if not left:
            return
        # What fails before the first case fails for all of them.
        failed = [] if launch.anew else left if launch.current < 0 else left[:1]
        for number in failed:
            self._failed(launch.cases[number], why)
        if again := [launch.cases[i] for i in left if i not in failed]:
            self.queue.insert(0, Launch(again, launch.gpus, launch.beside))


def why_failed(launch: Launch) -> str:
    """What the ranks left behind, the first of them that does not only miss another one."""
    paths = sorted(launch.report.parent.glob(f"{launch.report.stem}.*.error"), key=lambda path: path.stat().st_mtime)
    reasons = [json.loads(path.read_text())["failed"] for path in paths]
    own = [why for why in reasons if "DistBackendError" not in why and "Connection" not in why]
    if own or reasons:
        return (own or reasons)[0][:300]
    for rank, process in enumerate(launch.ranks):
        if (code := process.poll()) not in (None, 0):
            log = launch.report.with_suffix(f".rank{rank}.log")
            last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            return f"rank {rank} ended with {how}: {last[:200]}"
    return "ended without a result"


def end(launch: Launch) -> None:
    """End what is left of a launch: ranks that are done get a moment to leave."""
    patience = time.monotonic() + 20
    while all(process.poll() in (None, 0) for process in launch.ranks) and len(launch.done) == len(launch.cases):
        if all(process.poll() is not None for process in launch.ranks) or time.monotonic() > patience:
            break
        time.sleep(POLL)
    for process in launch.ranks:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own session, with the compilers that it started
        process.wait()


LIBC = ctypes.CDLL(None)


def end_with_parent() -> None:
    """In a new rank: end when this command ends, however it does."""
    if hasattr(LIBC, "prctl"):  # Linux
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def visible(devices: list[int]) -> str:
    """CUDA_VISIBLE_DEVICES of a launch, among those that this command may use."""
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = own.split(",") if own else None
    return ",".join(names[i] if names else str(i) for i in devices)


def say(line: str) -> None:
    """Print at once: who reads may be gone later."""
    print(line, flush=True)


def has_gpu() -> bool:
    """Whether there is a device to compile for."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def prepared(plan: LayoutList, kept: Results, gpus: int, *, compiles: bool) -> list[Launch]:
    """What is left to do: cases never tried first, and before the first of a shape the compilation of its kernels."""
    tried, seen = {case for case, _ in kept.failed}, {case for case, _ in kept.results}
    fresh: list[Launch] = []
    again: list[Launch] = []
    for launch in launches(plan, gpus):
        left = [case for case in launch.cases if case not in seen]
        seen.update(left)
        for cases, to in (([c for c in left if c not in tried], fresh), ([c for c in left if c in tried], again)):
            if not cases:
                continue
            last = to[-1] if to else None
            if (
                last is None
                or last.beside
                or launch.beside
                or launch.gpus != last.gpus
                or last.entries >= plan.together
            ):
                to.append(dataclasses.replace(launch, cases=cases))
            else:
                last.cases += cases
                last.entries += 1
    queue: list[Launch] = []
    known = set(kept.compiled)
    for launch in fresh + again:
        for case in launch.cases if compiles else ():
            if case.model not in PEERS and shape(case) not in known:
                known.add(shape(case))
                queue.append(Launch([case], 1, beside=True, compiles=True))
        queue.append(launch)
    return queue


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Measure the list; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("list", type=Path, help="YAML of layouts")
    parser.add_argument("--gpus", type=int, required=True, help="of this host (ranks, where there are none)")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which everything ends")
    parser.add_argument("--out", type=Path, required=True, help="folder for layouts.json, table, picture, logs")
    parser.add_argument("--plot", action="store_true", help="draw OUT/layouts.png")
    parser.add_argument("--only-compile", action="store_true", help="fill the caches of compiled kernels, and end")
    parser.add_argument("--cache", type=Path, help="folder of compiled kernels (default: OUT/kernels)")
    parser.add_argument("--case-seconds", type=float, default=150.0, help="within which a case ends")
    arguments = parser.parse_args(argv)
    if arguments.gpus < 1 or arguments.minutes <= 0:
        raise ConfigError("--gpus and --minutes: should be above 0")
    plan = read_list(arguments.list)
    arguments.out.mkdir(parents=True, exist_ok=True)
    use_kernel_cache(str(arguments.cache or arguments.out / "kernels"))
    kept = Results(arguments.out / "layouts.json")
    queue = prepared(plan, kept, arguments.gpus, compiles=has_gpu())
    if arguments.only_compile:
        queue = [launch for launch in queue if launch.compiles]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`
    say(table([]))
    runner = Runner(queue, kept, arguments)
    runner.run()
    text = table(kept.found)
    failed = "".join(f"- {case.name()}: {why}\n" for case, why in kept.failed)
    with replacing(arguments.out / "layouts.md") as temporary:
        temporary.write_text(f"{text}\n" + (f"\nFailed:\n\n{failed}" if failed else ""))
    if arguments.plot:
        plot(kept.found, arguments.out / "layouts.png")
    left = sum(len(launch.cases) for launch in prepared(plan, kept, arguments.gpus, compiles=False))
    say(f"\n{text}\n\n{len(kept.results)} measured, {len(kept.failed)} failed, {left - len(kept.failed)} left"
        + (": the same command continues" if left else ""))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
