"""Where the tokens of a microbatch lie in memory while a fast mixer runs, and the tables that its kernels read.

Everything outside the mixers acts on tokens one by one, so the tokens of a microbatch may lie in any order. The fast
path sorts them by mode, attention tokens first. Then the rows that need an attention query are one contiguous block,
and so are those that need a recurrent query: neither projection is computed for a row that nobody reads, and nothing is
gathered or scattered for it. The kernels inside the mixer look up each token's row.

    token: place in the sequence, 0 … s − 1        row: place in memory        tables: int32 tensors on the device
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.hf.rotary_oryx import Rope
from oryx_megatron.modes import Mode, ModePlan

BLOCK = 128
"""Queries and keys per block of the block-sparse attention kernels."""


def isolates(documents: Tensor | None) -> TypeGuard[Tensor]:
    """Whether cumulative starts [0, …, s] are of more than one document."""
    return documents is not None and len(documents) > 2


class BlockTable(NamedTuple):
    """For every block on one side, how many blocks on the other side it meets, and which (int32, unused places last).

    A `mask` block needs the mask for each pair of a query and a key, in a `full` block every pair counts.
    """

    mask_count: Tensor
    mask_index: Tensor
    full_count: Tensor
    full_index: Tensor


@dataclass(eq=False)
class TokenLayout:
    """Order of one microbatch's tokens in memory, for one plan; equal for all sequences of the microbatch."""

    plan: ModePlan
    tokens: Tensor
    """[s] token of each row."""
    rows: Tensor
    """[s] row of each token."""
    starts: Tensor
    """[s] first token of each token's document; 0 everywhere when documents are joined."""
    isolated: bool
    """Whether there is more than one document."""
    ordered: bool
    """Whether the rows lie in the order of the tokens."""
    _rotary: dict[tuple[Rope, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _shards: dict[int, TokenLayout] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, plan: ModePlan, *, device: torch.device, documents: Tensor | None = None) -> TokenLayout:
        """Sort the tokens of `plan` by mode; `documents`: cumulative starts [0, …, s] or None.

        Attention blocks lie from the last to the first one: a late block sees more keys, and the longest work should
        start first. Built on the host from the plan's runs and sent in one copy.
        """
        tables = platform.to_device(cls.tables_of(plan, documents), device)
        ordered = plan.attention_tokens in (0, plan.length)
        return cls(plan, *tables.unbind(0), isolated=isolates(documents), ordered=ordered)  # type: ignore[misc, arg-type]

    @staticmethod
    def tables_of(plan: ModePlan, documents: Tensor | None = None) -> Tensor:
        """`tokens`, `rows` and `starts` of a plan's layout, int32 [3, s] on the host."""
        attends = plan.is_attention()
        attention, recurrent = np.flatnonzero(attends), np.flatnonzero(~attends)
        if len(recurrent) and len(attention) % BLOCK == 0:
            attention = attention.reshape(-1, BLOCK)[::-1].reshape(-1)
        tokens = np.concatenate((attention, recurrent))
        rows = np.empty_like(tokens)
        rows[tokens] = np.arange(len(tokens))
        starts = np.zeros_like(tokens)
        if isolates(documents):
            bounds = documents.cpu().numpy()
            starts = np.repeat(bounds[:-1], np.diff(bounds))
        return torch.from_numpy(np.stack((tokens, rows, starts)).astype(np.int32))

    @staticmethod
    def shape_of(plan: ModePlan, documents: Tensor | None = None) -> tuple[int, bool, bool]:
        """All that host code branches on (`attention`, `isolated`, `diagonal`).

        Layouts of one shape launch the same kernels on other tables.
        """
        isolated = isolates(documents)
        return plan.attention_tokens, isolated, not isolated and _in_blocks(plan)

    def in_mode(self, mode: Mode) -> TokenLayout:
        """The same rows, read as all in one mode: for a layer that ignores the plan. Shares this layout's tables."""
        return self._with(mode, self.tokens, self.rows, ordered=self.ordered)

    @cached_property
    def in_order(self) -> TokenLayout:
        """The tokens of `in_mode` in the order of the sequence, all of them attention rows."""
        return self._with(Mode.ATTENTION, self.identity, self.identity, ordered=True)

    def _with(self, mode: Mode, tokens: Tensor, rows: Tensor, *, ordered: bool) -> TokenLayout:
        plan = ModePlan.uniform(mode, self.length)
        return TokenLayout(
            plan, tokens, rows, self.starts, self.isolated, ordered, _rotary=self._rotary, _shards=self._shards
        )

    @property
    def length(self) -> int:
        """Tokens s of a sequence."""
        return self.plan.length

    @property
    def attention(self) -> int:
        """Tokens in attention mode: they are the first rows."""
        return self.plan.attention_tokens

    @property
    def recurrent(self) -> int:
        """Tokens in recurrent mode: they are the last rows."""
        return self.length - self.attention

    @cached_property
    def identity(self) -> Tensor:
        """0 … s − 1, for kernels that take a table where there is nothing to look up."""
        return torch.arange(self.length, dtype=torch.int32, device=self.tokens.device)

    @cached_property
    def opens_document(self) -> Tensor | None:
        """[s] True at the first token of every document but the first; None when documents are joined."""
        return (self.starts == self.identity) & (self.identity > 0) if self.isolated else None

    def arrange(self, x: Tensor) -> Tensor:
        """[b, s] in the order of tokens → in the order of rows."""
        if self.ordered:
            return x
        return x.index_select(1, self.tokens)

    def restore(self, x: Tensor) -> Tensor:
        """[b, s] in the order of rows → in the order of tokens."""
        return x if self.ordered else x.index_select(1, self.rows)

    def shard(self, size: int) -> TokenLayout:
        """That of s/size rows of one mode: for what a context-parallel rank does with its rows whatever their mode."""
        if size not in self._shards:
            plan = ModePlan.uniform(Mode.ATTENTION, self.length // size)
            self._shards[size] = TokenLayout.of(plan, device=self.tokens.device)
        return self._shards[size]

    def rotary(self, rope: Rope, width: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [s, width / 2] of each token's angles, fp32; positions restart at every document."""
        if (rope, width) not in self._rotary:
            self._rotary[rope, width] = rope.tables(self.identity - self.starts, width, torch.float32)
        return self._rotary[rope, width]

    @cached_property
    def query_tokens(self) -> Tensor:
        """Tokens of the attention rows, the last one repeated up to a whole number of blocks."""
        tokens = self.tokens[: self.attention]
        missing = -self.attention % BLOCK
        return torch.cat((tokens, tokens[-1:].expand(missing))) if missing else tokens.contiguous()

    @cached_property
    def query_starts(self) -> Tensor:
        """First visible token of each of `query_tokens`."""
        return self.starts[self.query_tokens]

    @cached_property
    def diagonal(self) -> bool:
        """Whether every block of attention rows is one block of neighbouring tokens, and documents are joined.

        Then a block of queries meets exactly one block of keys in part, its own, and the mask needs no table.
        """
        return not self.isolated and _in_blocks(self.plan)

    @cached_property
    def _visible(self) -> tuple[Tensor, Tensor]:
        return _met(self.query_tokens.view(-1, BLOCK), self.query_starts.view(-1, BLOCK), self.length)

    @cached_property
    def by_token(self) -> BlockTable:
        """For every block of tokens in order, the blocks of keys that its attention tokens meet."""
        blocks, padded = -(-self.length // BLOCK), -self.length % BLOCK
        tokens, starts = self.identity, self.starts
        if padded:
            tokens, starts = (torch.cat((x, x[-1:].expand(padded))) for x in (tokens, starts))
        used = torch.zeros(blocks, dtype=torch.bool, device=tokens.device)
        used[self.tokens[: self.attention] // BLOCK] = True
        mask, full = _met(tokens.view(-1, BLOCK), starts.view(-1, BLOCK), self.length)
        return _table(mask & used[:, None], full & used[:, None])

    @cached_property
    def keys_of_queries(self) -> BlockTable:
        """For every block of attention rows, the blocks of keys that it meets."""
        return _table(*self._visible)

    @cached_property
    def queries_of_keys(self) -> BlockTable:
        """For every block of keys, the blocks of attention rows that meet it."""
        mask, full = self._visible
        return _table(mask.T, full.T)


def around(part: Tensor, shape: torch.Size) -> Tensor:
    """The buffer of this shape whose last columns `part` already is, else a new one with `part` copied in.

    The output norm's backward pass writes the gate's gradient where the whole projection's will lie, which saves a
    concatenation; whether autograd handed that very tensor on is checked here.
    """
    offset, count = shape[-1] - part.shape[-1], shape.numel()
    strides = tuple(shape[i + 1 :].numel() for i in range(len(shape)))
    inside = part.untyped_storage().nbytes() == count * part.element_size()
    if inside and part.stride() == strides and part.storage_offset() == offset:
        return part.as_strided(shape, strides, 0)
    whole = part.new_empty(shape)
    whole[..., offset:] = part
    return whole


def _in_blocks(plan: ModePlan) -> bool:
    return all(run.start % BLOCK == 0 == run.stop % BLOCK for run in plan.attention_runs())


def _met(tokens: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """For queries [blocks, BLOCK]: blocks of keys [blocks, key blocks] with some visible pairs, and with all."""
    first = torch.arange(0, length, BLOCK, dtype=torch.int32, device=tokens.device)
    last = first + BLOCK - 1  # past the end in a cut-off block, which is therefore never full
    some = (first <= tokens.amax(1, keepdim=True)) & (last >= starts.amin(1, keepdim=True))
    full = (last <= tokens.amin(1, keepdim=True)) & (first >= starts.amax(1, keepdim=True))
    return some & ~full, full


def _table(mask: Tensor, full: Tensor) -> BlockTable:
    def lists(met: Tensor) -> tuple[Tensor, Tensor]:
        index = met.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
        # Not contiguous(), which leaves a single column with the strides that it had; flash-attn-4 reads the last one.
        return met.sum(1, dtype=torch.int32), index.int().clone(memory_format=torch.contiguous_format)

    return BlockTable(*lists(mask), *lists(full))
