"""Check the nodes of a job before it starts, and name the bad one.

    srun --ntasks-per-node 8 python -m oryx_megatron.health RUN.yaml --gpus 8
    torchrun --nnodes 2 … -m oryx_megatron.health RUN.yaml --gpus 8 --json

Looks at: ranks that never come; GPUs, their memory and speed; clocks; output folder (space, speed, shared by all
nodes); code, Python, packages and config the same everywhere; all-reduce within each node, between neighbours, over
all. One line per finding, with the nodes it is about. Exit code 1 when there is one.

How it works: ranks put what they found into a key-value store on rank 0, with a deadline, so that a rank that is
silent or stuck is a finding too and not a hang. Bandwidth is measured along a ring of node pairs: a node that is slow
with both of its neighbours is the slow one.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform as python_platform
import secrets
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oryx_megatron import platform, ranks
from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.config import load_run, to_yaml
from oryx_megatron.errors import ConfigError, OryxError
from oryx_megatron.paths import expand_arguments

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
else:
    torch, dist = platform.late("torch"), platform.late("torch.distributed")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to check against. Sizes in decimal units."""

    config: str | None = None
    overrides: tuple[str, ...] = ()
    output: str | None = None
    """Folder to write to; None: the config's output_dir, or none."""
    gpus: int = 0
    """GPUs that every node should have."""
    max_skew: float = 1.0
    """Seconds a clock may differ from the first node's."""
    min_free_gb: float = 50.0
    min_write_mbs: float = 50.0
    """MB/s, all nodes writing at once."""
    write_mb: int = 64
    """MB to write per node."""
    min_gbps: float = 0.0
    """GB/s that an all-reduce between two nodes should reach (bus bandwidth); 0: only compare nodes."""
    slow: float = 0.6
    """Share of what good nodes (GPUs) reach, below which a node (GPU) is slow."""
    reduce_mb: float = 64.0
    """MB per rank to reduce."""
    timeout: float = 120.0
    """Seconds to wait for a rank, at every stage."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and value < 0:
                raise ConfigError(f"--{field.name.replace('_', '-')}: {value:g} should not be negative")


@dataclass(frozen=True)
class Finding:
    """One fault."""

    nodes: tuple[str, ...]
    check: str
    text: str

    def __str__(self) -> str:
        return f"{', '.join(self.nodes)}: {self.text}"


@dataclass(frozen=True)
class Report:
    """Everything found; the same on all ranks that were reached."""

    nodes: tuple[str, ...]
    ranks: int
    findings: tuple[Finding, ...]
    measured: dict[str, Any]
    """Numbers by name: per node, or per pair `a–b`."""

    def lines(self) -> list[str]:
        """For people: findings, then what was measured."""
        shown = [f"health: {finding}" for finding in self.findings]
        for name, values in self.measured.items():
            if values:
                numbers = ", ".join(f"{key} {value:.3g}" for key, value in _worst(name, values))
                more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
                shown.append(f"health: {name}: {numbers}{more}")
        verdict = f"{len(self.findings)} findings" if self.findings else "all well"
        return [*shown, f"health: {len(self.nodes)} nodes, {self.ranks} ranks: {verdict}"]


SHOWN = 4
"""Nodes or pairs in a line of numbers: the worst."""


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, check, print (rank 0)."""
    parser = argparse.ArgumentParser(prog="oryx_megatron.health", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("config", nargs="?", metavar="RUN.yaml", help="run config that is about to start")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="its overrides")
    d = Options()
    add = parser.add_argument
    add("--output", metavar="FOLDER", help="folder to write to (default: the config's output_dir)")
    add("--gpus", type=int, default=d.gpus, help="GPUs that every node should have (default: %(default)s)")
    add("--max-skew", type=float, default=d.max_skew, help="seconds between clocks (default: %(default)s)")
    add("--min-free-gb", type=float, default=d.min_free_gb, help="free space (default: %(default)s)")
    add("--min-write-mbs", type=float, default=d.min_write_mbs, help="MB/s per node (default: %(default)s)")
    add("--write-mb", type=int, default=d.write_mb, help="MB to write per node (default: %(default)s)")
    add("--min-gbps", type=float, default=d.min_gbps, help="all-reduce between nodes, GB/s (default: only compare)")
    add("--slow", type=float, default=d.slow, help="share of the good nodes' speed (default: %(default)s)")
    add("--reduce-mb", type=float, default=d.reduce_mb, help="MB per rank to reduce (default: %(default)s)")
    add("--timeout", type=float, default=d.timeout, help="seconds to wait for a rank (default: %(default)s)")
    add("--json", action="store_true", help="print everything as JSON")
    arguments = parser.parse_intermixed_args(argv)
    expand_arguments(arguments, "--output")
    a = vars(arguments)
    as_json = a.pop("json")
    report = check(Options(**a | {"overrides": tuple(a["overrides"])}))
    if os.environ["RANK"] == "0":
        text = json.dumps(dataclasses.asdict(report), ensure_ascii=False) if as_json else "\n".join(report.lines())
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    if dist.is_initialized():  # a collective failed: leaving it in good order could wait for ever
        os._exit(1)
    return 1 if report.findings else 0


def check(options: Options, clock: Callable[[], float] = time.time) -> Report:
    """Check the nodes of this job; every rank calls it, with torchrun's, srun's or no environment.

    Args:
        options: Thresholds.
        clock: Unix time of this rank's node.

    Raises:
        ConfigError: rank 0 cannot be reached, or does not answer.
    """
    rank, world = _environment()
    started = time.monotonic()
    store = _store(rank, world, options.timeout)
    me = _Rank(options, store, rank, world, clock)
    if rank == 0:
        try:
            return me.lead()
        finally:
            me.remove_token()
    try:
        return me.follow()
    except dist.DistError as error:
        raise _local(
            f"{me.node}: rank 0 on {os.environ['MASTER_ADDR']} fell silent after {time.monotonic() - started:.0f} s "
            f"({_first_line(error)})"
        ) from None


class _Rank:
    """One rank's part of the checks."""

    def __init__(self, options: Options, store: dist.Store, rank: int, world: int, clock: Callable[[], float]) -> None:
        self.options, self.store, self.rank, self.world, self.clock = options, store, rank, world, clock
        self.node = node_name()
        self.first = os.environ.get("LOCAL_RANK", "0") == "0"
        self._token_file: Path | None = None
        self._broken = False

    def lead(self) -> Report:
        """Rank 0: ask everyone, measure, judge."""
        self.store.set("token", self._token())
        self._tell("facts", self._facts())
        facts, silent = self._gather("facts", self.options.timeout)
        leaders = [rank for rank in sorted(facts) if facts[rank]["first"]]
        offsets = {rank: self._ask_clock(rank) for rank in leaders if rank}
        names = tuple(dict.fromkeys(facts[rank]["node"] for rank in sorted(facts)))
        findings = [*_silent(silent, self.world), *_judge_facts(facts, leaders, offsets, self.options)]
        groups: dict[str, list[int]] = {name: [] for name in names}
        for rank in sorted(facts):
            groups[facts[rank]["node"]].append(rank)
        # Ranks that are missing, or with and without GPUs, cannot form a process group.
        possible = not silent and len({facts[rank]["gpus"] > 0 for rank in facts}) == 1
        self.store.set("groups", json.dumps(groups if possible else {}))
        clocks = {facts[rank]["node"]: abs(offset) for rank, offset in offsets.items() if offset is not None}
        measured: dict[str, Any] = {
            "clock difference in s": clocks,
            "free space in GB": _numbers(facts, leaders, "free_gb"),
            "writes in MB/s": _numbers(facts, leaders, "write_mbs"),
        }
        if possible:
            self._tell("speeds", self._speeds(groups))
            speeds, stuck = self._gather("speeds", self.options.timeout * 3)
            findings += _judge_speeds(speeds, stuck, groups, self.options, measured)
        else:
            findings.append(Finding(names, "all-reduce", "bandwidth was not measured, for the reasons above"))
        report = Report(names, self.world, _merged(findings), measured)
        self.store.set("report", json.dumps(dataclasses.asdict(report)))
        self._wait_for_readers(len(facts))
        self._end()
        return report

    def follow(self) -> Report:
        """Other ranks: answer."""
        self._tell("facts", self._facts())
        if self.first:
            self._answer_clock()
        groups = json.loads(self._read("groups", self.options.timeout * 2))
        if groups:
            self._tell("speeds", self._speeds(groups))
        fields = json.loads(self._read("report", self.options.timeout * 4))
        self.store.add("readers", 1)
        self._end()
        findings = tuple(Finding(tuple(f["nodes"]), f["check"], f["text"]) for f in fields["findings"])
        return Report(tuple(fields["nodes"]), fields["ranks"], findings, fields["measured"])

    # ---------------------------------------------------------------------------------------------- key-value store

    def _tell(self, what: str, value: Any) -> None:
        self.store.set(f"{what}/{self.rank}", json.dumps(value))

    def _read(self, key: str, timeout: float) -> str:
        self.store.wait([key], timedelta(seconds=timeout))
        return self.store.get(key).decode()

    def _gather(self, what: str, timeout: float) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """What every rank told, and the ranks that did not within `timeout` seconds in all."""
        deadline, found, silent = time.monotonic() + timeout, {}, []
        for rank in range(self.world):
            try:
                found[rank] = json.loads(self._read(f"{what}/{rank}", max(0.1, deadline - time.monotonic())))
            except dist.DistError:
                silent.append(rank)
        return found, silent

    def _wait_for_readers(self, present: int) -> None:
        """The store lives in this process: stay until all others have read the report, a few seconds at most."""
        deadline = time.monotonic() + min(10.0, self.options.timeout)
        while self.store.add("readers", 0) < present - 1 and time.monotonic() < deadline:
            time.sleep(0.01)

    # ------------------------------------------------------------------------------------------------------- facts

    def _facts(self) -> dict[str, Any]:
        """What this rank sees; the slow things only on the first rank of a node."""
        facts: dict[str, Any] = {
            "node": self.node,
            "first": self.first,
            "gpus": torch.cuda.device_count() if platform.has_gpu() else 0,
        }
        if facts["gpus"]:
            facts |= _gpu_facts()
        if self.first:
            facts |= {"versions": _versions(), "commit": platform.git_commit()}
            if self.options.config is not None:
                try:
                    text = to_yaml(load_run(self.options.config, self.options.overrides))
                    facts["config"] = hashlib.sha256(text.encode()).hexdigest()[:12]
                except OryxError as error:
                    facts["config_error"] = str(error)
            facts |= self._disk()
        return facts

    def _output(self) -> Path | None:
        if self.options.output is not None:
            return Path(self.options.output)
        if self.options.config is None:
            return None
        try:
            return Path(load_run(self.options.config, self.options.overrides).output_dir)
        except OryxError:
            return None  # a finding already

    def _token(self) -> str:
        """Leave a file in the output folder that the other nodes should see; its name, or nothing."""
        if (folder := self._output()) is None:
            return ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f".health-{self.node}-{secrets.token_hex(6)}"
            path.touch()
        except OSError:
            return ""
        self._token_file = path
        return path.name

    def remove_token(self) -> None:
        """Clean up the output folder."""
        if self._token_file is not None:
            self._token_file.unlink(missing_ok=True)

    def _disk(self) -> dict[str, Any]:
        """Free GB and MB/s of the output folder, and whether it is rank 0's."""
        if (folder := self._output()) is None:
            return {}
        path = folder / f".health-{self.node}-{secrets.token_hex(6)}.tmp"
        block = os.urandom(1 << 20)  # not to be compressed away
        try:
            folder.mkdir(parents=True, exist_ok=True)
            space = os.statvfs(folder)
            facts: dict[str, Any] = {"folder": str(folder), "free_gb": space.f_bavail * space.f_frsize / 1e9}
            try:
                begun = time.perf_counter()
                with path.open("wb", buffering=0) as file:
                    for _ in range(self.options.write_mb):
                        file.write(block)
                    os.fsync(file.fileno())
                facts["write_mbs"] = self.options.write_mb * len(block) / 1e6 / (time.perf_counter() - begun)
            finally:
                path.unlink(missing_ok=True)
        except OSError as error:
            return {"folder": str(folder), "disk_error": error.strerror or str(error)}
        token = self._read("token", self.options.timeout)
        patience = time.monotonic() + PATIENCE
        while token and not (seen := token in os.listdir(folder)) and time.monotonic() < patience:
            time.sleep(0.5)
        return facts | ({"shared": seen} if token else {})

    # ------------------------------------------------------------------------------------------------------ clocks

    def _ask_clock(self, rank: int) -> float | None:
        """Seconds that a rank's clock is ahead of ours: the best of some exchanges, to half its duration."""
        best, offset = math.inf, None
        for i in range(CLOCK_TRIES):
            begun = self.clock()
            self.store.set(f"clock/{rank}/{i}/ask", "")
            try:
                there = float(self._read(f"clock/{rank}/{i}/answer", self.options.timeout))
            except dist.DistError:
                return None
            ended = self.clock()
            if ended - begun < best:
                best, offset = ended - begun, there - (begun + ended) / 2
        return offset

    def _answer_clock(self) -> None:
        for i in range(CLOCK_TRIES):
            self._read(f"clock/{self.rank}/{i}/ask", self.options.timeout * 2)
            self.store.set(f"clock/{self.rank}/{i}/answer", repr(self.clock()))

    # --------------------------------------------------------------------------------------------------- bandwidth

    def _speeds(self, groups: dict[str, list[int]]) -> dict[str, Any]:
        """GB/s of all-reduces within this node, with its neighbours and over all; where it failed, the error."""
        found: dict[str, Any] = {}
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a stuck collective raises instead of ending the process
        limit = timedelta(seconds=self.options.timeout)
        try:
            if platform.has_gpu():
                torch.cuda.set_device(platform.local_rank() % torch.cuda.device_count())
            dist.init_process_group(
                platform.backend(),
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.world,
                timeout=limit,
            )
            found["all"] = self._reduce(None, range(self.world))
        except (RuntimeError, ValueError) as error:
            self._broken = True
            return {"error": _first_line(error)}
        nodes = list(groups)
        wholes = {f"in {node}": groups[node] for node in nodes if len(groups[node]) > 1}
        for batch in [wholes, *({f"{a}–{b}": [*groups[a], *groups[b]] for a, b in turn} for turn in ring(nodes))]:
            for name, members in batch.items():
                group = dist.new_group(members, timeout=limit)  # all ranks take part in making each
                if self.rank in members:
                    try:
                        found[name] = self._reduce(group, members)
                    except RuntimeError as error:
                        self._broken = True
                        found[name] = _first_line(error)
        return found

    def _reduce(self, group: dist.ProcessGroup | None, ranks: Sequence[int]) -> float:
        """GB/s (bus bandwidth) of an all-reduce whose result is checked; the best of some.

        Raises:
            RuntimeError: it failed, took too long, or the sum is wrong.
        """
        size, count = len(ranks), max(1, int(self.options.reduce_mb * 1e6 / 4))
        values = torch.empty(count, device=platform.device())
        seconds = math.inf
        for _ in range(4):  # the first makes connections
            values.fill_(self.rank + 1)
            dist.barrier(group)
            platform.synchronize()
            begun = time.perf_counter()
            dist.all_reduce(values, group=group)
            platform.synchronize()
            seconds = min(seconds, time.perf_counter() - begun)
            if not torch.equal(values, torch.full_like(values, sum(rank + 1 for rank in ranks))):
                raise RuntimeError("all-reduce gave a wrong sum")
        return 2 * (size - 1) / size * values.numel() * 4 / 1e9 / seconds if size > 1 else math.inf

    def _end(self) -> None:
        if dist.is_initialized() and not self._broken:
            dist.destroy_process_group()


CLOCK_TRIES = 5
PATIENCE = 30.0
"""Seconds after which a file should be seen on all nodes: network file systems show new ones late."""


def ring(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Turns of disjoint pairs that together join every node with both of its neighbours on a ring.

    Two nodes have one pair, one has none.
    """
    n = len(nodes)
    if n < 2:
        return []
    pairs = [(nodes[i], nodes[(i + 1) % n]) for i in range(n if n > 2 else 1)]
    turns = [pairs[0 : n - n % 2 : 2], pairs[1 : n - n % 2 : 2] if n % 2 == 0 else pairs[1:-1:2], pairs[-1:] * (n % 2)]
    return [turn for turn in turns if turn]


def node_name() -> str:
    """Name of this node: Slurm's, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


# ---------------------------------------------------------------------------------------------------------- judgement


def _silent(ranks: Iterable[int], world: int) -> list[Finding]:
    """Ranks that told nothing, by the node they should be on."""
    names = os.environ.get("ORYX_NODES", "").split()
    found: dict[str, list[int]] = {}
    for rank in ranks:
        node = names[rank * len(names) // world] if names else "unknown node"
        found.setdefault(node, []).append(rank)
    return [
        Finding((node,), "present", f"rank{'s' * (len(r) > 1)} {', '.join(map(str, r))} did not report")
        for node, r in found.items()
    ]


def _judge_facts(
    facts: dict[int, dict[str, Any]], leaders: list[int], offsets: dict[int, float | None], options: Options
) -> list[Finding]:
    """Faults of single nodes, and nodes that differ from most."""
    found: list[Finding] = []

    def add(rank: int, check: str, text: str) -> None:
        found.append(Finding((facts[rank]["node"],), check, text))

    for rank, fact in facts.items():
        if fact["first"] and fact["gpus"] < options.gpus:
            add(rank, "gpus", f"sees {fact['gpus']} GPUs of {options.gpus}")
        if error := fact.get("gpu_error"):
            add(rank, "gpus", f"GPU {fact['gpu']}: {error}")
        if fact.get("used_gb", 0.0) > 1.0 + 0.02 * fact.get("total_gb", 0.0):
            used = f"{fact['used_gb']:.1f} of {fact['total_gb']:.0f} GB are in use already"
            add(rank, "gpus", f"GPU {fact['gpu']}: {used}")
    speeds = [fact["tflops"] for fact in facts.values() if "tflops" in fact]
    for rank, fact in facts.items():
        if "tflops" in fact and fact["tflops"] < options.slow * statistics.median(speeds):
            text = f"{fact['tflops']:.0f} TFLOP/s, the median is {statistics.median(speeds):.0f}"
            add(rank, "gpus", f"GPU {fact['gpu']} is slow: {text}")
    for rank, offset in offsets.items():
        if offset is None:
            add(rank, "clock", "does not answer")
        elif abs(offset) > options.max_skew:
            way = "ahead of" if offset > 0 else "behind"
            there = facts[0]["node"]
            add(rank, "clock", f"clock is {abs(offset):.3g} s {way} that of {there} (limit {options.max_skew:g} s)")
    for rank in leaders:
        fact = facts[rank]
        if error := fact.get("config_error"):
            add(rank, "config", error)
        if error := fact.get("disk_error"):
            add(rank, "disk", f"output folder {fact['folder']} cannot be written to: {error}")
        if fact.get("shared") is False:
            why = f"output folder {fact['folder']} is not the same as on {facts[0]['node']}"
            add(rank, "disk", f"{why}; use one on a file system that all nodes share")
        if fact.get("free_gb", math.inf) < options.min_free_gb:
            free = f"{fact['free_gb']:.1f} GB are free in {fact['folder']}"
            add(rank, "disk", f"{free}, less than --min-free-gb {options.min_free_gb:g}")
        if fact.get("write_mbs", math.inf) < options.min_write_mbs:
            speed = f"writes {fact['write_mbs']:.1f} MB/s to {fact['folder']}"
            add(rank, "disk", f"{speed}, less than --min-write-mbs {options.min_write_mbs:g}")
    present = {rank: facts[rank] for rank in leaders}
    found += _odd({rank: str(f["commit"]) for rank, f in present.items()}, facts, "code", "commit")
    found += _odd({rank: f["config"] for rank, f in present.items() if "config" in f}, facts, "config", "config hash")
    packages = sorted({name for fact in present.values() for name in fact["versions"]})
    for name in packages:
        versions = {rank: f["versions"].get(name, "missing") for rank, f in present.items()}
        found += _odd(versions, facts, "versions", name)
    return found


def _odd(values: dict[int, str], facts: dict[int, dict[str, Any]], check: str, what: str) -> list[Finding]:
    """Nodes whose value is not that of most (of the first, in a draw)."""
    if len(set(values.values())) < 2:
        return []
    usual, count = Counter(values.values()).most_common(1)[0]
    example = next(facts[rank]["node"] for rank, value in values.items() if value == usual)
    others = f" and {count - 1} more" if count > 1 else ""
    return [
        Finding((facts[rank]["node"],), check, f"{what} {value}, but {usual} on {example}{others}")
        for rank, value in values.items()
        if value != usual
    ]


def _judge_speeds(
    speeds: dict[int, dict[str, Any]],
    stuck: list[int],
    groups: dict[str, list[int]],
    options: Options,
    measured: dict[str, Any],
) -> list[Finding]:
    """Slow and failing nodes; adds the bandwidths to `measured`."""
    node_of = {rank: node for node, ranks in groups.items() for rank in ranks}
    found = [
        Finding((node_of[rank],), "all-reduce", f"rank {rank} is stuck in the measurements of bandwidth")
        for rank in stuck
    ]
    inside: dict[str, float | str] = {}
    pairs: dict[str, float | str] = {}
    for rank, values in speeds.items():
        if error := values.get("error"):
            found.append(Finding((node_of[rank],), "all-reduce", f"the ranks' group failed: {error}"))
        for name, value in values.items():
            into = inside if name.startswith("in ") else pairs if "–" in name else None
            if into is not None and not isinstance(into.get(name), str):  # an error on one rank counts
                into[name] = value if isinstance(value, str) else min(value, into.get(name, math.inf))
    inside = {name.removeprefix("in "): value for name, value in inside.items()}
    good = _good([value for value in inside.values() if isinstance(value, float)])
    for node, value in inside.items():
        if isinstance(value, str):
            found.append(Finding((node,), "all-reduce", f"all-reduce within the node failed: {value}"))
        elif value < options.slow * good:
            text = f"all-reduce within the node: {value:.3g} GB/s, others reach {good:.3g}"
            found.append(Finding((node,), "all-reduce", text))
    found += _judge_pairs(pairs, options)
    everything = [values["all"] for values in speeds.values() if "all" in values and math.isfinite(values["all"])]
    measured["all-reduce within nodes in GB/s"] = {n: v for n, v in inside.items() if isinstance(v, float)}
    measured["all-reduce between nodes in GB/s"] = {n: v for n, v in pairs.items() if isinstance(v, float)}
    measured["all-reduce over all in GB/s"] = {"all": min(everything)} if everything else {}
    return found


def _judge_pairs(pairs: dict[str, float | str], options: Options) -> list[Finding]:
    """The nodes to blame for slow or failed pairs: those that are so with both of their neighbours."""
    good = _good([value for value in pairs.values() if isinstance(value, float)])
    limit = max(options.slow * good, options.min_gbps)
    bad = {
        name: f"failed: {value}" if isinstance(value, str) else f"{value:.3g} GB/s (should be at least {limit:.3g})"
        for name, value in pairs.items()
        if isinstance(value, str) or value < limit
    }
    joined: dict[str, list[str]] = {}
    for name in pairs:
        for node in name.split("–"):
            joined.setdefault(node, []).append(name)
    # A node with one bad and one good pair is a bad one's neighbour, unless nobody else explains the pair.
    blamed = [node for node, names in joined.items() if len(names) > 1 and all(name in bad for name in names)]
    found = []
    for node in blamed:
        texts = "; ".join(f"with {_other(name, node)} {bad[name]}" for name in joined[node])
        found.append(Finding((node,), "all-reduce", f"all-reduce between nodes: {texts}"))
    for name, text in bad.items():
        ends = tuple(name.split("–"))
        if not set(ends) & set(blamed):
            found.append(Finding(ends, "all-reduce", f"all-reduce between the two: {text}; one of them, or their link"))
    return found


def _good(values: list[float]) -> float:
    """What good ones reach: the best of a few, the ninth decile of many."""
    return sorted(values)[math.ceil(0.9 * (len(values) - 1))] if values else 0.0


def _other(pair: str, node: str) -> str:
    a, b = pair.split("–")
    return b if a == node else a


def _merged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Equal texts of several nodes as one finding."""
    nodes: dict[tuple[str, str], dict[str, None]] = {}
    for finding in findings:
        nodes.setdefault((finding.check, finding.text), {}).update(dict.fromkeys(finding.nodes))
    return tuple(Finding(tuple(names), check, text) for (check, text), names in nodes.items())


def _numbers(facts: dict[int, dict[str, Any]], leaders: list[int], name: str) -> dict[str, float]:
    return {facts[rank]["node"]: facts[rank][name] for rank in leaders if name in facts[rank]}


def _worst(name: str, values: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(values.items(), key=lambda item: item[1], reverse=name.startswith("clock"))[:SHOWN]


# -------------------------------------------------------------------------------------------------------- environment


def _gpu_facts() -> dict[str, Any]:
    """Memory in use, and the speed and result of a product, on this rank's GPU."""
    index = platform.local_rank() % torch.cuda.device_count()
    facts: dict[str, Any] = {"gpu": index}
    try:
        torch.cuda.set_device(index)
        free, total = torch.cuda.mem_get_info(index)
        facts |= {"used_gb": (total - free) / 1e9, "total_gb": total / 1e9}
        size = 4096
        ones = torch.ones(size, size, dtype=torch.bfloat16, device="cuda")
        seconds = math.inf
        for _ in range(20):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            product = ones @ ones
            torch.cuda.synchronize()
            seconds = min(seconds, time.perf_counter() - begun)
        facts["tflops"] = 2 * size**3 / seconds / 1e12
        if not bool((product == size).all()):
            facts["gpu_error"] = "a product of matrices came out wrong"
    except RuntimeError as error:
        facts["gpu_error"] = _first_line(error)
    return facts


def _versions() -> dict[str, str]:
    """Python, CUDA, driver and every installed package."""
    versions = {"Python": python_platform.python_version(), "CUDA": str(torch.version.cuda)}
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        versions["NVIDIA driver"] = " ".join(driver.read_text().splitlines()[0].split())
    for package in importlib.metadata.distributions():
        name = package.name
        if name and name not in versions:  # the first on the path is the one that is imported
            versions[name] = package.version
    return versions


def _environment() -> tuple[int, int]:
    """Rank and number of ranks; fills in torchrun's variables from Slurm's, or for a single process."""
    e = os.environ
    if "RANK" not in e and "SLURM_PROCID" in e:
        e |= {"RANK": e["SLURM_PROCID"], "WORLD_SIZE": e["SLURM_NTASKS"], "LOCAL_RANK": e["SLURM_LOCALID"]}
        if "MASTER_ADDR" not in e:
            command = ["scontrol", "show", "hostnames", e.get("SLURM_STEP_NODELIST") or e["SLURM_JOB_NODELIST"]]
            try:
                names = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
            except (OSError, subprocess.SubprocessError):
                raise ConfigError("MASTER_ADDR: set it to the first node's address; scontrol is not here") from None
            e |= {"MASTER_ADDR": names[0], "ORYX_NODES": " ".join(names)}
        e.setdefault("MASTER_PORT", str(20000 + int(e["SLURM_JOB_ID"]) % 10000))
    launch = ranks.read()
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in single.items():
        e.setdefault(name, value)
    return (0, 1) if launch is None else (launch.rank, launch.size)


def _store(rank: int, world: int, timeout: float) -> dist.Store:
    """The key-value store on rank 0 (under torchrun, its agent's), without waiting for all to come."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        patience = timedelta(seconds=timeout)
        if rank == 0 and not hosted:
            from oryx_megatron.platform.store import serve

            store = serve(address, port, patience, world_size=world, wait_for_workers=False)
        else:
            store = dist.TCPStore(address, port, world, timeout=patience, wait_for_workers=False, multi_tenant=True)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise _local(f"{node_name()}: cannot reach rank 0 at {address}:{port}: {_first_line(error)}") from None
    return dist.PrefixStore(f"health/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _local(text: str) -> ConfigError:
    error = ConfigError(text)
    error.rank_local = True
    return error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


if __name__ == "__main__":
    sys.exit(main())
