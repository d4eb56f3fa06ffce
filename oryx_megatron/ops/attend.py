"""Attention of the attention rows of a microbatch (ops/layout.py): queries of the tokens in attention mode alone.

Backends, best first: flash-attn-4's block-sparse kernels and FlexAttention, both with work in proportion to the share
of attention tokens, forward and backward, for any plan; torch's SDPA, one call for each run of attention tokens. Plans
without recurrent tokens take one causal call. The backends of `mode_attention`, whose tokens lie in order, gather their
queries and use the same functions.

Shapes: b batch, s keys, n queries, H query heads, G key/value heads (H % G == 0), N key width, P value width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from oryx_megatron import platform
from oryx_megatron.modes import ModePlan
from oryx_megatron.ops import backends
from oryx_megatron.ops.layout import BLOCK, BlockTable, TokenLayout
from oryx_megatron.ops.reference import mode_attention


@backends.dispatched("attention")
def attend(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
    """o = softmax(q kᵀ / √N) v of each attention row over the earlier tokens of its document.

    q [b, n, H, N] in rows; k [b, s, G, N], v [b, s, G, P] by token → o [b, n, H, P] in rows.
    """
    tokens = layout.tokens[: layout.attention].long()
    whole = q
    if layout.attention < layout.length:
        whole = q.new_zeros(q.shape[0], layout.length, *q.shape[2:]).index_copy(1, tokens, q)
    o = backends.reference_of(mode_attention)(whole, k, v, layout.plan, documents=_documents(layout))
    return o if layout.attention == layout.length else o.index_select(1, tokens)


def _documents(layout: TokenLayout) -> Tensor | None:
    if not layout.isolated:
        return None
    first = layout.starts.unique()
    return torch.cat((first, first.new_tensor([layout.length])))


# ------------------------------------------------------------------------------------------------------ flash-attn-4


@cache
def _flash4_masks() -> tuple[Any, Any]:
    """Masks of the blocks that queries meet in part: on the diagonal alone, and by tables of tokens and starts."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute import utils

    @cute.jit
    def diagonal(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        size = utils.scalar_to_ssa(BLOCK, cutlass.Int32)
        return kv_idx % size <= q_idx % size

    @cute.jit
    def table(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        token = utils.scalar_to_ssa(aux_tensors[0][q_idx[0]], cutlass.Int32)
        start = utils.scalar_to_ssa(aux_tensors[1][q_idx[0]], cutlass.Int32)
        return (kv_idx <= token) & (kv_idx >= start)

    return diagonal, table


def _flash4(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    if layout.recurrent == 0 and not layout.isolated:  # faster than cuDNN's too: docs/performance.md
        return flash_attn_func(q, k, v, causal=True)[0]

    def tables(of: BlockTable) -> Any:
        mask_count, mask_index, full_count, full_index = (x[None, None] for x in of)
        return BlockSparseTensorsTorch(mask_count, mask_index, full_count, full_index, block_size=(BLOCK, BLOCK))

    diagonal, table = _flash4_masks()
    return flash_attn_func(
        q,
        k,
        v,
        pack_gqa=False,
        mask_mod=diagonal if layout.diagonal else table,
        aux_tensors=None if layout.diagonal else [layout.query_tokens, layout.query_starts],
        block_sparse_tensors=tables(layout.keys_of_queries),
        block_sparse_tensors_bwd=tables(layout.queries_of_keys),
    )[0]


def _flash4_missing() -> str | None:
    if reason := platform.missing_package("flash_attn.cute", gpu=True):
        return "flash-attn-4 is not installed" if "installed" in reason else reason
    if platform.capability()[0] not in (9, 10):
        return "flash-attn-4's block-sparse backward needs a Hopper or Blackwell GPU"
    return None


def _flash4_declines(work: backends.Workload | None) -> str | None:
    return None if work is None else _flash4_refuses(work.dtype, (work.model.qk_head_dim, work.model.v_head_dim))


def _flash4_refuses(dtype: str, widths: tuple[int, int]) -> str | None:
    if dtype == "fp32":
        return "flash-attn-4 computes in bf16; set precision.dtype: bf16"
    if any(width % 8 or width > 128 for width in widths):
        return f"flash-attn-4 takes heads of up to 128, in eights, not {widths[0]} and {widths[1]}"
    return None


# -------------------------------------------------------------------------------------------------- FlexAttention


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
    """One compiled kernel for all plans: the queries lie by token, and blocks without attention rows are empty."""
    from torch.nn.attention.flex_attention import BlockMask

    if layout.recurrent == 0 and not layout.isolated:
        return _causal_sdpa(q, k, v)
    tokens = layout.tokens[: layout.attention].long()
    whole = q.new_zeros(q.shape[0], layout.length, *q.shape[2:]).index_copy(1, tokens, q)
    starts = layout.starts

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[query])

    mask_count, mask_index, full_count, full_index = (x[None, None] for x in layout.by_token)
    block_mask = BlockMask.from_kv_blocks(
        mask_count,
        mask_index,
        full_count,
        full_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=mask,
        seq_lengths=(layout.length, layout.length),
    )
    o = _compiled_flex()(
        whole.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=block_mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2).index_select(1, tokens)


_flex_missing = backends.package_on_gpu("triton")


# ------------------------------------------------------------------------------------------------------------- SDPA


def _causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All queries, causal: cuDNN's kernels where they serve. [b, s, H, N] → [b, s, H, P]"""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=q.shape[1] > 1,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return o.transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
    if layout.recurrent == 0 and not layout.isolated:
        return _causal_sdpa(q, k, v)
    return backends.reference_of(attend)(q, k, v, layout)


def _no_gpu() -> str | None:
    return None if platform.has_gpu() else "there is no GPU"


# ---------------------------------------------------------------------------------------------- TransformerEngine


@cache
def _te_attention(heads: int, groups: int, qk_head_dim: int, v_head_dim: int) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads, (qk_head_dim, v_head_dim), num_gqa_groups=groups, qkv_format="bshd", attn_mask_type="causal"
    )


def _te(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
    """Whole sequences by TransformerEngine, in FP8 where its recipe says so; mixed plans by the best of the others."""
    if layout.recurrent or layout.isolated:
        return _mixed(q.dtype, (q.shape[3], v.shape[3]))(q, k, v, layout)
    module = _te_attention(q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    return module(q, k, v).unflatten(-1, (q.shape[2], v.shape[3]))


def _mixed(dtype: torch.dtype, widths: tuple[int, int]) -> Any:
    """The best backend of a mixed plan beside TransformerEngine's."""
    name = "fp32" if dtype is torch.float32 else "bf16"
    if (_flash4_missing() or _flash4_refuses(name, widths)) is None:
        return _flash4
    return _flex if _flex_missing() is None else _sdpa


# --------------------------------------------------------------------------------------- the same for tokens in order


def _by_token(rows: Any) -> Any:
    """`mode_attention` by an `attend`: gather the queries of attention tokens, put the outputs where they belong."""

    def mode_attention_by_rows(
        q: Tensor, k: Tensor, v: Tensor, plan: ModePlan, *, documents: Tensor | None = None
    ) -> Tensor:
        if q.shape[1] != k.shape[1] or plan.attention_tokens == 0:  # decoding, or nothing to do
            return backends.reference_of(mode_attention)(q, k, v, plan, documents=documents)
        layout = _layout(plan, q.device, documents)
        if layout.recurrent == 0:
            return rows(q, k, v, layout)
        tokens = layout.tokens[: layout.attention].long()
        o = rows(q.index_select(1, tokens), k, v, layout)
        return o.new_zeros(*q.shape[:3], v.shape[3]).index_copy(1, tokens, o)

    return mode_attention_by_rows


_last_layout: tuple[Any, TokenLayout] | None = None


def _layout(plan: ModePlan, device: torch.device, documents: Tensor | None) -> TokenLayout:
    """Tables of the plan; layers of one microbatch ask for the same ones, one after the other."""
    global _last_layout
    key = (plan, device, None if documents is None else id(documents))
    if _last_layout is None or _last_layout[0][:3] != key or _last_layout[0][3] is not documents:
        _last_layout = ((*key, documents), TokenLayout.of(plan, device=device, documents=documents))
    return _last_layout[1]


for _name, _rows, _missing, _declines, _rank in (
    ("flash4", _flash4, _flash4_missing, _flash4_declines, 30),
    ("flex", _flex, _flex_missing, backends.serves_all, 20),
    ("sdpa", _sdpa, _no_gpu, backends.serves_all, 10),
    ("te", _te, platform.transformer_engine_missing, backends.serves_all, 5),
):
    for _function, _call in (("attend", _rows), ("mode_attention", _by_token(_rows))):
        backends.register("attention", _function, _name, _call, missing=_missing, declines=_declines, rank=_rank)
