"""One rank's part: tell what it sees, answer, measure; rank 0 also asks everyone and judges."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oryx_megatron import platform
from oryx_megatron.config import load_run, to_yaml
from oryx_megatron.errors import OryxError, first_line
from oryx_megatron.health import judge, machine
from oryx_megatron.health.report import Fault, Options, Report
from oryx_megatron.paths import is_url

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
else:
    torch, dist = platform.late("torch"), platform.late("torch.distributed")

CLOCK_TRIES = 5
PATIENCE = 30.0
"""Seconds after which a file should be seen on all nodes: network file systems show new ones late."""


class Rank:
    """One rank's part of the checks."""

    def __init__(self, options: Options, store: dist.Store, rank: int, world: int, clock: Callable[[], float]) -> None:
        self.options, self.store, self.rank, self.world, self.clock = options, store, rank, world, clock
        self.node = machine.node_name()
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
        findings = [*judge.silent(silent, self.world), *judge.facts_of_nodes(facts, leaders, offsets, self.options)]
        groups: dict[str, list[int]] = {name: [] for name in names}
        for rank in sorted(facts):
            groups[facts[rank]["node"]].append(rank)
        # Ranks that are missing, or with and without GPUs, cannot form a process group.
        possible = not silent and len({facts[rank]["gpus"] > 0 for rank in facts}) == 1
        self.store.set("groups", json.dumps(groups if possible else {}))
        clocks = {facts[rank]["node"]: abs(offset) for rank, offset in offsets.items() if offset is not None}
        measured: dict[str, Any] = {
            "clock difference in s": clocks,
            "free space in GB": judge.numbers(facts, leaders, "free_gb"),
            "writes in MB/s": judge.numbers(facts, leaders, "write_mbs"),
        }
        if possible:
            self._tell("speeds", self._speeds(groups))
            speeds, stuck = self._gather("speeds", self.options.timeout * 3)
            findings += judge.speeds_of_nodes(speeds, stuck, groups, self.options, measured)
        else:
            findings.append(Fault(names, "all-reduce", "bandwidth was not measured, for the reasons above"))
        report = Report(names, self.world, judge.merged(findings), measured)
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
        findings = tuple(Fault(tuple(f["nodes"]), f["check"], f["text"]) for f in fields["findings"])
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
            facts |= machine.gpu_facts()
        if self.first:
            facts |= {"versions": machine.versions(), "commit": platform.git_commit()}
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
            folder = load_run(self.options.config, self.options.overrides).output_dir
            return None if is_url(folder) else Path(folder)  # object storage: the run's rank 0 looks at it
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
            return {"error": first_line(error)}
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
                        found[name] = first_line(error)
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
