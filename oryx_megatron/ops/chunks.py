"""What the chunked recurrences share: chunk layout, document masks, decay products.

Shapes: b batch, s sequence, H heads, n chunks, c tokens per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Format that states and gates are computed in: fp32, or fp64 where the input is fp64."""
    return torch.promote_types(dtype, torch.float32)


def segments(documents: Tensor, length: int, device: torch.device) -> Tensor:
    """Document number of every token [length], from cumulative starts [0, ..., length] on any device."""
    lengths = documents.to(device).diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=length)


@dataclass(frozen=True)
class Chunks:
    """A sequence of `length` tokens cut into `count` chunks of `size` tokens, the last one padded with zeros."""

    length: int
    count: int
    size: int

    @classmethod
    def of(cls, length: int, longest: int) -> Chunks:
        """As few chunks as `longest` allows, of even size: 257 tokens become 5 × 52 rather than 5 × 64."""
        count = -(-length // longest)
        return cls(length, count, -(-length // count))

    def split(self, x: Tensor) -> Tensor:
        """[b, s, H, ...] -> [b, H, n, c, ...]"""
        if missing := self.count * self.size - self.length:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
        return x.unflatten(1, (self.count, self.size)).movedim(3, 1).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """[b, H, n, c, ...] -> [b, s, H, ...]"""
        return x.movedim(1, 3).flatten(1, 2)[:, : self.length]

    def segments(self, documents: Tensor | None, device: torch.device) -> Tensor | None:
        """Document numbers [n, c]; padding belongs to the last document, so that it hands the state on."""
        if documents is None:
            return None
        numbers = segments(documents, self.length, device)
        missing = self.count * self.size - self.length
        return torch.cat((numbers, numbers[-1:].expand(missing))).view(self.count, self.size)


class _DecayProducts(torch.autograd.Function):
    """`decay_products`. Written out to keep one [c, c] tensor for the backward pass instead of four.

    Running sums and their gradients are in fp64: after one strong decay (say e^-10000) fp32 could no longer tell the
    weak ones behind it apart.
    """

    @staticmethod
    def forward(ctx, log_decay: Tensor, allowed: Tensor) -> Tensor:
        running = log_decay.double().cumsum(-1)
        difference = (running.unsqueeze(-1) - running.unsqueeze(-2)).to(log_decay.dtype)
        products = difference.masked_fill_(~allowed, -torch.inf).exp_()
        ctx.save_for_backward(products)
        return products

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (products,) = ctx.saved_tensors
        grad = grad * products
        running = grad.sum(-1, dtype=torch.float64) - grad.sum(-2, dtype=torch.float64)
        return running.flip(-1).cumsum(-1).flip(-1).to(grad.dtype), None


def decay_products(log_decay: Tensor, segment: Tensor | None) -> Tensor:
    """Product of the decays of tokens j+1 … i for j ≤ i of one segment; 0 for all other pairs.

    log_decay [..., c], at most 0; segment [n, c] or [c], or None -> [..., c, c] (row i, column j). Other pairs are
    masked before exp, which therefore never sees a positive number.
    """
    allowed = torch.ones(log_decay.shape[-1:] * 2, dtype=torch.bool, device=log_decay.device).tril()
    if segment is not None:
        allowed = allowed & (segment.unsqueeze(-1) == segment.unsqueeze(-2))
    return _DecayProducts.apply(log_decay, allowed)


def decay_from_start(log_decay: Tensor, segment: Tensor | None) -> Tensor:
    """Factor [..., n, c] by which the state before the chunk reaches each token; 0 past a document's start."""
    factor = log_decay.cumsum(-1).exp()
    if segment is None:
        return factor
    before = torch.cat((segment.new_zeros(1), segment[:-1, -1]))  # the initial state belongs to the first document
    return factor * (segment == before.unsqueeze(-1))
