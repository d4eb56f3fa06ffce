"""From what ranks saw and measured to findings: nodes that differ from most, that are slow, that are silent."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

from oryx_megatron.health.report import Fault, Options


def silent(ranks: Iterable[int], world: int) -> list[Fault]:
    """Ranks that told nothing, by the node they should be on."""
    names = os.environ.get("ORYX_NODES", "").split()
    found: dict[str, list[int]] = {}
    for rank in ranks:
        node = names[rank * len(names) // world] if names else "unknown node"
        found.setdefault(node, []).append(rank)
    return [
        Fault((node,), "present", f"rank{'s' * (len(r) > 1)} {', '.join(map(str, r))} did not report")
        for node, r in found.items()
    ]


def facts_of_nodes(
    facts: dict[int, dict[str, Any]], leaders: list[int], offsets: dict[int, float | None], options: Options
) -> list[Fault]:
    """Faults of single nodes, and nodes that differ from most."""
    found: list[Fault] = []

    def add(rank: int, check: str, text: str) -> None:
        found.append(Fault((facts[rank]["node"],), check, text))

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


def _odd(values: dict[int, str], facts: dict[int, dict[str, Any]], check: str, what: str) -> list[Fault]:
    """Nodes whose value is not that of most (of the first, in a draw)."""
    if len(set(values.values())) < 2:
        return []
    usual, count = Counter(values.values()).most_common(1)[0]
    example = next(facts[rank]["node"] for rank, value in values.items() if value == usual)
    others = f" and {count - 1} more" if count > 1 else ""
    return [
        Fault((facts[rank]["node"],), check, f"{what} {value}, but {usual} on {example}{others}")
        for rank, value in values.items()
        if value != usual
    ]


def speeds_of_nodes(
    speeds: dict[int, dict[str, Any]],
    stuck: list[int],
    groups: dict[str, list[int]],
    options: Options,
    measured: dict[str, Any],
) -> list[Fault]:
    """Slow and failing nodes; adds the bandwidths to `measured`."""
    node_of = {rank: node for node, ranks in groups.items() for rank in ranks}
    found = [
        Fault((node_of[rank],), "all-reduce", f"rank {rank} is stuck in the measurements of bandwidth")
        for rank in stuck
    ]
    inside: dict[str, float | str] = {}
    pairs: dict[str, float | str] = {}
    for rank, values in speeds.items():
        if error := values.get("error"):
            found.append(Fault((node_of[rank],), "all-reduce", f"the ranks' group failed: {error}"))
        for name, value in values.items():
            into = inside if name.startswith("in ") else pairs if "–" in name else None
            if into is not None and not isinstance(into.get(name), str):  # an error on one rank counts
                into[name] = value if isinstance(value, str) else min(value, into.get(name, math.inf))
    inside = {name.removeprefix("in "): value for name, value in inside.items()}
    good = _good([value for value in inside.values() if isinstance(value, float)])
    for node, value in inside.items():
        if isinstance(value, str):
            found.append(Fault((node,), "all-reduce", f"all-reduce within the node failed: {value}"))
        elif value < options.slow * good:
            text = f"all-reduce within the node: {value:.3g} GB/s, others reach {good:.3g}"
            found.append(Fault((node,), "all-reduce", text))
    found += judge_pairs(pairs, options)
    everything = [values["all"] for values in speeds.values() if "all" in values and math.isfinite(values["all"])]
    measured["all-reduce within nodes in GB/s"] = {n: v for n, v in inside.items() if isinstance(v, float)}
    measured["all-reduce between nodes in GB/s"] = {n: v for n, v in pairs.items() if isinstance(v, float)}
    measured["all-reduce over all in GB/s"] = {"all": min(everything)} if everything else {}
    return found


def judge_pairs(pairs: dict[str, float | str], options: Options) -> list[Fault]:
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
        found.append(Fault((node,), "all-reduce", f"all-reduce between nodes: {texts}"))
    for name, text in bad.items():
        ends = tuple(name.split("–"))
        if not set(ends) & set(blamed):
            found.append(Fault(ends, "all-reduce", f"all-reduce between the two: {text}; one of them, or their link"))
    return found


def _good(values: list[float]) -> float:
    """What good ones reach: the best of a few, the ninth decile of many."""
    return sorted(values)[math.ceil(0.9 * (len(values) - 1))] if values else 0.0


def _other(pair: str, node: str) -> str:
    a, b = pair.split("–")
    return b if a == node else a


def merged(findings: Iterable[Fault]) -> tuple[Fault, ...]:
    """Equal texts of several nodes as one finding."""
    nodes: dict[tuple[str, str], dict[str, None]] = {}
    for finding in findings:
        nodes.setdefault((finding.check, finding.text), {}).update(dict.fromkeys(finding.nodes))
    return tuple(Fault(tuple(names), check, text) for (check, text), names in nodes.items())


def numbers(facts: dict[int, dict[str, Any]], leaders: list[int], name: str) -> dict[str, float]:
    return {facts[rank]["node"]: facts[rank][name] for rank in leaders if name in facts[rank]}
