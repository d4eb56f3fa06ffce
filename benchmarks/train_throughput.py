"""Training throughput on one GPU: Oryx against megatron-core's GPT, GDN hybrid and Mamba of the same size, in one run.

    python benchmarks/train_throughput.py --run 2048x16 bf16 gpt gdn/drawn --run 8192x4 bf16 gpt gdn/ratio:0.5 --out OUT

Every case is a whole step: forward, backward, gradient clipping and the distributed optimizer, on random tokens, one
microbatch a step, nothing recomputed. Model FLOPs are those that the plan needs (`oryx_megatron.arch`: 2 per multiply
and add, causal attention over (s + 1) / 2 tokens, the recurrence step by step), times 3 for a training step.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import gdn_chunks, gpt_chunks, hybrid_chunks, peer_engine
from torch import Tensor

from oryx_megatron import arch, compat, parallel
from oryx_megatron.config import load_model
from oryx_megatron.config.schema import (
    DataConfig,
    KernelsConfig,
    ModelConfig,
    ModesConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from oryx_megatron.data.files import replacing
from oryx_megatron.modes import Mode, ModePlan, Plan, draw_plan, parse_plan
from oryx_megatron.ops import backends
from oryx_megatron.testing.layouts import forget_hooks
from oryx_megatron.train.engine import MegatronEngine, take_step
from oryx_megatron.train.step import Microbatch
from oryx_megatron.train.traces import Trace

PEAK_TFLOPS = 989.0
"""Dense bf16 rate of one H100 or H200 (SXM) by its data sheet; MFU is against this, for FP8 too."""
CHUNK = 256
DRAWS = 16
"""Plans of the case `drawn`: the first draws of a run with the default mixing probabilities and seed."""
LONG = ("gpt", "gdn/ratio:0.5", "gdn/ratio:0.1", "mamba2/ratio:0.5", "mamba2/ratio:0.1")
DEFAULT = (
    ("2048x16", "bf16", "gpt", "mamba", "gdn/drawn", "gdn/attention", "gdn/recurrent", "mamba2/drawn"),
    ("8192x4", "bf16", *LONG),
    ("32768x1", "bf16", *LONG),
    ("2048x16", "tensorwise", "gpt", "gdn/drawn"),
)
"""Shape, precision, and cases of each run when none is given."""


@dataclass(frozen=True)
class Result:
    """One case."""

    case: str
    sequence: int
    batch: int
    precision: str
    graphs: bool
    """CUDA graphs are replayed; else kernels are launched one by one."""
    parameters: int
    attention_share: float
    milliseconds: float
    tokens_per_second: float
    model_tflops: float
    mfu: float
    idle: float | None
    """Share of four steps without a kernel on the GPU."""
    peak_gib: float
    """Most that torch's allocator held from the driver while the case ran."""
    loss: float


def run_config(model: ModelConfig, sequence: int, batch: int, precision: PrecisionConfig) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=sequence, tokenizer="none"),
        optimizer=OptimizerConfig(lr=1e-6),  # one batch again and again: it should not be learned by heart
        train=TrainConfig(iterations=1000, global_batch_size=batch, micro_batch_size=batch),
        output_dir="none",
        precision=precision,
        parallel=ParallelConfig(),
    )


def plans_of(spec: str, sequence: int) -> list[Plan]:
    """Plans of the steps of a case, in turn."""
    if not spec:
        return [ModePlan.uniform(Mode.ATTENTION, sequence)]
    if spec != "drawn":
        return [parse_plan(spec, sequence, chunk=CHUNK)]
    draw = partial(draw_plan, ModesConfig(chunk=CHUNK), seed=1234, microbatch=0, length=sequence)
    return [draw(iteration=i) for i in range(DRAWS)]


def random_batch(model: ModelConfig, sequence: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and loss mask on the host, where the loader leaves them."""
    tokens = torch.randint(0, model.vocab_size, (batch, sequence + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(batch, sequence)


class Runner:
    """The engine that users train with, on a model that it builds or that is given, and one training step."""

    def __init__(self, run: RunConfig, model: list[Any] | None = None) -> None:
        self.run = run
        self.engine = MegatronEngine(run) if model is None else peer_engine(run, model)
        self.graphs = self.engine.graphs
        self.parameters = sum(p.numel() for p in self.engine.chunks[0].parameters())
        self.batch = random_batch(run.model, run.data.sequence_length, run.train.micro_batch_size)

    def close(self) -> None:
        """Let go of the memory."""
        forget_hooks(self.engine.chunks)
        del self.engine, self.graphs
        gc.collect()
        torch.cuda.empty_cache()
        if (left := torch.cuda.memory_allocated()) > 2**30:
            print(f"{left / 2**30:.1f} GiB of the last model are still held: peak memory counts them", flush=True)

    def use(self, graphs: bool) -> None:
        """Replay graphs from here on, or launch."""
        if not graphs and self.graphs is not None:
            self.graphs.forget()
        self.engine.graphs = self.graphs if graphs else None

    def step(self, plan: Plan) -> float:
        """As Trainer.step: gradients, their norm, the update; loss and norm are read by the host."""
        return take_step(self.engine, [Microbatch(*self.batch, plan)])[0]

    def time(self, plans: list[Plan], steps: int) -> tuple[float, float]:
        """Mean milliseconds of a step over whole rounds of the plans, and the last loss per token."""
        rounds = max(1, -(-steps // len(plans)))
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(rounds):
            for plan in plans:
                loss = self.step(plan)
        torch.cuda.synchronize()
        return (time.perf_counter() - begun) / (rounds * len(plans)) * 1e3, loss


# -------------------------------------------------------------------------------------------------------- the models


def oryx(mixer: str, sequence: int, batch: int, precision: PrecisionConfig, kernels: KernelsConfig) -> Runner:
    model = load_model(f"1.4b-{mixer}")
    work = backends.Workload(model, precision.dtype)
    backends.select(kernels, work)
    print("kernels:", backends.describe(work), flush=True)
    run = run_config(model, sequence, batch, precision)
    return Runner(replace(run, kernels=kernels))


def gpt(sequence: int, batch: int, precision: PrecisionConfig) -> Runner:
    """megatron-core's GPT with TransformerEngine and every fusion it offers, of the 1.4b presets' size."""
    run = run_config(load_model("1.4b-transformer"), sequence, batch, precision)
    return Runner(run, gpt_chunks(run))


GDN_HYBRID = "1.4b-gdn-hybrid"


def mcore_gdn(sequence: int, batch: int, precision: PrecisionConfig) -> Runner:
    """megatron-core's own hybrid, three layers of its GatedDeltaNet to one of attention, of the shape of ours."""
    run = run_config(load_model(GDN_HYBRID), sequence, batch, precision)
    return Runner(run, gdn_chunks(run))


MAMBA_FFN = 4800
"""SwiGLU width that gives 24 Mamba-2 + MLP layers of 2048 the size of the 1.4b presets."""


def mamba(sequence: int, batch: int, precision: PrecisionConfig, *, attention_every: int = 0) -> Runner:
    """megatron-core's Mamba-2 + MLP, or its hybrid with one attention layer in every `attention_every`."""
    preset = replace(load_model("1.4b-transformer"), ffn_hidden_size=MAMBA_FFN)
    mixers = ["*" if attention_every and (i + 1) % attention_every == 0 else "M" for i in range(preset.num_layers)]
    run = run_config(preset, sequence, batch, precision)
    return Runner(run, hybrid_chunks(run, mixers))


def build(which: str, sequence: int, batch: int, precision: PrecisionConfig, kernels: KernelsConfig) -> Runner:
    if which == "gpt":
        return gpt(sequence, batch, precision)
    if which == "mcore-gdn":
        return mcore_gdn(sequence, batch, precision)
    if which in ("mamba", "hybrid"):
        return mamba(sequence, batch, precision, attention_every=6 if which == "hybrid" else 0)
    return oryx(which, sequence, batch, precision, kernels)


# ---------------------------------------------------------------------------------------------------------- one case


def model_flops(case: str, sequence: int, shares: list[float]) -> float:
    """FLOPs per token of a training step, the mean over a case's plans."""
    name, _, _ = case.partition("/")
    if name.startswith(("gdn", "mamba2")):
        model = load_model(f"1.4b-{name}")
        return arch.mean_training_flops(model, sequence, shares)
    if name == "mcore-gdn":
        return arch.training_flops_per_token(load_model(GDN_HYBRID), sequence, 1.0)
    model = load_model("1.4b-transformer")
    if name == "gpt":
        return arch.training_flops_per_token(model, sequence, 1.0)
    d, layers = model.hidden_size, model.num_layers
    inner, state, groups = 2 * d, 128, 8
    mixer = 2.0 * d * (2 * inner + 2 * groups * state + inner // 64) + 2.0 * inner * d + 5.0 * inner * state
    attention = 8.0 * d * d + 4.0 * d * (sequence + 1) / 2
    count = layers // 6 if name == "hybrid" else 0
    mlp = 6.0 * d * MAMBA_FFN
    return 3 * ((layers - count) * mixer + count * attention + layers * mlp + 2.0 * model.vocab_size * d)


def measure(case: str, runner: Runner, precision: str, graphs: bool, steps: int, profile: Path | None) -> Result:
    sequence, batch = runner.run.data.sequence_length, runner.run.train.micro_batch_size
    plans = plans_of(case.partition("/")[2], sequence)
    begun = time.perf_counter()
    compat.torch.forget_compiled()  # of the shape before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    runner.use(graphs)
    runner.time(plans, len(plans) + 1)  # compiles, captures every shape, and warms up
    print(f"{case}{', graphs' if graphs else ''}: warm after {time.perf_counter() - begun:.0f} s", flush=True)
    if graphs and runner.graphs is not None and runner.graphs.failed:
        if case != "mcore-gdn":
            raise RuntimeError(runner.graphs.failed)
        print(f"{case} {sequence}x{batch}: not captured ({runner.graphs.failed}), launched instead", flush=True)
        graphs = False
    milliseconds, loss = runner.time(plans, steps)
    shares = [plan.attention_share for plan in plans]
    flops = model_flops(case, sequence, shares)
    rate = sequence * batch / milliseconds * 1e3
    peak = torch.cuda.max_memory_reserved() / 2**30
    name = f"profile-{case.replace('/', '-').replace(':', '')}-{sequence}x{batch}-{precision}-{graphs and 'graphs'}"
    idle = write_profile(runner, plans, profile and profile / f"{name}.txt")
    return Result(
        case=case,
        sequence=sequence,
        batch=batch,
        precision=precision,
        graphs=graphs,
        parameters=runner.parameters,
        attention_share=sum(shares) / len(shares),
        milliseconds=milliseconds,
        tokens_per_second=rate,
        model_tflops=flops * rate / 1e12,
        mfu=flops * rate / 1e12 / PEAK_TFLOPS,
        idle=idle,
        peak_gib=peak,
        loss=loss,
    )


def write_profile(runner: Runner, plans: list[Plan], path: Path | None) -> float:
    """Share of four steps without a kernel; with `path`, their kernels by share of GPU time too."""
    profile = Trace.of(lambda: runner.time(plans[:2], 4))  # the first begins with an empty queue
    if path is not None:
        path.write_text(profile.report())
    return profile.idle / profile.span


def base_of(result: Result, results: list[Result], peer: str = "gpt") -> Result | None:
    """A peer of the same shape and precision at its best setting, else that peer in bf16."""
    same = [g for g in results if (g.case, g.sequence, g.batch) == (peer, result.sequence, result.batch)]
    fitting = [g for g in same if g.precision == result.precision] or [g for g in same if g.precision == "bf16"]
    return max(fitting, key=lambda g: g.tokens_per_second, default=None)


def show(results: list[Result]) -> str:
    """Markdown table; ratios are against the peers of the same shape and precision at their best setting."""
    peers = {"gpt": "vs GPT", "mcore-gdn": "vs mcore-gdn"}
    columns = [
        "case",
        "tokens",
        "precision",
        "graphs",
        "tokens/s",
        *peers.values(),
        "model TFLOP/s",
        "MFU",
        "idle",
        "GiB",
    ]
    lines = [f"| {' | '.join([*columns, 'attention'])} |", "|---" * (len(columns) + 1) + "|"]
    for r in results:
        bases = [base_of(r, results, peer) for peer in peers]
        ratio = " | ".join("" if b is None else f"{r.tokens_per_second / b.tokens_per_second:.3f}" for b in bases)
        lines.append(
            f"| {r.case} | {r.sequence} × {r.batch} | {r.precision} | {'yes' if r.graphs else 'no'} | "
            f"{r.tokens_per_second:,.0f} | {ratio} | {r.model_tflops:.0f} | {r.mfu:.1%} | {r.idle:.1%} | "
            f"{r.peak_gib:.1f} | {r.attention_share:.2f} |"
        )
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """Bars of tokens/s against GPT of the same shape in bf16, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((r.sequence, r.batch) for r in results))
    panels = [(shape, [r for r in results if (r.sequence, r.batch) == shape]) for shape in shapes]
    panels = [(shape, rs) for shape, rs in panels if any((r.case, r.precision) == ("gpt", "bf16") for r in rs)]
    if not panels:
        return
    widths = [len(rs) for _, rs in panels]
    size = (2 + 0.55 * sum(widths), 4.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, width_ratios=widths, sharey=True, squeeze=False)
    for axis, ((sequence, batch), rs) in zip(axes[0], panels):
        base = max(r.tokens_per_second for r in rs if (r.case, r.precision) == ("gpt", "bf16"))
        colors = ["#7f7f7f" if "/" not in r.case else "#0072b2" if r.case.startswith("gdn") else "#d55e00" for r in rs]
        heights = [r.tokens_per_second / base for r in rs]
        bars = axis.bar(range(len(rs)), heights, color=colors, width=0.7)
        for bar, r in zip(bars, rs):
            bar.set_alpha(1.0 if r.graphs else 0.45)
        axis.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=8)
        labels = [r.case + ("" if r.precision == "bf16" else f" {r.precision}") for r in rs]
        axis.set_xticks(range(len(rs)), labels, rotation=55, ha="right", fontsize=8)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{sequence} × {batch}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("tokens/s against GPT in bf16 at its best (pale: launched)")
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def versions() -> dict[str, str]:
    """Of whatever takes part."""
    names = [
        *("torch", "triton", "megatron-core", "transformer-engine", "flash-attn-4", "fla-core", "flash-qla"),
        *("tilelang", "mamba-ssm", "causal-conv1d"),
    ]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"gpu": torch.cuda.get_device_name(), "date": str(datetime.date.today())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--run",
        nargs="+",
        action="append",
        metavar="WORD",
        help="SHAPE PRECISION CASE …: as 2048x16; bf16, delayed, tensorwise or blockwise; gpt, mcore-gdn, mamba, "
        "hybrid, gdn/PLAN, mamba2/PLAN, and gdn-hybrid/attention, mamba2-hybrid/attention, which ignore the plan",
    )
    parser.add_argument("--graphs", nargs="+", choices=("no", "yes"), default=["no", "yes"], help="launched, replayed")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a case")
    parser.add_argument("--profile", action="store_true", help="write the kernels of one step of every case")
    parser.add_argument("--kernels", nargs="*", default=[], metavar="PART=BACKEND")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kernels = KernelsConfig(**dict(item.split("=") for item in args.kernels))
    parallel.initialize(ParallelConfig(), seed=1)
    results: list[Result] = []
    for shape, name, *cases in args.run or DEFAULT:
        sequence, batch = map(int, shape.split("x"))
        precision = PrecisionConfig(fp8="none" if name == "bf16" else name)  # type: ignore[arg-type]
        runner, built = None, ""
        for case in cases:
            which = case.partition("/")[0]
            try:
                if which != built:
                    if runner is not None:
                        runner.close()
                    runner, built = None, which
                    runner = build(which, sequence, batch, precision, kernels)
            except RuntimeError as error:  # out of memory, or a kernel that refuses: the other cases still count
                print(f"{case} {shape} {name} failed:", str(error)[:500], flush=True)
            for graphs in (word == "yes" for word in args.graphs):
                if runner is None:  # failed to build
                    continue
                try:
                    result = measure(case, runner, name, graphs, args.steps, args.out if args.profile else None)
                except RuntimeError as error:
                    print(f"{case} {shape} {name} failed:", str(error)[:500], flush=True)
                    continue
                results.append(result)
                print(show(results).splitlines()[-1], f"loss {result.loss:.3f}", flush=True)
            found = {"versions": versions(), "results": [asdict(r) for r in results]}
            with replacing(args.out / "throughput.json") as temporary:
                temporary.write_text(json.dumps(found, indent=1))
            plot(results, args.out / "throughput.png")
        if runner is not None:
            runner.close()
    print(show(results))
    print("versions:", ", ".join(f"{name} {version}" for name, version in versions().items()))
    parallel.destroy()


if __name__ == "__main__":
    main()
