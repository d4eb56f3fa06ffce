#!/usr/bin/env python
"""Layouts of a model on a number of GPUs: memory, communication, step time and
bubble of each, best first.

Examples:
    oryx plan 1.4b-gdn --gpus 8 --sequence 4096 --batch 256
    oryx plan configs/run/pretrain-1.4b-gdn.yaml --gpus 64 \\
        --card h100 --price 2.50
    oryx plan 70b-gdn --gpus 1024 --sequence 8192 --batch 1024 \\
        --picture schedule.png
    oryx plan 1.4b-mamba2 --gpus 16 --memory 80 --network 25 \\
        --sequence 32768 --batch 64 --tokens 100e9 --json

On paper: times come from what one and two H100s and H200s were measured to do
(benchmarks/planner_error.py), memory from the shapes of what is kept. Take the
first few layouts as those to measure, not as promises.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import checkout  # noqa: F401

import argparse
import dataclasses
import json
import math
import sys
import textwrap
from pathlib import Path

from oryx_megatron.arch import Share, layer_shares, muon_line
from oryx_megatron.cli import Parser, main_guard
from oryx_megatron.config import is_run, load_model, load_run
from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.plans import shares_of_layers
from oryx_megatron.config.schema import ModelConfig
from oryx_megatron.data.files import check_output, is_marked, mark, replacing
from oryx_megatron.display import shown, shown_lines
from oryx_megatron.errors import ConfigError
from oryx_megatron.paths import expand_arguments
from oryx_megatron.pipeline_schedule import schedule
from oryx_megatron.planner import (
    GIB,
    USABLE,
    Cluster,
    Estimate,
    Work,
    estimate,
    plan,
)
from oryx_megatron.planner_costs import COPY_TERABYTES, COSTS, MEMORY_GIB

PICTURE_MICROBATCHES = 16
"""More would not be seen."""


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse, plan and print; see --help."""
    a = _parser().parse_args(argv)
    expand_arguments(a, "--picture")
    _check(a)
    model = _of_run(a) if is_run(a.model) else load_model(a.model)
    for name in ("sequence", "batch"):
        if getattr(a, name) is None:
            raise ConfigError(f"--{name} is missing: {a.model} is a model, which has none; give it, or a run's YAML")
    if a.price is not None and a.tokens is None:
        raise ConfigError("--price needs --tokens, or a run's YAML")
    memory = MEMORY_GIB[a.card] if a.memory is None else a.memory
    cluster = Cluster(a.gpus, memory, a.gpus_per_node, a.nvlink, a.network, a.tflops, COPY_TERABYTES[a.card])
    work = Work(
        a.sequence,
        a.batch[-1],
        _share(model, a.attention_share),
        ramp=tuple(dict.fromkeys(a.batch[:-1])),
        ema=a.ema,
        muon=a.muon,
        cpu_offload=a.cpu_offload,
        graphs=not a.launched,
        fp8=a.fp8 or "none",
    )
    if a.muon and a.cpu_offload:
        raise ConfigError("--muon: not with --cpu-offload; use AdamW")
    if a.fp8 == "mxfp8":
        sys.stderr.write(
            "precision.fp8: mxfp8 has not been measured; planned with blockwise FP8's times on a Hopper GPU\n"
        )
    if model.moe is not None:
        sys.stderr.write(
            "model.moe: experts are launched, and their steps wait for the host. That was measured with 64 experts a\n"
            "layer, and is right within 30 %: measure yours with benchmarks/layouts.py (docs/performance.md)\n"
        )
    found = plan(model, cluster, work)
    if a.json:
        plain = [_plain(e, work) | _bill(e, cluster, work, a.tokens, a.price) for e in found[: a.top]]
        sys.stdout.write(json.dumps(plain, indent=1) + "\n")
    else:
        ramp = [] if not work.ramp else ramp_lines(model, cluster, work, found[0])
        bill = _bill_lines(_bill(found[0], cluster, work, a.tokens, a.price), a.price)
        sys.stdout.write(shown_lines(_report(model, cluster, work, found, a.top, [*ramp, *bill])))
    if a.picture:
        draw(found[0], a.picture)
        sys.stderr.write(f"wrote {shown(a.picture)}\n")
    return 0


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    defaults = Cluster(1)
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="preset, model YAML, or run YAML (RUN.yaml)")
    parser.add_argument("--gpus", type=int, required=True, help="of the cluster")
    parser.add_argument("--sequence", type=int, help="tokens per sample (default: the run's)")
    parser.add_argument(
        "--batch", type=int, nargs="+", metavar="N",
        help="samples per step over all GPUs (default: the run's); of a ramp all its sizes: layouts take all, and are "
        "compared at the last",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=float, metavar="N", help="to train on, as 29e9: adds hours and GPU-hours (default: the run's)"
    )
    parser.add_argument("--price", type=float, metavar="P", help="of a GPU-hour: adds the cost, in the same currency")
    parser.add_argument("--attention-share", type=float, help="of the tokens (default: 0.5, or what the model has)")
    parser.add_argument("--card", choices=sorted(MEMORY_GIB), default="h200", help="memory and its speed")
    parser.add_argument("--memory", type=float, help="GiB per GPU (default: the card's)")
    parser.add_argument("--gpus-per-node", type=int, default=defaults.gpus_per_node)
    parser.add_argument(
        "--nvlink", type=float, default=defaults.node_gbps, help="GB/s that NCCL sends per GPU inside a node"
    )
    parser.add_argument(
        "--network", type=float, default=defaults.network_gbps, help="GB/s that NCCL sends per GPU between nodes"
    )
    parser.add_argument("--tflops", type=float, default=defaults.tflops, help="peak of a GPU in bf16")
    parser.add_argument(
        "--cpu-offload", action="store_true", help="as with optimizer.cpu_offload: its state on the host"
    )
    parser.add_argument("--ema", action="store_true", help="as with train.ema: an fp32 average of the weights")
    parser.add_argument("--muon", action="store_true", help="as with optimizer.name muon: its memory, AdamW's time")
    parser.add_argument("--fp8", choices=sorted(COSTS.fp8), help="precision.fp8 (default: the run's, else none)")
    parser.add_argument("--launched", action="store_true", help="as with kernels.graphs off: the host may be the limit")
    parser.add_argument("--top", type=int, default=10, help="layouts to list (default %(default)s)")
    parser.add_argument("--picture", type=Path, help="PNG of the best layout's pipeline schedule")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier --picture")
    parser.add_argument("--json", action="store_true", help="print the layouts as JSON")
    return parser


def _check(a: argparse.Namespace) -> None:
    """Refuse numbers that are none of anything, and a picture that cannot be written."""
    for name in (
        "gpus",
        "sequence",
        "batch",
        "memory",
        "gpus_per_node",
        "nvlink",
        "network",
        "tflops",
        "top",
        "tokens",
        "price",
    ):
        value = getattr(a, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not 0 < number < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')}: {number} should be above 0")
    if a.picture and (a.picture.is_dir() or not a.picture.absolute().parent.is_dir()):
        raise ConfigError(f"--picture {a.picture}: should name a file in a folder that exists")
    if a.picture:
        check_output(a.picture, ours=is_marked, overwrite=a.overwrite, inputs=[a.model])


def _of_run(a: argparse.Namespace) -> ModelConfig:
    """The model of a run, whose settings take the place of what was not given."""
    run = load_run(a.model)
    count = SampleCount.of(run.train)
    if a.sequence is None:
        a.sequence = run.data.sequence_length
    if a.batch is None:
        a.batch = [size for _, size in count.sizes]
        if a.tokens is None:
            a.tokens = float(count.samples_at(run.train.iterations) * run.data.sequence_length)
    elif a.tokens is None:
        a.tokens = float(run.train.iterations * a.batch[-1] * a.sequence)
    if a.attention_share is None and run.model.single_mode is None:
        modes = run.modes
        a.attention_share = modes.p_attention + (1 - modes.p_attention - modes.p_recurrent) / 2
        if modes.fixed is not None:
            shares = shares_of_layers(modes.fixed, a.sequence, chunk=modes.chunk, layers=run.model.reads_plans)
            a.attention_share = shares[0] if len(set(shares)) == 1 else tuple(shares)
    a.cpu_offload = a.cpu_offload or run.optimizer.cpu_offload
    a.launched = a.launched or run.kernels.graphs == "off"
    a.fp8 = a.fp8 or run.precision.fp8
    if run.precision.fp4 != "none":
        a.launched = True  # engine.why_launched
        sys.stderr.write(f"precision.fp4: {run.precision.fp4} has not been measured; planned as bf16\n")
    a.ema = a.ema or run.train.ema is not None
    a.muon = a.muon or run.optimizer.name == "muon"
    return run.model


def _bill(e: Estimate, cluster: Cluster, work: Work, tokens: float | None, price: float | None) -> dict[str, float]:
    """What training on so many tokens takes at this layout's speed, steps alone; nothing where no number is known."""
    if tokens is None:
        return {}
    steps = tokens / (work.batch * work.sequence)
    hours = steps * e.step_seconds / 3600
    bill = {"tokens": tokens, "steps": steps, "hours": hours, "gpu_hours": hours * cluster.gpus}
    return bill if price is None else bill | {"cost": bill["gpu_hours"] * price}


def _bill_lines(bill: dict[str, float], price: float | None) -> list[str]:
    if not bill:
        return []
    lines = [
        f"{bill['tokens'] / 1e9:,.1f} B tokens: {bill['steps']:,.0f} steps, {bill['hours']:,.1f} hours, "
        f"{bill['gpu_hours']:,.0f} GPU-hours"
    ]
    if "cost" in bill:
        lines[0] += f", {bill['cost']:,.0f} at {price:g} an hour"
    return ["", *lines, "steps alone: evaluations, saves, restarts and what fails come on top"]


def _share(model: ModelConfig, asked: Share | None) -> Share:
    single = model.single_mode
    own = None if single is None else float(model.has_attention)
    if asked is None:
        return 0.5 if own is None else own
    if isinstance(asked, float) and (not 0 <= asked <= 1 or (own is not None and asked != own)):
        can = "should be from 0 to 1" if own is None else f"is not {own:g}, that of a model with {single} mode only"
        raise ConfigError(f"--attention-share: {asked:g} {can}")
    return asked


def _mean_share(model: ModelConfig, work: Work) -> float:
    """Over the layers that read plans."""
    shares = zip(layer_shares(model, work.attention_share), model.reads_plans, strict=True)
    read = [share for share, reads in shares if reads]
    return sum(read) / len(read)


def _plain(e: Estimate, work: Work) -> dict[str, object]:
    return {
        "layout": dataclasses.asdict(e.layout),
        "micro_batch_size": e.micro_batch,
        "recompute": e.recompute,
        "gib": e.gib,
        "host_gib": e.host / GIB,
        "memory_bytes": e.memory,
        "traffic_bytes_per_step": e.traffic,
        "seconds": e.seconds,
        "step_seconds": e.step_seconds,
        "tokens_per_second": e.tokens_per_second,
        "bubble": e.bubble,
        "settings": _settings(e, muon=work.muon),
    }


def _settings(e: Estimate, *, muon: bool) -> list[str]:
    """Overrides that give a run this layout."""
    layout = e.layout
    first = [] if e.first_stage is None else [f"parallel.first_stage_layers={e.first_stage}"]
    first += [f"parallel.expert={layout.ep}"] if layout.ep > 1 else []
    return [
        f"parallel.tensor={layout.tp}",
        f"parallel.pipeline={layout.pp}",
        f"parallel.virtual_pipeline={layout.vpp}",
        *first,
        f"parallel.context={layout.cp}",
        f"parallel.recompute={e.recompute}",
        "parallel.overlap=true",
        f"train.micro_batch_size={e.micro_batch}",
        *(["optimizer.cpu_offload=true"] if e.host else []),
        *(["optimizer.name=muon"] if muon else []),
    ]


def ramp_lines(model: ModelConfig, cluster: Cluster, work: Work, best: Estimate) -> list[str]:
    """A layout's step at every size of a ramp: the pipeline idles more with fewer microbatches."""
    lines = ["", "batch    m  step s  tokens/s  bubble"]
    for size in (*work.ramp, work.batch):
        layout = dataclasses.replace(best.layout, microbatches=size // (best.micro_batch * best.layout.dp))
        then = dataclasses.replace(work, batch=size)
        e = estimate(model, cluster, then, layout, best.micro_batch, best.recompute)
        rate = f"{e.tokens_per_second:,.0f}"
        lines.append(f"{size:>5}{layout.microbatches:>5}{e.step_seconds:>8.3g}{rate:>10}{e.bubble:>8.1%}")
    return lines


def _report(model: ModelConfig, cluster: Cluster, work: Work, found: list[Estimate], top: int, ramp: list[str]) -> str:
    lines = [
        f"{model.name} on {_count(cluster.gpus, 'GPU')} of {cluster.memory_gib:g} GiB: {_count(len(found), 'layout')} "
        f"fit, {1 - USABLE:.0%} left to the allocator",
        f"{work.batch} × {work.sequence} tokens per step, "
        + ("any mode plan" if model.ignores_plans else f"{_mean_share(model, work):.0%} in attention mode"),
        "",
        f"{'layout':<26}{'micro':>5}{'m':>5} {'recompute':<9}{'GiB':>6}{'step s':>8}{'tokens/s':>12}{'bubble':>7}",
    ]
    for e in found[:top]:
        lines.append(
            f"{e.name():<26}{e.micro_batch:>5}{e.layout.microbatches:>5} {e.recompute:<9}{e.gib:>6.1f}"
            f"{e.step_seconds:>8.3g}{e.tokens_per_second:>12,.0f}{e.bubble:>7.1%}"
        )
    best = found[0]
    lines += ["", f"best: {best.name()}", *ramp, "", "memory of the fullest GPU, GiB"]
    lines += [f"  {name:<30}{size / GIB:>9.2f}" for name, size in best.memory.items() if size]
    lines += [f"  {'sum':<30}{best.gib:>9.2f}"]
    if work.muon:
        lines += ["", "Muon's state over all GPUs:", *textwrap.wrap(muon_line(model), 77, initial_indent="  ")]
    if best.host:
        lines += ["", "memory of the host for each such GPU, GiB", f"  {'optimizer':<30}{best.host / GIB:>9.2f}"]
    lines += ["", "sent per GPU and step, GiB"] if any(best.traffic.values()) else []
    lines += [f"  {name:<30}{size / GIB:>9.2f}" for name, size in best.traffic.items() if size]
    lines += ["", "time of a step, s"]
    lines += [f"  {name:<30}{seconds:>9.3f}" for name, seconds in best.seconds.items() if seconds]
    lines += ["", "micro: sequences per microbatch; m: microbatches per step; pp 8·2: virtual stages", ""]
    text = "set " + " ".join(_settings(best, muon=work.muon))
    lines += textwrap.wrap(text, 79, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def draw(best: Estimate, path: Path) -> None:
    """PNG of the pipeline schedule: a row per pipeline rank, forward blue, backward orange, chunks by shade."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layout = best.layout
    microbatches = min(layout.microbatches, max(PICTURE_MICROBATCHES // layout.pp, 2) * layout.pp)
    slots = schedule(layout.pp, layout.vpp, microbatches)
    figure, axes = plt.subplots(figsize=(13, 1.2 + 0.45 * layout.pp), dpi=140)
    for slot in slots:
        shade = 0.45 + 0.5 * (slot.chunk + 1) / layout.vpp
        color = plt.get_cmap("Blues" if slot.forward else "Oranges")(min(shade, 0.95) * 0.8)
        width = slot.stop - slot.start
        axes.barh(slot.rank, width, left=slot.start, height=0.86, color=color, edgecolor="white", linewidth=0.4)
        if layout.pp * microbatches * layout.vpp <= 400:
            axes.text(slot.start + width / 2, slot.rank, str(slot.microbatch), ha="center", va="center", fontsize=6)
    stop = max(slot.stop for slot in slots)
    idle = 1 - sum(slot.stop - slot.start for slot in slots) / (stop * layout.pp)
    axes.set(
        yticks=range(layout.pp), ylabel="pipeline rank", xlabel="time in forward passes of a whole stage",
        title=f"{best.name()}: {microbatches} of {layout.microbatches} microbatches, idle {idle:.1%} of this; blue "
        "forward, orange backward, darker: later model chunk",
    )  # fmt: skip
    axes.title.set_fontsize(9)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", metadata=mark("png"))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
