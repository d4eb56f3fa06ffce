"""Every kernel of ops/triton in Triton's interpreter, forward and gradients, against the same steps in plain torch.

    TRITON_INTERPRET=1 python -m pytest tests/numerics/test_triton_kernels.py

Needs Triton, which torch's wheel for CPUs does not bring (make python-3.12 has it). The interpreter takes about a
millisecond for a kernel's line, so sizes are the least that still cross every border: blocks, documents, halves of
heads. tests/gpu runs the compiled kernels.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.hf.recurrences_oryx import segments, ssd_gates, ssd_step, stepwise, with_skip
from oryx_megatron.modes import parse_plan
from oryx_megatron.ops import Rope, TokenLayout, fused, scans
from oryx_megatron.testing import fused_steps

pytestmark = [
    pytest.mark.skipif(
        not platform.installed("triton") or os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs Triton and TRITON_INTERPRET=1",
    ),
    pytest.mark.skipif(platform.has_gpu(), reason="tests/gpu runs the compiled kernels"),
    pytest.mark.usefixtures("poisoned", "small_blocks"),
]
LENGTH, BATCH, GROUPS, N, P = 11, 2, 1, 16, 32
DOCUMENTS = (0, 2, 3, 8, 11)
"""A document within reach of one tap, one that a block of 4 or 8 tokens cuts."""
PLANS = ("attention", "recurrent", "runs:a0-3,r3-9,a9-11")
BORDERS = [("runs:a0-3,r3-9,a9-11", True), ("attention", False), ("recurrent", True)]
ROPE = Rope(rope_theta=100.0)


def layout_of(plan: str, isolated: bool) -> TokenLayout:
    documents = torch.tensor(DOCUMENTS, dtype=torch.int32) if isolated else None
    return TokenLayout.of(parse_plan(plan, LENGTH, chunk=1), device=torch.device("cpu"), documents=documents)


def steps_of(**changes) -> fused.HeadSteps:
    return fused.HeadSteps(**{"silu": True, "norm": True, "rope": ROPE, "l2": True, "epsilon": 1e-5} | changes)


def compare(kernel: Callable[..., object], plain: Callable[..., object], *inputs: Tensor | None) -> None:
    """Results and gradients of all inputs, in fp32 against fp64; None stands for an input or a result left out."""

    def run(call: Callable[..., object], dtype: torch.dtype) -> list[Tensor | None]:
        given = [None if x is None else x.to(dtype).requires_grad_() for x in inputs]
        found = call(*given)
        results = list(found) if isinstance(found, tuple) else [found]
        generator = torch.Generator().manual_seed(5)
        seeds = [None if y is None else torch.randn(y.shape, generator=generator).to(y.dtype) for y in results]
        loss = sum((y * seed).sum() for y, seed in zip(results, seeds) if y is not None)
        leaves = [x for x in given if x is not None]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return [*results, *grads]

    found, wanted = run(kernel, torch.float32), run(plain, torch.float64)
    assert len(found) == len(wanted)
    for i, (x, y) in enumerate(zip(found, wanted)):
        assert (x is None) == (y is None), i
        if x is not None and y is not None:
            assert x.shape == y.shape, i
            assert (x - y).norm() <= 2e-6 * y.norm().clamp(min=1e-3), (i, ((x - y).norm() / y.norm()).item())


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("plan", "isolated"), BORDERS)
@pytest.mark.parametrize("taps", [True, False], ids=["convolution", "no convolution"])
def test_keys_and_values(plan, isolated, taps):
    """`forward_taps`, `backward_taps` and, without convolution, `forward` and `backward`."""
    layout, steps = layout_of(plan, isolated), steps_of(silu=taps)
    channels = GROUPS * (N + P)
    projected = random(LENGTH, BATCH, channels + 8, seed=0)
    conv = random(channels, fused.TAPS, seed=1) if taps else None
    norm = random(N, seed=2)

    def by(make: Callable[..., fused.KeysValues]) -> Callable[..., object]:
        return lambda x, c, n: tuple(make(x, GROUPS, (N, P), c, n, layout, steps, gated=True))

    compare(by(fused.keys_values), by(fused_steps.keys_values), projected, conv, norm)


@pytest.mark.parametrize("changes", [{"norm": False}, {"rope": None, "l2": False}], ids=["no norm", "plain"])
def test_keys_and_values_without_some_steps(changes):
    layout, steps = layout_of(PLANS[2], True), steps_of(**changes)
    channels = GROUPS * (N + P)
    projected, conv = random(LENGTH, 1, channels, seed=0), random(channels, fused.TAPS, seed=1)
    norm = random(N, seed=2) if steps.norm else None

    def by(make: Callable[..., fused.KeysValues]) -> Callable[..., object]:
        return lambda x, c, n: tuple(make(x, GROUPS, (N, P), c, n, layout, steps, gated=False))[:4]

    compare(by(fused.keys_values), by(fused_steps.keys_values), projected, conv, norm)


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("spare", [0, 3])
def test_queries(isolated, spare):
    """Two heads; `spare` rows too many, as FP8 pads them, are not read and get zero gradients."""
    layout, steps = layout_of(PLANS[2], isolated), steps_of()
    norm = random(N, seed=2)
    first = random(layout.attention + spare, BATCH, 2 * N, seed=3)
    last = random(layout.recurrent + spare, BATCH, 2 * N, seed=4)
    compare(
        lambda x, n: fused.attention_query(x, N, n, layout, steps),
        lambda x, n: fused_steps.attention_query(x, N, n, layout, steps),
        first, norm,
    )  # fmt: skip
    compare(
        lambda x: fused.recurrent_query(x, N, layout, steps),
        lambda x: fused_steps.recurrent_query(x, N, layout, steps),
        last,
    )


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("gated", [True, False])
def test_gated_norm(plan, gated):
    layout, heads = layout_of(plan, False), 2
    o_a = random(BATCH, layout.attention, heads, P, seed=0) if layout.attention else None
    o_r = random(BATCH, LENGTH, heads, P, seed=1) if layout.recurrent else None
    gate = random(LENGTH, BATCH, heads * P, seed=2) if gated else None
    compare(
        lambda a, r, g, w: fused.gated_norm(a, r, g, w, layout, 1e-5),
        lambda a, r, g, w: fused_steps.gated_norm(a, r, g, w, layout, 1e-5),
        o_a, o_r, gate, random(P, seed=3),
    )  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_rows_of_both_modes(plan):
    """`gather_rows` and `scatter_rows`."""
    layout = layout_of(plan, False)
    o_a = random(BATCH, layout.attention, 1, 24, seed=0) if layout.attention else None
    o_r = random(BATCH, LENGTH, 1, 24, seed=1) if layout.recurrent else None
    compare(lambda *o: fused.in_rows(*o, layout), lambda *o: fused_steps.in_rows(*o, layout), o_a, o_r)


@pytest.mark.parametrize("kind", ["gdn", "mamba2"])
@pytest.mark.parametrize("isolated", [True, False])
def test_gates(kind, isolated):
    """Three heads, which is no power of two; logits where softplus is its argument, or next to none."""
    layout, heads = layout_of(PLANS[2], isolated), 3
    logits = random(LENGTH, BATCH, heads * (2 if kind == "gdn" else 1), seed=0) * 12
    a_log, bias = random(heads, seed=1), random(heads, seed=2)
    compare(
        lambda x, a, b: fused.gates(x, a, b, layout, kind),
        lambda x, a, b: fused_steps.gates(x, a, b, layout, kind),
        logits, a_log, bias,
    )  # fmt: skip


def test_swiglu():
    """Also what is computed again after `discard_swiglu`."""
    act, x = fused.SwiGLU(), random(3, 2, 2 * 20, seed=0)
    compare(act, lambda x: fused_steps.swiglu(act, x), x)

    def discarded(x: Tensor) -> Tensor:
        y = act(x)
        output = y * y
        fused.discard_swiglu(y, x, output)
        return output

    compare(discarded, lambda x: fused_steps.swiglu(act, x).square(), x)


@pytest.mark.parametrize("length", [1, 63, 64, 130])
def test_ssd_scan(length):
    """Outputs, last state and all gradients against the step-by-step form, with an initial state and documents."""
    b, heads, groups, n, p = 2, 4, 2, 16, 16
    generator = torch.Generator().manual_seed(length)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    q, k, v = leaf(b, length, heads, n), leaf(b, length, groups, n), leaf(b, length, groups, p)
    dt, dt_bias, a_log, d = leaf(b, length, heads), leaf(heads), leaf(heads), leaf(heads)
    initial = leaf(b, heads, n, p)
    documents = torch.tensor([0, length // 3, length], dtype=torch.int32) if length > 3 else None
    inputs = (q, k, v, dt, dt_bias, a_log, d, initial)
    step, decay = ssd_gates(dt, dt_bias, a_log)
    o, last = stepwise(ssd_step, q, k, v, decay, step, initial, documents)
    want = with_skip(o, v, d), last
    if documents is not None:
        opens = F.pad(segments(documents, length, q.device).diff(), (1, 0)).unsqueeze(-1)
        decay = decay - opens * fused.RESET
    found = scans.ssd_scan(q, k, v, decay, step, d, initial=initial, final=True)
    seeds = [torch.randn(x.shape, generator=generator) for x in want]
    wanted = torch.autograd.grad(want, inputs, seeds, retain_graph=True)
    got = torch.autograd.grad(found, inputs, seeds)
    for x, y in zip((*found, *got), (*want, *wanted), strict=True):
        assert (x - y).norm() / y.norm() < 1e-4


def kernels() -> Iterator[str]:
    """Names of the kernels that programs launch, by file."""
    folder = Path(fused.__file__).parent / "triton"
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield f"{path.stem}.{node.name}"


def with_main_grad(weight: Tensor, begin: float) -> torch.nn.Parameter:
    """As megatron-core's data parallelism has them."""
    parameter = torch.nn.Parameter(weight.clone())
    parameter.main_grad = torch.full_like(weight, begin)
    parameter.grad_added_to_main_grad = False
    return parameter


def test_weight_gradients_are_added_to_their_fp32_buffers():
    """Twice, to what is there; frozen weights get none."""
    layout, steps = layout_of(PLANS[2], True), steps_of()
    projected = random(LENGTH, BATCH, GROUPS * (N + P), seed=0)
    logits, outputs = random(LENGTH, BATCH, 6, seed=6), random(BATCH, LENGTH, 3, P, seed=7)
    weights = {
        "conv": random(GROUPS * (N + P), fused.TAPS, seed=1),
        "key_norm": random(N, seed=2),
        "query_norm": random(N, seed=3),
        "a_log": random(3, seed=4),
        "dt_bias": random(3, seed=5),
        "out_norm": random(P, seed=8),
    }

    def loss(conv, key_norm, query_norm, a_log, dt_bias, out_norm):
        read = fused.keys_values(projected, GROUPS, (N, P), conv, key_norm, layout, steps, gated=False)
        queries = projected[: layout.attention, :, :N].contiguous()
        found = [
            *(x for x in read if x is not None),
            fused.attention_query(queries, N, query_norm, layout, steps),
            *fused.gates(logits, a_log, dt_bias, layout, "gdn"),
            fused.gated_norm(outputs[:, : layout.attention].contiguous(), outputs, None, out_norm, layout, 1e-5),
        ]
        return sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in found)

    plain = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    wanted = dict(zip(plain, torch.autograd.grad(loss(**plain), list(plain.values()))))
    given = {name: with_main_grad(weight, 0.5) for name, weight in weights.items()}
    given["key_norm"].requires_grad_(False)
    for _ in range(2):
        loss(**given).backward()
    for name, weight in given.items():
        assert weight.grad_added_to_main_grad == weight.requires_grad, name
        assert (weight.grad is None) == (not weight.requires_grad), name  # what megatron-core's hook waits for
        share = 2 * wanted[name] if weight.requires_grad else torch.zeros_like(weight)
        torch.testing.assert_close(weight.main_grad, 0.5 + share, rtol=1e-5, atol=1e-5, msg=name)


def test_no_kernel_is_left_out(monkeypatch):
    """A new kernel without a test here is named."""
    from oryx_megatron.ops.triton import heads, rows, ssd

    launched: set[str] = set()
    for module in (heads, rows, ssd):
        for name in [name for name, value in vars(module).items() if hasattr(value, "run") and name[0] != "_"]:

            class Counted:
                def __init__(self, module, name, kernel):
                    self.name, self.kernel = f"{module.__name__.rpartition('.')[2]}.{name}", kernel

                def __getitem__(self, grid):
                    launched.add(self.name)
                    return self.kernel[grid]

            monkeypatch.setattr(module, name, Counted(module, name, getattr(module, name)))
    test_keys_and_values(PLANS[2], False, True)
    test_queries(False, 0)
    test_gated_norm(PLANS[2], True)
    test_rows_of_both_modes(PLANS[2])
    test_gates("gdn", False)
    test_swiglu()
    test_weight_gradients_are_added_to_their_fp32_buffers()
    test_ssd_scan(2)
    assert launched == set(kernels())
