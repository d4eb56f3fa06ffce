"""What to check against, and what was found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from oryx_megatron.errors import ConfigError

SHOWN = 4
"""Nodes or pairs in a line of numbers: the worst."""


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
class Fault:
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
    findings: tuple[Fault, ...]
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


def _worst(name: str, values: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(values.items(), key=lambda item: item[1], reverse=name.startswith("clock"))[:SHOWN]
