"""Every backend against the fp32 references: forward and gradients, odd lengths, random plans, documents, states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oryx_megatron import ops
from oryx_megatron.errors import ConfigError
from oryx_megatron.hf.recurrences_oryx import NORM_EPSILON
from oryx_megatron.modes import ModePlan, parse_plan
from oryx_megatron.ops import TokenLayout, backends, fused

DEVICE = torch.device("cuda")
BF16 = 2e-2
"""Largest relative error (norm of the difference over the norm) of a bf16 kernel against fp32."""
PLANS = ("attention", "recurrent", "ratio:0.5", "ratio:0.1", "prefix:300", "random")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def use() -> Iterator[Callable[..., None]]:
    """Select backends until the test ends; it is skipped where one is missing."""
    with ExitStack() as stack:

        def choose(**parts: str) -> None:
            try:
                stack.enter_context(backends.use(**parts))
            except ConfigError as error:
                pytest.skip(str(error))

        yield choose


def plan_of(spec: str, length: int) -> ModePlan:
    if spec == "random":
        return ModePlan.from_mask(np.repeat(np.random.default_rng(1).random(-(-length // 37)) < 0.5, 37)[:length])
    return parse_plan(spec, length, chunk=128) if spec != "prefix:300" else parse_plan("prefix:30", length, chunk=128)


def documents_of(length: int) -> Tensor:
    return torch.tensor([0, length // 5, length // 5 + 1, 2 * length // 3, length], dtype=torch.int32, device=DEVICE)


def leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_()


def compare(
    fast: Callable[..., Sequence[Tensor | None]],
    reference: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor],
    tolerance: float = BF16,
) -> None:
    """Outputs and gradients of `fast` against `reference` on fp32 copies of the same inputs."""
    copies = [x.detach().float().requires_grad_() for x in inputs]
    found, want = fast(*inputs), reference(*copies)
    pairs = [(x, y) for x, y in zip(found, want, strict=True) if x is not None and y is not None and y.requires_grad]
    seeds = [torch.randn_like(y) for _, y in pairs]
    got = torch.autograd.grad(
        [x for x, _ in pairs], inputs, [s.to(x.dtype) for s, (x, _) in zip(seeds, pairs)], allow_unused=True
    )
    wanted = torch.autograd.grad([y for _, y in pairs], copies, seeds, allow_unused=True)
    names = [f"output {i}" for i in range(len(pairs))] + [f"gradient {i}" for i in range(len(inputs))]
    for name, x, y in zip(names, [x for x, _ in pairs] + list(got), [y for _, y in pairs] + list(wanted), strict=True):
        if y is None or y.norm() == 0:
            assert x is None or x.norm() == 0, name
            continue
        assert x is not None, name
        assert bool(x.isfinite().all()), name
        error = ((x.float() - y).norm() / y.norm()).item()
        assert error < tolerance, f"{name}: relative error {error:.4f}"


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("plan", ["attention", "ratio:0.5", "ratio:0.1", "random"])
@pytest.mark.parametrize(("length", "groups"), [(1024, 4), (1000, 2), (77, 4)])
@pytest.mark.parametrize("backend", ["te", "flash4", "flex", "sdpa"])  # TransformerEngine before torch.compile runs
def test_attention(use, backend, length, groups, plan, isolated):
    if backend == "flex" and length == 77:
        pytest.skip("FlexAttention compiles anew for every length: two are enough")
    use(attention=backend)
    documents = documents_of(length) if isolated else None
    modes = plan_of(plan, length)
    q, k, v = leaf(2, length, 4, 128), leaf(2, length, groups, 128), leaf(2, length, groups, 128)
    if modes.attention_tokens == 0:
        pytest.skip("no attention tokens at this length")
    reference = ops.mode_attention.__wrapped__
    compare(
        lambda *x: [ops.mode_attention(*x, modes, documents=documents)],
        lambda *x: [reference(*x, modes, documents=documents)],
        [q, k, v],
    )


# --------------------------------------------------------------------------------------------------------- recurrences


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "groups", "isolated"),
    [
        *((512, 4, 4, False), (1000, 4, 2, True), (63, 4, 4, False), (300, 3, 3, True), (130, 1, 1, False)),
        (2048, 4, 4, False),  # flash_qla divides each sequence among programs
        (640, 36, 36, False),  # heads enough for a program each
    ],
)
@pytest.mark.parametrize("backend", ["fla"])
def test_gated_delta_rule(use, backend, length, heads, groups, isolated, with_state):
    use(recurrence=backend)
    documents = documents_of(length) if isolated else None
    shapes = [(2, length, heads, 128), (2, length, groups, 128), (2, length, groups, 128)]
    inputs = [*(leaf(*shape) for shape in shapes), leaf(2, length, heads), leaf(2, length, heads)]
    inputs += [leaf(heads, dtype=torch.float32), leaf(heads, dtype=torch.float32)]
    if with_state:
        inputs.append(leaf(2, heads, 128, 128, scale=0.3, dtype=torch.float32))

    def run(function):
        def call(q, k, v, a, b, bias, a_log, initial=None):
            return function(
                q, k, v, a, b, dt_bias=bias, a_log=a_log, initial=initial, documents=documents, final=with_state
            )

        return call

    compare(run(ops.gated_delta_rule), run(ops.gated_delta_rule.__wrapped__), inputs, tolerance=3e-2)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("length", "groups", "isolated"), [(512, 4, False), (1000, 2, True), (63, 4, False)])
@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_ssd(use, backend, length, groups, isolated, with_state):
    if backend == "mamba_ssm" and (length != 512 or with_state):
        pytest.skip("its kernels tune themselves for a minute per shape: one is enough")
    use(recurrence=backend)
    documents = documents_of(length) if isolated else None
    shapes = [(2, length, 4, 128), (2, length, groups, 128), (2, length, groups, 128)]
    inputs = [*(leaf(*shape, scale=0.5) for shape in shapes), leaf(2, length, 4)]
    inputs += [leaf(4, dtype=torch.float32) for _ in range(3)]
    if with_state:
        inputs.append(leaf(2, 4, 128, 128, scale=0.3, dtype=torch.float32))

    def run(function):
        def call(q, k, v, dt, bias, a_log, d, initial=None):
            gates = {"dt_bias": bias, "a_log": a_log, "d": d}
            return function(q, k, v, dt, **gates, initial=initial, documents=documents, final=with_state)

        return call

    compare(run(ops.ssd), run(ops.ssd.__wrapped__), inputs, tolerance=3e-2)


@pytest.mark.parametrize("gate", [1e-4, 12.0])
@pytest.mark.parametrize("kind", ["gdn", "mamba2"])
def test_extreme_gates(use, kind, gate):
    """Decays next to 1 and next to 0 stay finite and right."""
    use(recurrence="fla" if kind == "gdn" else "triton")
    length, heads = 256, 2
    q, k, v = (leaf(1, length, heads, 128, scale=0.5) for _ in "qkv")
    logit = torch.full((1, length, heads), float(np.log(np.expm1(gate))), device=DEVICE)
    a_log, bias = torch.zeros(heads, device=DEVICE), torch.zeros(heads, device=DEVICE)
    if kind == "gdn":
        b = torch.randn(1, length, heads, device=DEVICE)
        run = lambda f: lambda q, k, v: f(q, k, v, logit, b, dt_bias=bias, a_log=a_log)[:1]  # noqa: E731
        compare(run(ops.gated_delta_rule), run(ops.gated_delta_rule.__wrapped__), [q, k, v], tolerance=3e-2)
    else:
        d = torch.ones(heads, device=DEVICE)
        run = lambda f: lambda q, k, v: f(q, k, v, logit, dt_bias=bias, a_log=a_log, d=d)[:1]  # noqa: E731
        compare(run(ops.ssd), run(ops.ssd.__wrapped__), [q, k, v], tolerance=3e-2)


# -------------------------------------------------------------------------------------------------- separate steps


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("length", "isolated", "with_state"), [(512, False, False), (333, True, False), (64, False, True)]
)
def test_convolution(use, length, isolated, with_state, activation):
    use(convolution="causal_conv1d")
    documents = documents_of(length) if isolated else None
    inputs = [leaf(2, length, 64), leaf(64, 4)]
    if with_state:
        inputs.append(leaf(2, 64, 3))

    def run(function):
        def call(x, weight, initial=None):
            more = {"initial": initial, "documents": documents, "final": with_state}
            return function(x, weight, activation=activation, **more)[:1]

        return call

    compare(run(ops.causal_conv), run(ops.causal_conv.__wrapped__), inputs)


def test_gated_norm(use):
    use(norm="fla")
    inputs = [leaf(3, 50, 4, 128), leaf(3, 50, 4, 128), leaf(128)]
    compare(lambda *x: [ops.gated_rms_norm(*x, 1e-5)], lambda *x: [ops.gated_rms_norm.__wrapped__(*x, 1e-5)], inputs)


# -------------------------------------------------------------------------------------------------------- fused steps


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, BF16)])
def test_fused_steps(plan, isolated, dtype, tolerance):
    """Keys, values, queries and the gated norm of tokens sorted by mode, against the separate steps in order."""
    if reason := fused.missing():
        pytest.skip(reason)
    s, b, heads, groups, width, eps = 500, 2, 4, 2, 128, 1e-5
    documents = documents_of(s) if isolated else None
    modes = plan_of(plan, s)
    layout = TokenLayout.of(modes, device=DEVICE, documents=documents)
    order, n = layout.tokens.long(), layout.attention
    attends = torch.from_numpy(modes.is_attention()).to(DEVICE)[None, :, None, None]
    positions = layout.identity - layout.starts
    steps = fused.HeadSteps(silu=True, norm=True, rope=ops.Rope(1e4), l2=True, epsilon=eps)
    kv, split = 2 * groups * width, groups * width
    inputs = [
        leaf(s, b, kv + heads * width, dtype=dtype),
        leaf(s, b, heads * width, dtype=dtype),
        leaf(s, b, heads * width, dtype=dtype),
        leaf(kv, 4, dtype=dtype),
        *(leaf(width, dtype=dtype) for _ in range(3)),
        *(leaf(b, s, heads, width, dtype=dtype) for _ in range(2)),
    ]

    def separate(x, x_a, x_r, conv, key_norm, query_norm, out_norm, o_a, o_r):
        y, _ = ops.causal_conv.__wrapped__(x[..., :kv].transpose(0, 1), conv, activation="silu", documents=documents)
        k, v = (part.unflatten(-1, (groups, width)) for part in y.split(split, -1))
        l2 = lambda t: t * torch.rsqrt(t.square().sum(-1, keepdim=True) + NORM_EPSILON)  # noqa: E731
        norm = lambda t, w: ops.rotary(F.rms_norm(t, w.shape, w, eps), positions, ops.Rope(1e4))  # noqa: E731
        q_a, q_r = (t.transpose(0, 1).unflatten(-1, (heads, width)) for t in (x_a, x_r))
        gate = x[..., kv:].unflatten(-1, (heads, width))
        o = torch.where(attends, o_a, o_r).transpose(0, 1)
        y = F.rms_norm(o, out_norm.shape, out_norm, eps) * F.silu(gate)
        found = [y.flatten(2)[order]]
        if n:
            found += [norm(k, key_norm), v, norm(q_a, query_norm)[:, order[:n]]]
        if n < s:
            found += [l2(k), v, torch.where(attends, 0.0, l2(q_r) * width**-0.5)]
        return found

    def fast(x, x_a, x_r, conv, key_norm, query_norm, out_norm, o_a, o_r):
        widths = (width, width)
        read = fused.keys_values(x[order].contiguous(), groups, widths, conv, key_norm, layout, steps, gated=True)
        a = o_a[:, order[:n]] if n else None
        found = [fused.gated_norm(a, o_r if n < s else None, read.gate, out_norm, layout, eps)]
        if n:
            q = fused.attention_query(x_a[order][:n], width, query_norm, layout, steps)
            found += [read.attention_keys, read.attention_values, q]
        if n < s:
            q = fused.recurrent_query(x_r[order][n:], width, layout, steps)
            found += [read.recurrent_keys, read.recurrent_values, q]
        return found

    compare(fast, separate, inputs, tolerance)


def test_swiglu():
    if reason := fused.missing():
        pytest.skip(reason)
    x = leaf(37, 2, 2 * 344)
    compare(lambda x: [fused.SwiGLU()(x)], lambda x: [F.silu(x[..., :344]) * x[..., 344:]], [x])
