"""Training throughput on one GPU: Oryx against megatron-core's GPT and Mamba models of the same size, in one run.

    python benchmarks/train_throughput.py --run 2048x16 bf16 gpt gdn/drawn --run 8192x4 bf16 gpt gdn/ratio:0.5 --out OUT

Every case is a whole step: forward, backward, gradient clipping and the distributed optimizer, on random tokens, one
microbatch a step, nothing recomputed. Model FLOPs are those that the plan needs (`oryx_megatron.arch`: 2 per multiply
and add, causal attention over (s + 1) / 2 tokens, the recurrence step by step), times 3 for a training step.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import gzip
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from oryx_megatron import arch, parallel, platform
from oryx_megatron.config import load_model
from oryx_megatron.config.schema import (
    DataConfig,
    KernelsConfig,
    ModelConfig,
    ModesConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from oryx_megatron.data.files import replacing
from oryx_megatron.model import build_model
from oryx_megatron.model.config import transformer_config
from oryx_megatron.modes import ModePlan, draw_plan, parse_plan
from oryx_megatron.ops import backends
from oryx_megatron.train.optimizer import build_optimizer, connect, optimizer_step, wrap
from oryx_megatron.train.step import Microbatch, forward_microbatch

PEAK_TFLOPS = 989.0
"""Dense bf16 rate of one H100 or H200 (SXM) by its data sheet; MFU is against this, for FP8 too."""
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace's events that occupy the GPU."""
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
    parameters: int
    attention_share: float
    milliseconds: float
    tokens_per_second: float
    model_tflops: float
    mfu: float
    peak_gib: float
    loss: float


def run_config(model: ModelConfig, sequence: int, batch: int, precision: PrecisionConfig) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=sequence, tokenizer="none"),
        train=TrainConfig(iterations=1000, global_batch_size=batch, micro_batch_size=batch),
        output_dir="none",
        precision=precision,
        parallel=ParallelConfig(),
    )


def plans_of(spec: str, sequence: int) -> list[ModePlan]:
    """Plans of the steps of a case, in turn."""
    if spec != "drawn":
        return [parse_plan(spec, sequence, chunk=CHUNK)]
    draw = partial(draw_plan, ModesConfig(chunk=CHUNK), seed=1234, microbatch=0, length=sequence)
    return [draw(iteration=i) for i in range(DRAWS)]


def random_batch(model: ModelConfig, sequence: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    device = platform.device()
    tokens = torch.randint(0, model.vocab_size, (batch, sequence + 1), device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(batch, sequence, device=device)


def plain_microbatch(batches: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Forward step of megatron-core's own models."""
    tokens, labels, mask = next(batches)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    losses = model(tokens, positions, None, labels=labels)

    def total(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss = (output.float() * mask).sum()
        return loss, mask.sum().to(torch.int), {"totals": torch.stack((loss.detach(), mask.sum()))}

    return losses, total


class Runner:
    """A model with its optimizer, and one training step."""

    def __init__(self, run: RunConfig, chunks: list[Any], forward: Callable[..., Any]) -> None:
        self.run, self.forward = run, forward
        self.parameters = sum(p.numel() for p in chunks[0].parameters())
        self.chunks = wrap(run, chunks)
        self.optimizer = build_optimizer(run, self.chunks)
        connect(run, self.chunks, self.optimizer)
        self.batch = random_batch(run.model, run.data.sequence_length, run.train.micro_batch_size)

    def close(self) -> None:
        """Let go of the memory: config, optimizer and wrapper hold each other in a way that Python does not find."""
        config = get_model_config(self.chunks[0])
        config.grad_scale_func = config.finalize_model_grads_func = None
        self.chunks, self.optimizer = [], None
        gc.collect()
        torch.cuda.empty_cache()
        if (left := torch.cuda.memory_allocated()) > 2**30:
            print(f"{left / 2**30:.1f} GiB of the last model are still held: peak memory counts them", flush=True)

    def step(self, plan: ModePlan | None) -> Tensor:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batch = self.batch if plan is None else Microbatch(*self.batch, plan)
        reports = get_forward_backward_func()(
            forward_step_func=self.forward,
            data_iterator=iter([batch]),
            model=self.chunks[0],
            num_microbatches=1,
            seq_length=self.run.data.sequence_length,
            micro_batch_size=self.run.train.micro_batch_size,
            forward_only=False,
        )
        optimizer_step(self.optimizer, loss=1.0)
        return reports[0]["totals"]

    def time(self, plans: list[ModePlan | None], steps: int) -> tuple[float, float]:
        """Mean milliseconds of a step over whole rounds of the plans, and the last loss per token."""
        rounds = max(1, -(-steps // len(plans)))
        torch.cuda.synchronize()
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        for _ in range(rounds):
            for plan in plans:
                totals = self.step(plan)
        ended.record()
        torch.cuda.synchronize()
        loss = float(totals[0] / totals[1])
        return begun.elapsed_time(ended) / (rounds * len(plans)), loss


# -------------------------------------------------------------------------------------------------------- the models


def oryx(mixer: str, sequence: int, batch: int, precision: PrecisionConfig, kernels: KernelsConfig) -> Runner:
    model = load_model(f"1.4b-{mixer}")
    backends.select(kernels, backends.Workload(model, precision.dtype))
    print("kernels:", backends.describe(), flush=True)
    run = run_config(model, sequence, batch, precision)
    return Runner(run, build_model(model, run.parallel, precision, seed=1), forward_microbatch)


def _finish(model: torch.nn.Module) -> torch.nn.Module:
    """What megatron-core's initialisation would do, and the weight gradients where Oryx puts them too."""
    from oryx_megatron.model.te import accumulate_into_main_gradients

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
            elif "norm" in name:
                parameter.fill_(1.0)
    accumulate_into_main_gradients(model)
    return model


def gpt(sequence: int, batch: int, precision: PrecisionConfig) -> Runner:
    """megatron-core's GPT with TransformerEngine and every fusion it offers, of the 1.4b presets' size."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    preset = load_model("1.4b-transformer")
    run = run_config(preset, sequence, batch, precision)
    config = transformer_config(
        preset,
        run.parallel,
        precision,
        fused_mixer=False,
        use_te_activation_func=False,
        bias_activation_fusion=True,
        apply_rope_fusion=True,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=preset.vocab_size,
        max_sequence_length=sequence,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    return Runner(run, [_finish(model)], plain_microbatch)


MAMBA_FFN = 4800
"""SwiGLU width that gives 24 Mamba-2 + MLP layers of 2048 the size of the 1.4b presets."""


def mamba(sequence: int, batch: int, precision: PrecisionConfig, *, attention_every: int = 0) -> Runner:
    """megatron-core's Mamba-2 + MLP, or its hybrid with one attention layer in every `attention_every`."""
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.core.models.mamba.mamba_model import MambaModel

    preset = replace(load_model("1.4b-transformer"), ffn_hidden_size=MAMBA_FFN)
    mixers = ["*" if attention_every and (i + 1) % attention_every == 0 else "M" for i in range(preset.num_layers)]
    run = run_config(preset, sequence, batch, precision)
    config = transformer_config(
        preset,
        run.parallel,
        precision,
        fused_mixer=False,
        use_te_activation_func=False,
        bias_activation_fusion=True,
        apply_rope_fusion=True,
        num_layers=2 * preset.num_layers,
    )
    model = MambaModel(
        config=config,
        mamba_stack_spec=mamba_stack_spec,
        vocab_size=preset.vocab_size,
        max_sequence_length=sequence,
        hybrid_override_pattern="".join(f"{mixer}-" for mixer in mixers),
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope" if attention_every else "none",
    )
    return Runner(run, [_finish_mamba(model)], plain_microbatch)


def _finish_mamba(model: torch.nn.Module) -> torch.nn.Module:
    """`_finish`, with dt_bias and D as their module gave them, A in 1 … 16 and small convolutions."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(("dt_bias", ".D"))}
    _finish(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])
            elif name.endswith("A_log"):
                parameter.uniform_(1, 16).log_()
            elif "conv1d" in name:
                parameter.uniform_(-0.5, 0.5)
    return model


def build(which: str, sequence: int, batch: int, precision: PrecisionConfig, kernels: KernelsConfig) -> Runner:
    if which == "gpt":
        return gpt(sequence, batch, precision)
    if which in ("mamba", "hybrid"):
        return mamba(sequence, batch, precision, attention_every=6 if which == "hybrid" else 0)
    return oryx(which, sequence, batch, precision, kernels)


# ---------------------------------------------------------------------------------------------------------- one case


def model_flops(case: str, sequence: int, shares: list[float]) -> float:
    """FLOPs per token of a training step, the mean over a case's plans."""
    name, _, _ = case.partition("/")
    if name in ("gdn", "mamba2"):
        model = load_model(f"1.4b-{name}")
        return sum(arch.training_flops_per_token(model, sequence, share) for share in shares) / len(shares)
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


def measure(case: str, runner: Runner, precision: str, steps: int, profile: Path | None) -> Result:
    sequence, batch = runner.run.data.sequence_length, runner.run.train.micro_batch_size
    _, _, spec = case.partition("/")
    plans: list[ModePlan | None] = list(plans_of(spec, sequence)) if spec else [None]
    begun = time.perf_counter()
    runner.time(plans[: min(len(plans), 4)], 2)  # compiles and warms up
    torch.cuda.reset_peak_memory_stats()
    print(f"{case}: warm after {time.perf_counter() - begun:.0f} s", flush=True)
    milliseconds, loss = runner.time(plans, steps)
    shares = [1.0 if plan is None else plan.attention_share for plan in plans]
    flops = model_flops(case, sequence, shares)
    rate = sequence * batch / milliseconds * 1e3
    if profile is not None:
        name = case.replace("/", "-").replace(":", "")
        write_profile(runner, plans, profile / f"profile-{name}-{sequence}-{precision}.txt")
    return Result(
        case=case,
        sequence=sequence,
        batch=batch,
        precision=precision,
        parameters=runner.parameters,
        attention_share=sum(shares) / len(shares),
        milliseconds=milliseconds,
        tokens_per_second=rate,
        model_tflops=flops * rate / 1e12,
        mfu=flops * rate / 1e12 / PEAK_TFLOPS,
        peak_gib=platform.peak_memory_bytes() / 2**30,
        loss=loss,
    )


def write_profile(runner: Runner, plans: list[ModePlan | None], path: Path) -> None:
    """Kernels of one step by their share of GPU time, the time without any, and a trace (chrome://tracing)."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        runner.time(plans[:1], 1)
    trace = path.with_suffix(".trace.json.gz")
    profiler.export_chrome_trace(str(trace))
    kernels = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    span, idle, count = gpu_time(trace)
    lines = [f"{span:.1f} ms from the first kernel to the last of {count}, {idle:.1f} ms without one"]
    lines += [f"{'ms':>9} {'calls':>6}  kernel"]
    lines += [f"{e.self_device_time_total / 1e3:9.3f} {e.count:6d}  {e.key[:150]}" for e in kernels[:80]]
    path.write_text("\n".join(lines) + "\n")


def gpu_time(trace: Path) -> tuple[float, float, int]:
    """Milliseconds of a trace from its first kernel (or copy) to its last, those of them without any, and how many."""
    with gzip.open(trace) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("cat") in GPU_WORK]
    events.sort(key=lambda event: event["ts"])
    first = end = events[0]["ts"]
    idle = 0.0
    for event in events:
        idle += max(0.0, event["ts"] - end)
        end = max(end, event["ts"] + event["dur"])
    return (end - first) / 1e3, idle / 1e3, len(events)


def show(results: list[Result]) -> str:
    """Markdown table; the ratio is against GPT of the same shape and precision, then against GPT in bf16."""
    head = "| case | tokens | precision | tokens/s | vs GPT | model TFLOP/s | MFU | peak GiB | attention share |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for r in results:
        same = [g for g in results if (g.case, g.sequence, g.batch) == ("gpt", r.sequence, r.batch)]
        base = next((g for g in same if g.precision == r.precision), same[0] if same else None)
        ratio = "" if base is None else f"{r.tokens_per_second / base.tokens_per_second:.3f}"
        lines.append(
            f"| {r.case} | {r.sequence} × {r.batch} | {r.precision} | {r.tokens_per_second:,.0f} | {ratio} | "
            f"{r.model_tflops:.0f} | {r.mfu:.1%} | {r.peak_gib:.1f} | {r.attention_share:.2f} |"
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
        base = next(r for r in rs if (r.case, r.precision) == ("gpt", "bf16"))
        colors = ["#7f7f7f" if "/" not in r.case else "#0072b2" if r.case.startswith("gdn") else "#d55e00" for r in rs]
        heights = [r.tokens_per_second / base.tokens_per_second for r in rs]
        bars = axis.bar(range(len(rs)), heights, color=colors, width=0.7)
        axis.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=8)
        labels = [r.case + ("" if r.precision == "bf16" else f" {r.precision}") for r in rs]
        axis.set_xticks(range(len(rs)), labels, rotation=55, ha="right", fontsize=8)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{sequence} × {batch}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("tokens/s against GPT in bf16")
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
        help="SHAPE PRECISION CASE …: as 2048x16; bf16, delayed, tensorwise or blockwise; gpt, mamba, hybrid, "
        "gdn/PLAN, mamba2/PLAN",
    )
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
                if runner is None:  # failed to build before
                    continue
                result = measure(case, runner, name, args.steps, args.out if args.profile else None)
            except RuntimeError as error:  # out of memory, or a kernel that refuses: the other cases still count
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
