"""The causal convolution against its sum written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from oryx_megatron.hf import norm_conv_oryx
from oryx_megatron.ops import causal_conv

pytestmark = pytest.mark.usefixtures("poisoned")


def written_out(x: Tensor, weight: Tensor, initial: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
    """One document: y_t = Σ_i weight[:, i] x_{t−w+1+i}, and the last w − 1 inputs."""
    w = weight.shape[1]
    history = [*initial.unbind(2), *x.unbind(1)]  # each [b, c]
    y = torch.stack([sum(weight[:, i] * history[t + i] for i in range(w)) for t in range(x.shape[1])], 1)
    if activation == "silu":
        y = y / (1 + torch.exp(-y))
    window = torch.stack(history[len(history) - w + 1 :], 2) if w > 1 else initial
    return y, window


def random_inputs(s: int, w: int, seed: int = 0, c: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, s, c), (c, w), (2, c, w - 1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], inputs: list[Tensor]) -> None:
    """Values, and gradients of a random weighting of both results."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in want]
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y)
    gradients = (
        torch.autograd.grad(sum((x * weight).sum() for x, weight in zip(results, weights)), inputs)
        for results in (got, want)
    )
    for x, y in zip(*gradients):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("w", [1, 2, 4])
@pytest.mark.parametrize("s", [1, 2, 3, 63, 64, 257])
def test_equal_to_the_sum(s, w, activation):
    x, weight, initial = random_inputs(s, w)
    got = causal_conv(x, weight, activation=activation, initial=initial, final=True)
    assert_same(got, written_out(x, weight, initial, activation), [x, weight, initial])


def test_defaults():
    x, weight, initial = random_inputs(9, 4)
    y, window = causal_conv(x, weight)
    assert window is None
    torch.testing.assert_close(y, written_out(x, weight, torch.zeros_like(initial), None)[0])


@pytest.mark.parametrize("starts", [[0, 20], [0, 1, 2, 20], [0, 7, 19, 20], [0, 3, 18, 20], [0, 10, 20]], ids=str)
def test_documents_equal_each_alone(starts):
    x, weight, initial = random_inputs(20, 4)
    outputs, before = [], initial
    for start, stop in itertools.pairwise(starts):
        y, window = written_out(x[:, start:stop], weight, before, "silu")
        outputs.append(y)
        before = torch.zeros_like(initial)
    documents = torch.tensor(starts, dtype=torch.int32)
    got = causal_conv(x, weight, activation="silu", initial=initial, documents=documents, final=True)
    assert_same(got, (torch.cat(outputs, 1), window), [x, weight, initial])


@pytest.mark.parametrize("cuts", [[0, 1, 20], [0, 2, 5, 20], list(range(21))], ids=str)
def test_parts_with_the_window_handed_on(cuts):
    x, weight, initial = random_inputs(20, 4)
    window, outputs = initial, []
    for start, stop in itertools.pairwise(cuts):
        y, window = causal_conv(x[:, start:stop], weight, initial=window, final=True)
        outputs.append(y)
    assert_same((torch.cat(outputs, 1), window), written_out(x, weight, initial, None), [x, weight, initial])


@pytest.mark.parametrize("s", [1, 63, 257])
def test_bf16_sums_in_fp32(s):
    x, weight, initial = (tensor.detach().bfloat16() for tensor in random_inputs(s, 4, c=16))
    y, window = causal_conv(x, weight, activation="silu", initial=initial, final=True)
    want, _ = written_out(x.double(), weight.double(), initial.double(), "silu")
    assert y.dtype == window.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-5)
    single, _ = causal_conv(x.float(), weight.float(), initial=initial.float())
    torch.testing.assert_close(
        single.double(), written_out(x.double(), weight.double(), initial.double(), None)[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("s", [3, 8, 30])
def test_windows_of_rows_of_different_lengths(s):
    """`counts`: a row's window is that of its first tokens alone, in sums over taps (s ≤ 8) and as a convolution."""
    x, weight, initial = random_inputs(s, 4)
    counts = torch.tensor([s, s // 3])
    y, window = norm_conv_oryx.causal_conv(x, weight, initial=initial, counts=counts)
    for row, count in enumerate(counts.tolist()):
        here = (x[row : row + 1, :count], weight, initial[row : row + 1])
        want_y, want_window = written_out(*here, None)
        torch.testing.assert_close(y[row : row + 1, :count], want_y)
        torch.testing.assert_close(window[row : row + 1], want_window, rtol=0, atol=0)
