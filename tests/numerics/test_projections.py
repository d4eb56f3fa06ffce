"""Projections of one input in one autograd function, against fp64 and against each product by itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oryx_megatron.model.projections import Read, project

LENGTH, BATCH, WIDTH = 13, 3, 17
SPLITS = {
    "no queries": [],
    "attention alone": [(11, 0, LENGTH)],
    "two parts": [(11, 0, 5), (9, 5, LENGTH)],
    "one row each": [(11, 0, 1), (9, LENGTH - 1, LENGTH)],
    "a gap": [(11, 0, 4), (9, 7, LENGTH)],
    "overlapping": [(11, 0, 8), (9, 3, LENGTH)],
    "nothing": [(11, 0, 0), (9, LENGTH, LENGTH)],
    "with logits": [(11, 0, 5), (9, 5, LENGTH), (3, 0, LENGTH)],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def drawn(split: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[tuple[int, int]], list[Tensor]]:
    """Input, weights, their rows and the gradients of their outputs, the same numbers in every type."""
    generator = torch.Generator().manual_seed(1)
    whole = (23, 0, LENGTH)
    shapes = [whole, *SPLITS[split]]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).bfloat16().to(dtype)

    x, weights = draw(LENGTH, BATCH, WIDTH), [draw(width, WIDTH) for width, _, _ in shapes]
    grads = [draw(stop - start, BATCH, width) for width, start, stop in shapes]
    return x.requires_grad_(), [w.requires_grad_() for w in weights], [shape[1:] for shape in shapes], grads


def by_themselves(split: str) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Outputs and gradients in fp64."""
    x, weights, rows, grads = drawn(split, torch.float64)
    outputs = [F.linear(x[start:stop], weight) for (start, stop), weight in zip(rows, weights)]
    of_x, *of_weights = torch.autograd.grad(outputs, [x, *weights], grads)
    return outputs, of_x, of_weights


def near(found: Tensor | None, want: Tensor, tolerance: float) -> bool:
    assert found is not None
    assert found.shape == want.shape
    return bool((found.double() - want).norm() <= tolerance * want.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("split", SPLITS)
def test_equal_products_by_themselves(split: str, dtype: torch.dtype) -> None:
    want, of_x, of_weights = by_themselves(split)
    x, weights, rows, grads = drawn(split, dtype)
    outputs = project(x, list(itertools.starmap(Read, ((w, *r) for w, r in zip(weights, rows)))))
    found_x, *found_weights = torch.autograd.grad(outputs, [x, *weights], grads)
    pairs = [*zip(outputs, want), (found_x, of_x), *zip(found_weights, of_weights)]
    assert all(near(found, value, TOLERANCE[dtype]) for found, value in pairs)
    assert all(found.dtype is dtype for found, _ in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_add_up_in_fp32_buffers(dtype: torch.dtype) -> None:
    """Twice, as for two microbatches; with bf16 weights each product is exact to fp32."""
    _, of_x, of_weights = by_themselves("with logits")
    x, weights, rows, grads = drawn("with logits", dtype)
    for weight in weights:
        weight.main_grad = torch.ones_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    reads = [Read(weight, *own) for weight, own in zip(weights, rows)]
    for _ in range(2):
        x.grad = None
        torch.autograd.backward(project(x, reads, into_main_grad=True), grads)
        assert near(x.grad, of_x, TOLERANCE[dtype])
    for weight, want in zip(weights, of_weights):
        total: Any = weight
        assert near(total.main_grad, 1 + 2 * want, 1e-6)
        # The hooks of megatron-core wait for a gradient and drop it.
        assert weight.grad is not None
        assert total.grad_added_to_main_grad is True


@pytest.mark.parametrize("frozen", ["input", "weights", "the first weight", "all but the last weight"])
def test_what_does_not_train_gets_no_gradient(frozen: str) -> None:
    _, of_x, of_weights = by_themselves("with logits")
    x, weights, rows, grads = drawn("with logits", torch.float32)
    still = {"weights": weights, "the first weight": weights[:1], "all but the last weight": weights[:-1]}
    for tensor in still.get(frozen, [x]):
        tensor.requires_grad_(False)
    outputs = project(x, [Read(weight, *own) for weight, own in zip(weights, rows)])
    kept: Any = outputs[0].grad_fn
    assert (kept.saved_tensors[0] is None) == (frozen == "weights")  # the input is there for the weights' gradients
    torch.autograd.backward(outputs, grads)
    for tensor, want in zip([x, *weights], [of_x, *of_weights]):
        assert near(tensor.grad, want, 1e-5) if tensor.requires_grad else tensor.grad is None


def test_an_output_that_nobody_reads() -> None:
    x, weights, rows, grads = drawn("with logits", torch.float64)
    reads = [Read(weight, *own) for weight, own in zip(weights, rows)]
    for used in range(len(reads)):
        want = torch.autograd.grad(F.linear(x[slice(*rows[used])], weights[used]), x, grads[used])[0]
        assert near(torch.autograd.grad(project(x, reads)[used], x, grads[used])[0], want, 1e-12)


def test_gradients_that_are_no_contiguous_tensors() -> None:
    """As of a sum, which torch expands."""
    x, weights, rows, _ = drawn("with logits", torch.float64)
    outputs = project(x, [Read(weight, *own) for weight, own in zip(weights, rows)])
    found = torch.autograd.grad(sum(y.sum() for y in outputs), [x, *weights])
    alone = [F.linear(x[start:stop], weight) for (start, stop), weight in zip(rows, weights)]
    want = torch.autograd.grad(sum(y.sum() for y in alone), [x, *weights])
    assert all(near(a, b, 1e-12) for a, b in zip(found, want, strict=True))


def test_the_gradient_of_the_input_is_one_buffer() -> None:
    """It is made once, whatever number of products add to it: no other tensor of its size is."""
    x, weights, rows, grads = drawn("with logits", torch.float32)
    outputs = project(x, [Read(weight, *own) for weight, own in zip(weights, rows)])
    with torch.profiler.profile() as profiled:
        torch.autograd.grad(outputs, [x, *weights], grads)
    counted = {event.key: event.count for event in profiled.key_averages()}
    assert counted["aten::addmm_"] == len(weights) - 1
    assert not {"aten::add", "aten::add_", "aten::clone", "aten::zeros", "aten::copy_"} & counted.keys()


def test_the_first_reads_all_rows() -> None:
    x, weights, _, _ = drawn("no queries", torch.float32)
    with pytest.raises(ValueError, match="reads all 13 rows, not \\(0, 12\\)"):
        project(x, [Read(weights[0], 0, 12)])
