"""Milliseconds of the mixer's parts alone, forward and backward.

    python benchmarks/kernels.py --sequence 2048 8192 32768 --tokens 32768 --out OUT

Their errors against fp32 references are a matter of tests/gpu/test_kernels.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.data.files import replacing
from oryx_megatron.modes import parse_plan
from oryx_megatron.ops import Rope, TokenLayout, attend, backends, fused, scans, ssd

HEADS, WIDTH, CHUNK = 16, 128, 256
Make = Callable[[], tuple[Callable[[], list[Tensor]], list[Tensor]]]


def milliseconds(call: Callable[[], object], repeat: int = 20) -> float:
    """Median of `repeat` calls after three."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeat):
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        call()
        ended.record()
        times.append((begun, ended))
    torch.cuda.synchronize()
    return sorted(begun.elapsed_time(ended) for begun, ended in times)[repeat // 2]


def both(forward: Callable[[], list[Tensor]], inputs: list[Tensor]) -> tuple[float, float]:
    """Forward and backward milliseconds."""
    outputs = forward()
    grads = [torch.randn_like(out) for out in outputs]
    f = milliseconds(forward)
    b = milliseconds(lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True, allow_unused=True))
    return f, b


def tensor(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(*shape, device="cuda", dtype=torch.float32) * scale).to(dtype).requires_grad_()


def attention_parts(sequence: int, batch: int) -> dict[str, Make]:
    shape = (batch, sequence, HEADS, WIDTH)

    def case(spec: str, backend: str) -> Make:
        def make() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
            layout = TokenLayout.of(parse_plan(spec, sequence, chunk=CHUNK), device=torch.device("cuda"))
            q = tensor(batch, layout.attention, HEADS, WIDTH)
            k, v = tensor(*shape), tensor(*shape)

            def run() -> list[Tensor]:
                with backends.use(attention=backend):
                    return [attend(q, k, v, layout)]

            return run, [q, k, v]

        return make

    def dense() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
        from flash_attn.cute.interface import flash_attn_func

        q, k, v = tensor(*shape), tensor(*shape), tensor(*shape)
        return lambda: [flash_attn_func(q, k, v, causal=True)[0]], [q, k, v]

    return {
        "cuDNN causal": case("attention", "sdpa"),
        "flash-attn-4 causal": dense,
        "flash4 ratio:0.5": case("ratio:0.5", "flash4"),
        "flash4 ratio:0.1": case("ratio:0.1", "flash4"),
        "flash4 every 2nd, unaligned": case(f"runs:r0-100,a100-{sequence}", "flash4"),
    }


def recurrence_parts(sequence: int, batch: int) -> dict[str, Make]:
    shape = (batch, sequence, HEADS, WIDTH)

    def gates() -> tuple[Tensor, Tensor]:
        decay = -F.softplus(torch.randn(batch, sequence, HEADS, device="cuda") - 2) * 4
        return decay.requires_grad_(), torch.rand(batch, sequence, HEADS, device="cuda").requires_grad_()

    def delta() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
        q, k = (F.normalize(tensor(*shape).float(), dim=-1).bfloat16().detach().requires_grad_() for _ in "qk")
        v, (decay, beta) = tensor(*shape), gates()
        return lambda: [scans.delta_scan(q, k, v, decay, beta)[0]], [q, k, v, decay, beta]

    def scan() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
        q, k, v = (tensor(*shape, scale=0.3) for _ in "qkv")
        decay, rate = gates()
        d = tensor(HEADS, dtype=torch.float32)
        return lambda: [scans.ssd_scan(q, k, v, decay, rate, d)[0]], [q, k, v, decay, rate, d]

    def mamba() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
        q, k, v = (tensor(*shape, scale=0.3) for _ in "qkv")
        dt = tensor(batch, sequence, HEADS)
        dt_bias, a_log, d = (tensor(HEADS, dtype=torch.float32) for _ in range(3))

        def run() -> list[Tensor]:
            with backends.use(recurrence="mamba_ssm"):
                return [ssd(q, k, v, dt, dt_bias=dt_bias, a_log=a_log, d=d)[0]]

        return run, [q, k, v, dt, dt_bias, a_log, d]

    return {"FLA gated delta rule": delta, "Triton SSD": scan, "mamba_ssm SSD": mamba}


def step_parts(sequence: int, batch: int) -> dict[str, Make]:
    def layout_of(spec: str) -> TokenLayout:
        return TokenLayout.of(parse_plan(spec, sequence, chunk=CHUNK), device=torch.device("cuda"))

    def keys_values(spec: str) -> Make:
        def make() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
            layout = layout_of(spec)
            projected = tensor(sequence, batch, 3 * HEADS * WIDTH)
            conv, norm = tensor(2 * HEADS * WIDTH, 4, scale=0.5), tensor(WIDTH)
            steps = fused.HeadSteps(silu=True, norm=True, rope=Rope(1e4), l2=True, epsilon=1e-5)

            def run() -> list[Tensor]:
                widths = (WIDTH, WIDTH)
                read = fused.keys_values(projected, HEADS, widths, conv, norm, layout, steps, gated=True)
                return [x for x in read[:4] if x is not None]

            return run, [projected, conv, norm]

        return make

    def query(mode: str) -> Make:
        def make() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
            layout = layout_of(mode)
            x, norm = tensor(sequence, batch, HEADS * WIDTH), tensor(WIDTH)
            steps = fused.HeadSteps(silu=True, norm=True, rope=Rope(1e4), l2=True, epsilon=1e-5)
            if mode == "attention":
                return lambda: [fused.attention_query(x, WIDTH, norm, layout, steps)], [x, norm]
            return lambda: [fused.recurrent_query(x, WIDTH, layout, steps)], [x]

        return make

    def gated_norm() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
        layout = layout_of("ratio:0.5")
        o_a = tensor(batch, layout.attention, HEADS, WIDTH)
        o_r = tensor(batch, sequence, HEADS, WIDTH)
        gate, weight = tensor(sequence, batch, HEADS * WIDTH), tensor(WIDTH)
        return lambda: [fused.gated_norm(o_a, o_r, gate, weight, layout, 1e-5)], [o_a, o_r, gate, weight]

    def gate_arithmetic() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
        layout = layout_of("ratio:0.5")
        logits = tensor(sequence, batch, 2 * HEADS)
        a_log, bias = (tensor(HEADS, dtype=torch.float32) for _ in range(2))
        return lambda: list(fused.gates(logits, a_log, bias, layout, "gdn")), [logits, a_log, bias]

    def swiglu() -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
        x = tensor(sequence, batch, 2 * 5504)
        activation = fused.SwiGLU()
        return lambda: [activation(x)], [x]

    return {
        "keys and values, both modes": keys_values("ratio:0.5"),
        "keys and values, attention": keys_values("attention"),
        "keys and values, recurrent": keys_values("recurrent"),
        "attention query, all": query("attention"),
        "recurrent query, all": query("recurrent"),
        "gated norm, both modes": gated_norm,
        "gates": gate_arithmetic,
        "SwiGLU 5504": swiglu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequence", type=int, nargs="+", default=[2048])
    parser.add_argument("--tokens", type=int, default=32768, help="tokens in all: batch = tokens / sequence")
    parser.add_argument("--only", nargs="*", default=["attention", "recurrence", "steps"])
    parser.add_argument("--skip", nargs="*", default=[], help="names of parts to leave out")
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    platform.install()
    groups = {"attention": attention_parts, "recurrence": recurrence_parts, "steps": step_parts}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for sequence in args.sequence:
        for group in args.only:
            for name, make in groups[group](sequence, args.tokens // sequence).items():
                if name in args.skip:
                    continue
                forward, inputs = make()
                times = both(forward, inputs)
                found.setdefault(name, {})[str(sequence)] = times
                print(f"{sequence:>6} {name:<32} {times[0]:7.3f} {times[1]:7.3f}", flush=True)
                del forward, inputs
                torch.cuda.empty_cache()
    with replacing(args.out / "kernels.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    print("| forward / backward, ms | " + " | ".join(map(str, args.sequence)) + " |")
    print("|---" * (1 + len(args.sequence)) + "|")
    for name, by in found.items():
        cells = (f"{by[str(s)][0]:.2f} / {by[str(s)][1]:.2f}" if str(s) in by else "" for s in args.sequence)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
