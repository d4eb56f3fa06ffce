"""One layout of one model as a case to measure, what was found, and both as a table and a picture; no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oryx_megatron.config.schema import ParallelConfig
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import ConfigError

PEER = "gpt"
"""Name of megatron-core's own model."""
HYBRIDS = ("mcore-gdn", "mcore-gdn-plain")
"""megatron-core's hybrid of GDN and attention by layer; `plain`: experts without its fused permutation and router."""
PEERS = (PEER, *HYBRIDS)


@dataclass(frozen=True)
class Case:
    """What to measure."""

    model: str
    """A preset, a YAML file, or one of PEERS."""
    layout: str
    """As `parse_layout` reads it."""
    gpus: int
    sequence: int
    batch: int
    """Sequences per step over all GPUs."""
    micro: int
    """Sequences per microbatch."""
    plan: str
    """Mode plan of every microbatch."""
    graphs: bool
    """Replay CUDA graphs where they can be; else kernels are launched one by one."""
    fp8: str = "none"
    optimizer: str = "adamw"
    cpu_offload: bool = False
    chunk: int = 256
    gpt: str = "1.4b-transformer"
    """Preset that gives `gpt` its size."""
    hybrid: str = "1.4b-gdn-hybrid"
    """Preset or YAML file that gives `mcore-gdn` its shape."""
    warm: int = 3
    """Steps before the timed ones: they compile, capture and fill caches."""
    steps: int = 5

    @property
    def shape_of(self) -> str:
        """The preset or file whose shape the model has."""
        return self.gpt if self.model == PEER else self.hybrid if self.model in HYBRIDS else self.model

    def name(self) -> str:
        """In words."""
        more = [f"{self.sequence} tokens", *([self.fp8] if self.fp8 != "none" else [])]
        return f"{self.model} {self.layout} ({', '.join([*more, 'graphs' if self.graphs else 'launched'])})"


@dataclass(frozen=True)
class Found:
    """One layout: what it took, and what the planner said."""

    model: str
    layout: str
    micro: int
    graphs: bool
    """CUDA graphs were replayed; else kernels were launched one by one."""
    peak_gib: float
    planned_gib: float
    outside_gib: float
    """Memory of the fullest GPU that torch's allocator does not know: CUDA, NCCL, libraries."""
    tokens_per_second: float
    planned_tokens_per_second: float
    idle: float
    """Share of a step without a kernel, on the rank with most."""
    exchange: float
    """Share of a step in which NCCL's kernels ran, on the rank with most."""
    loss: float
    """Of the last step."""
    gpus: int = 0
    sequence: int = 0
    batch: int = 0
    plan: str = ""
    fp8: str = "none"
    optimizer: str = "adamw"
    card: str = ""
    seconds: tuple[float, ...] = ()
    """Of the timed steps; the median counts."""


SPLITS = ("tensor", "pipeline", "context")


def _fields(text: str) -> dict[str, int | str]:
    found: dict[str, int | str] = {}
    for item in text.split(",") if text else []:
        name, _, value = item.partition("=")
        known = {field.name for field in dataclasses.fields(ParallelConfig)} | {"data"}
        if name not in known or not value:
            raise ConfigError(f"--layout {text}: expected field=value, fields: {', '.join(sorted(known))}")
        if value in ("true", "false"):
            found[name] = value == "true"
        else:
            found[name] = int(value) if value.isdecimal() else value
    return found


def _split(changes: dict[str, int | str]) -> int:
    """Ranks that share one batch."""
    return math.prod(int(changes.get(name, 1)) for name in SPLITS)


def parse_layout(text: str, world: int) -> ParallelConfig:
    """tensor=2,recompute=full → ParallelConfig. `data` is what the others leave and may be named for the reader."""
    changes = _fields(text)
    split = _split(changes)
    if int(changes.pop("data", world // split)) * split != world:
        raise ConfigError(f"--layout {text}: does not use the {world} ranks there are")
    return ParallelConfig(**({"overlap": True} | changes))  # type: ignore[arg-type]


def data_size(text: str, world: int) -> int:
    """Data-parallel ranks of a layout."""
    layout = parse_layout(text, world)
    return world // (layout.tensor * layout.pipeline * layout.context)


def with_data(text: str, world: int) -> str | None:
    """A layout with its data-parallel size named; None where it does not come out even on `world` GPUs."""
    changes = _fields(text)
    split = _split(changes)
    data = world // split
    if world % split or int(changes.get("data", data)) != data:
        return None
    expert = int(changes.get("expert", 1))
    if (world // int(changes.get("pipeline", 1))) % expert:
        return None
    if "data" in changes or (data == 1 and any(name in changes for name in SPLITS)):
        return text
    first = not any(name in changes for name in SPLITS)  # as in data=2,recompute=full
    parts = [f"data={data}", text] if first else [text, f"data={data}"]
    return ",".join(filter(None, parts))


HEAD = (
    "| model | GPUs | layout | tokens | precision | graphs | tokens/s | vs GPT | vs mcore-gdn | × one GPU | planned "
    "| GiB | planned | idle | NCCL | loss |"
)


def versus_gpt(found: Found, results: Iterable[Found]) -> float | None:
    """Speed against GPT's best setting of the same layout, text and precision."""
    return _ratio(found, [r for r in results if r.model == PEER and _shape(r) == _shape(found)])


def versus_hybrid(found: Found, results: Iterable[Found]) -> float | None:
    """The same against the best setting of megatron-core's hybrid."""
    return _ratio(found, [r for r in results if r.model in HYBRIDS and _shape(r) == _shape(found)])


def versus_one(found: Found, results: Iterable[Found]) -> float | None:
    """Speed against the best of the same model, length and precision on one GPU."""
    return _ratio(
        found,
        [
            r
            for r in results
            if r.gpus == 1 and (r.model, r.sequence, *_numerics(r)) == (found.model, found.sequence, *_numerics(found))
        ],
    )


def _numerics(found: Found) -> tuple[str, str]:
    return found.fp8, found.optimizer


def _shape(found: Found) -> tuple[Any, ...]:
    return found.layout, found.gpus, found.sequence, found.micro, found.batch, *_numerics(found)


def _ratio(found: Found, bases: list[Found]) -> float | None:
    return found.tokens_per_second / max(r.tokens_per_second for r in bases) if bases else None


def row(found: Found, results: Iterable[Found]) -> str:
    """A line of the table."""
    results = list(results)
    ratios = [versus(found, results) for versus in (versus_gpt, versus_hybrid, versus_one)]
    against = " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
    parts = found.batch // found.micro // data_size(found.layout, found.gpus)
    precision = found.fp8 if found.fp8 != "none" else "bf16" if found.card else "fp32"
    if found.optimizer != "adamw":
        precision += f", {found.optimizer}"
    return (
        f"| {found.model} | {found.gpus} | {found.layout} | {found.sequence} × {found.micro} × {parts} | {precision} "
        f"| {'yes' if found.graphs else 'no'} | {found.tokens_per_second:,.0f} | {against} "
        f"| {found.planned_tokens_per_second:,.0f} | {found.peak_gib:.1f} | {found.planned_gib:.1f} | {found.idle:.1%} "
        f"| {found.exchange:.1%} | {found.loss:.4f} |"
    )


def table(results: Iterable[Found]) -> str:
    """All results in Markdown."""
    results = list(results)
    return "\n".join([HEAD, "|---" * HEAD.count(" | ") + "|---|", *(row(r, results) for r in results)])


COLORS = {"mcore": "#cc79a7", "gdn": "#0072b2", "mamba2": "#d55e00", PEER: "#7f7f7f"}


def plot(results: Iterable[Found], path: Path) -> None:
    """A row for every layout of several GPUs: speed over that of as many single ones, and speed against GPT."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = list(results)
    best: dict[tuple[Any, ...], Found] = {}
    for r in sorted(results, key=lambda r: r.tokens_per_second):
        if r.gpus > 1:
            best[r.model, *_shape(r)] = r
    shapes = list(dict.fromkeys(_shape(r) for r in results if r.gpus > 1))
    if not shapes:
        return
    models = list(dict.fromkeys(r.model for r in best.values()))
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.6 + 0.36 * len(shapes)), sharey=True)
    height = 0.8 / len(models)
    titles = ("tokens/s over as many single GPUs", "tokens/s against GPT of the same layout")
    for axis, title, ratio in zip(axes, titles, (versus_one, versus_gpt)):
        for i, model in enumerate(models):
            for place, shape in enumerate(shapes):
                found = best.get((model, *shape))
                value = None if found is None else ratio(found, results)
                if found is None or value is None or (ratio is versus_gpt and model == PEER):
                    continue
                value /= found.gpus if ratio is versus_one else 1
                color = next((color for part, color in COLORS.items() if part in model), "#009e73")
                label = model if place == 0 else None
                bar = axis.barh(place + (i - (len(models) - 1) / 2) * height, value, height, color=color, label=label)
                axis.bar_label(bar, [f"{value:.2f}"], fontsize=7)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    names = [
        ", ".join([f"{gpus} × {layout}, {length} tokens", *(x for x in (fp8, optimizer) if x not in ("none", "adamw"))])
        for layout, gpus, length, _, _, fp8, optimizer in shapes
    ]
    axes[0].set_yticks(range(len(shapes)), names, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
