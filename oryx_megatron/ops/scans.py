"""Fast recurrences on GPUs: the gated delta rule by flash-linear-attention, Mamba-2 by Triton kernels or mamba_ssm.

`delta_scan` and `ssd_scan` take ready gates, for the fast mixer; the backends of `gated_delta_rule` and `ssd` make the
gates from logits first. Documents are isolated by the gates alone: a decay of e⁻⁸⁰ where one opens empties the state,
so that no kernel needs a table of lengths and none is compiled for one.

Shapes: b batch, s tokens, H heads, G key/value heads (H % G == 0), N key width, P value width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from oryx_megatron import compat, platform
from oryx_megatron.hf.recurrences_oryx import STEPWISE, delta_gates, segments, ssd_gates, unit
from oryx_megatron.ops import backends
from oryx_megatron.ops.fused import RESET
from oryx_megatron.ops.layout import isolates
from oryx_megatron.ops.reference import gated_delta_rule, ssd

R = TypeVar("R")
CHUNK = 64


def delta_scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, *, initial: Tensor | None = None, final: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule for L2-normed q (scaled) [b, s, H, N] and k [b, s, G, N], v [b, s, G, P], gates [b, s, H] fp32.

    By flash-linear-attention, which hands heads of 128 in bf16 on to flash_qla where that is installed.
    Returns o [b, s, H, P] and, with `final`, the last state [b, H, N, P] fp32.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    batch, length, heads, _ = q.shape
    k, v = _per_head(k, heads), _per_head(v, heads)
    if heads % 2 and q.shape[-1] == v.shape[-1] == 128:
        # flash_qla 0.1.3 spreads 64 tokens × H gates over 128 threads: tilelang finds no layout for odd H.
        q, k, v = (F.pad(x, (0, 0, 0, 1)) for x in (q, k, v))
        decay, beta = F.pad(decay, (0, 1)), F.pad(beta, (0, 1))
        initial = None if initial is None else F.pad(initial, (0, 0, 0, 0, 0, 1))
    more: dict[str, Any] = {}
    if _leaves_gpu_idle(q, v):
        q, k, v, decay, beta = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, decay, beta))
        more["cu_seqlens"] = _bounds(batch, length, q.device)
    o, state = chunk_gated_delta_rule(
        q, k, v, g=decay, beta=beta, scale=1.0, initial_state=initial, output_final_state=final, **more
    )
    o = o.unflatten(1, (batch, length)).squeeze(0) if more else o
    return o[:, :, :heads], None if state is None else state[:, :heads]


def rehearse(batch: int, length: int, heads: int, groups: int, widths: tuple[int, int], dtype: torch.dtype) -> None:
    """`delta_scan` of this shape once, forward and backward, on random q, k (first of `widths`) and v (second).

    Meets every kernel that it needs; inside `compat.tilelang.side_by_side` they are compiled.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, length, *shape, dtype=dtype, device=platform.device(), requires_grad=True)

    q, k, v = random(heads, widths[0]), random(groups, widths[0]), random(groups, widths[1])
    gates = [torch.zeros(batch, length, heads, device=platform.device(), requires_grad=True) for _ in range(2)]
    o, _ = delta_scan(q, k, v, *gates)
    compat.torch.run_backward(o, torch.ones_like(o), [q, k, v, *gates])  # no other tensor gets a gradient


def _leaves_gpu_idle(q: Tensor, v: Tensor) -> bool:
    """Whether flash_qla computes these, and has too few sequences and heads: a program each, on half of the GPU.

    It divides sequences among programs, but only in a batch of one; there several count as one with their bounds.
    """
    batch, _, heads, width = q.shape
    return (
        batch > 1
        and 2 * batch * heads <= platform.multiprocessors()
        and width == v.shape[3] == 128
        and q.dtype in (torch.bfloat16, torch.float16)
        and platform.capability()[0] in (9, 10)
        and platform.installed("flash_qla")
    )


@cache
def _bounds(batch: int, length: int, device: torch.device) -> Tensor:
    """int32 [b + 1] where sequences begin: flash_qla keeps what it made of a tensor by its identity, for graphs too."""
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """[b, s, G, w] → [b, s, H, w]: grouped keys and values once for every query head."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def ssd_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    rate: Tensor,
    d: Tensor,
    *,
    initial: Tensor | None = None,
    final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2's recurrence for q [b, s, H, N], k [b, s, G, N], v [b, s, G, P], gates [b, s, H] fp32, d [H].

    By the kernels of ops/triton/ssd.py. Returns o [b, s, H, P] and, with `final`, the last state [b, H, N, P] fp32.
    """
    return _Scan.apply(q, k, v, decay, rate, d, initial, final)


@cache
def _columns(programs: int, width: int) -> int:
    """Columns of the state that one program carries along the sequence: fewer where batch and heads are few."""
    columns = min(width, 64)
    while columns > 16 and programs * (width // columns) < 2 * platform.multiprocessors():
        columns //= 2
    return columns


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        rate: Tensor,
        d: Tensor,
        initial: Tensor | None,
        final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        from oryx_megatron.ops.triton import ssd as kernels

        q, k, v, decay, rate = (x.contiguous() for x in (q, k, v, decay, rate))
        initial = None if initial is None else initial.float().contiguous()
        batch, length, heads, _ = q.shape
        states, last = _states(k, v, decay, rate, initial, heads, final)
        o = q.new_empty(batch, length, heads, v.shape[-1])
        sizes, chunks = _sizes(q, v), -(-length // CHUNK)
        kernels.outputs[(chunks, batch * heads)](
            q, k, v, decay, rate, d, states, o, length, heads, k.shape[2], **sizes, num_warps=4
        )
        ctx.save_for_backward(q, k, v, decay, rate, d, initial)
        ctx.set_materialize_grads(False)
        return o, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from oryx_megatron.ops.triton import ssd as kernels

        q, k, v, decay, rate, d, initial = ctx.saved_tensors
        batch, length, heads, _ = q.shape
        groups, v_head_dim = k.shape[2], v.shape[3]
        do, d_last = grads
        do = torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v_head_dim) if do is None else do
        do = do.contiguous()
        states, _ = _states(k, v, decay, rate, initial, heads, False)
        d_states = torch.empty_like(states)
        d_initial = None if initial is None else torch.empty_like(initial)
        sizes, chunks = _sizes(q, v), -(-length // CHUNK)
        columns = _columns(batch * heads, v_head_dim)
        kernels.grad_states[(v_head_dim // columns, batch * heads)](
            q, decay, rate, do, d_last, d_states, d_initial, length, heads,
            FINAL=d_last is not None, INITIAL=initial is not None, COLS=columns, **sizes, num_warps=4, num_stages=3,
        )  # fmt: skip
        dq, dk = torch.empty_like(q), torch.empty_like(q)
        dv = v.new_empty(batch, length, heads, v_head_dim)
        d_decay, d_rate = torch.empty_like(decay), torch.empty_like(rate)
        dd = decay.new_empty(batch, chunks, heads)
        grid = (chunks, batch * heads)
        kernels.grad_values[grid](
            q, k, v, decay, rate, d, d_states, do, dv, d_rate, dd, length, heads, groups, **sizes, num_warps=4
        )
        kernels.grad_keys[grid](
            q, k, v, decay, rate, states, d_states, do, dq, dk, d_decay, length, heads, groups, **sizes, num_warps=4
        )
        if groups != heads:
            dk, dv = (x.unflatten(2, (groups, -1)).sum(3) for x in (dk, dv))
        return dq, dk, dv, d_decay, d_rate, dd.sum((0, 1)).to(d.dtype), d_initial, None


def _sizes(q: Tensor, v: Tensor) -> dict[str, Any]:
    precision = "ieee" if q.dtype is torch.float32 else "tf32"
    return {"N": q.shape[-1], "P": v.shape[-1], "CHUNK": CHUNK, "PRECISION": precision}


def _states(
    k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, initial: Tensor | None, heads: int, final: bool
) -> tuple[Tensor, Tensor | None]:
    """States before every chunk [b, H, chunks, N, P] in the inputs' format, and the last one in fp32."""
    from oryx_megatron.ops.triton import ssd as kernels

    batch, length, groups, qk_head_dim = k.shape
    width = v.shape[-1]
    states = k.new_empty(batch, heads, -(-length // CHUNK), qk_head_dim, width)
    last = k.new_empty(batch, heads, qk_head_dim, width, dtype=torch.float32) if final else None
    columns = _columns(batch * heads, width)
    kernels.states[(width // columns, batch * heads)](
        k, v, decay, rate, initial, states, last, length, heads, groups,
        INITIAL=initial is not None, FINAL=final, COLS=columns, **_sizes(k, v), num_warps=4, num_stages=3,
    )  # fmt: skip
    return states, last


# ------------------------------------------------------------------------- backends of the functions that take logits


def _isolated(log_decay: Tensor, documents: Tensor | None) -> Tensor:
    """Log decays [b, s, H], less RESET where a document after the first opens."""
    if not isolates(documents):
        return log_decay
    number = segments(documents, log_decay.shape[1], log_decay.device)
    return log_decay - F.pad(number.diff(), (1, 0)).clamp(max=1).float().unsqueeze(-1) * RESET


def _delta_by_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    dt_bias: Tensor,
    a_log: Tensor,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
    final: bool = False,
    chunk: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """`gated_delta_rule` by flash-linear-attention."""
    log_decay, beta = delta_gates(a, b, dt_bias, a_log)
    return delta_scan(
        unit(q, q.shape[-1] ** -0.5).to(q.dtype),
        unit(k).to(k.dtype),
        v.contiguous(),
        _isolated(log_decay, documents),
        beta,
        initial=None if initial is None else initial.float(),
        final=final,
    )


def _ssd_by_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    *,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
    final: bool = False,
    chunk: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """`ssd` by the Triton kernels."""
    step, log_decay = ssd_gates(dt, dt_bias, a_log)
    return ssd_scan(q, k, v, _isolated(log_decay, documents), step, d, initial=initial, final=final)


def _ssd_by_mamba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    *,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
    final: bool = False,
    chunk: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """`ssd` by mamba_ssm's kernels."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    number = None
    if isolates(documents):
        number = segments(documents, q.shape[1], q.device).int().expand(q.shape[0], -1).contiguous()
    out = mamba_chunk_scan_combined(
        _per_head(v, q.shape[2]),
        dt,
        -a_log.float().exp(),
        _per_head(k, q.shape[2]),
        q,
        chunk_size=128,
        D=d.float(),
        dt_bias=dt_bias.float(),
        initial_states=None if initial is None else initial.transpose(-1, -2).to(q.dtype),
        seq_idx=number,
        dt_softplus=True,
        return_final_states=final,
    )
    return (out[0], out[1].transpose(-1, -2).float()) if final else (out, None)


def _unless_few(function: Callable[..., R], fast: Callable[..., R]) -> Callable[..., R]:
    """`fast`, but for a few tokens, as in decoding, the reference of `function`: its step-by-step form."""

    def call(q: Tensor, *args: Any, **kwargs: Any) -> R:
        serves = backends.reference_of(function) if q.shape[1] <= STEPWISE else fast
        return serves(q, *args, **kwargs)

    return call


def _fla_declines(work: backends.Workload | None) -> str | None:
    if work is not None and work.dtype == "fp32":
        return "it computes in bf16; set precision.dtype: bf16 or kernels.recurrence: reference"
    return platform.wrong_triton_for_fla(work is not None and work.model.qk_head_dim == work.model.v_head_dim == 128)


def _triton_declines(work: backends.Workload | None) -> str | None:
    if work is not None:
        for name, width in (("qk_head_dim", work.model.qk_head_dim), ("v_head_dim", work.model.v_head_dim)):
            if width not in (16, 32, 64, 128):
                return f"model.{name} {width} is not 16, 32, 64 or 128"
        available, needed = platform.shared_memory(), _most_shared_memory(work)
        if available is not None and needed > available:
            heads = f"{work.model.qk_head_dim} × {work.model.v_head_dim} in {work.dtype}"
            return f"heads of {heads} need {needed >> 10} KiB of shared memory; this GPU has {available >> 10}"
    return None


def _most_shared_memory(work: backends.Workload) -> int:
    """Bytes that the greediest kernel, grad_keys, needs: what Triton 3.7 compiles for Hopper, from widths of 32 on.

    In fp32 heads of 128 × 128 do not fit into an H100; in bf16 they need 112 KiB, more than an L40S has.
    """
    width, columns = work.model.qk_head_dim, work.model.v_head_dim
    states, keys, values = width * columns, CHUNK * width, CHUNK * columns
    if work.dtype == "fp32":
        return 4 * (3 * states + 2 * keys + 3 * values // 2 + 3 * CHUNK * CHUNK // 2)
    return 2 * (2 * states + 2 * keys + values)


for _function, _package, _fast, _declines, _rank in (
    (gated_delta_rule, "fla", _delta_by_fla, _fla_declines, 20),
    (ssd, "triton", _ssd_by_triton, _triton_declines, 20),
    (ssd, "mamba_ssm", _ssd_by_mamba, backends.serves_all, 10),
):
    backends.register(
        "recurrence",
        _function.__name__,
        _package,
        _unless_few(_function, _fast),
        missing=backends.package_on_gpu(_package),
        declines=_declines,
        rank=_rank,
    )
