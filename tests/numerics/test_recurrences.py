"""Chunked = step-by-step = the equations written out (tests/numerics/written_out.py), forward and gradients."""

from __future__ import annotations

import functools
import itertools
import unittest.mock
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from written_out import (
    CASES,
    HEADS,
    TOKENS,
    VARIANTS,
    call,
    extremes,
    gdn_quadratic,
    part,
    random_inputs,
    recurrence,
    ssd_quadratic,
)

from oryx_megatron.hf import recurrences_oryx
from oryx_megatron.hf.recurrences_oryx import decay_sums
from oryx_megatron.ops import gated_delta_rule, ssd

pytestmark = pytest.mark.usefixtures("poisoned")
EITHER = {"mamba2": ssd, "gdn": gated_delta_rule}


def form(stepwise: int) -> dict[str, Callable[..., tuple[Tensor, Tensor | None]]]:
    """Both recurrences, step by step up to so many tokens, in chunks above."""

    def forced(function, *args, **kwargs):
        with unittest.mock.patch.object(recurrences_oryx, "STEPWISE", stepwise):
            return function(*args, **kwargs)

    return {variant: functools.partial(forced, function) for variant, function in EITHER.items()}


CHUNKED, STEPWISE = form(0), form(10**9)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
"""Largest error, relative to the largest value of the tensor."""


def with_gradients(
    run: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Results of `run`, and the gradients of a fixed random weighting of them, by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    results = run(leaves)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    loss = sum((x * weight).sum() for x, weight in zip(results, weights))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"result {i}": x.detach() for i, x in enumerate(results)}
    return named | {f"gradient of {name}": x for name, x in zip(leaves, gradients)}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert x.isfinite().all(), name
        error = (x.double() - want[name]).abs().max().item()
        assert error <= tolerance * max(1.0, want[name].abs().max().item()), f"{name}: {error}"


def to(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("s", [1, 63, 64, 257])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_the_equations(variant, s, dtype):
    inputs = random_inputs(variant, s, seed=s)
    want = with_gradients(lambda x: recurrence(variant, x), inputs)
    for function, options in ((CHUNKED, {}), (CHUNKED, {"chunk": 16}), (STEPWISE, {})):
        got = with_gradients(
            lambda x, f=function, o=options: call(f[variant], variant, x, final=True, **o), to(inputs, dtype)
        )
        assert_equal(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("variant", "s", "quadratic"),
    [("mamba2", 63, ssd_quadratic), ("mamba2", 257, ssd_quadratic), ("gdn", 21, gdn_quadratic)],
)
def test_equal_to_the_dense_quadratic_form(variant, s, quadratic):
    inputs = random_inputs(variant, s, seed=1)
    want = with_gradients(lambda x: (quadratic(x),), inputs)
    for function, options in ((CHUNKED, {"chunk": 8}), (STEPWISE, {})):
        got = with_gradients(lambda x, f=function, o=options: call(f[variant], variant, x, **o)[:1], inputs)
        assert_equal(got, want, TOLERANCE[torch.float64])


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    """Every hand-written backward pass against finite differences, documents included."""
    inputs = random_inputs(variant, 11, seed=2, b=1, heads=2, groups=1, n=3, p=2)
    documents = torch.tensor([0, 3, 8, 11], dtype=torch.int32)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, values))
        return call(CHUNKED[variant], variant, named, documents=documents, final=True, chunk=4)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_short_length(variant):
    """The public function changes from steps to chunks somewhere here."""
    for s in range(1, 20):
        inputs = random_inputs(variant, s, seed=s, b=1)
        got = call(EITHER[variant], variant, inputs, final=True, chunk=8)
        for x, want in zip(got, recurrence(variant, inputs)):
            torch.testing.assert_close(x, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_defaults(variant):
    """Without an initial state it is zero; without `final` there is none."""
    inputs = random_inputs(variant, 70, seed=3)
    want = recurrence(variant, inputs | {"initial": torch.zeros_like(inputs["initial"])})[0]
    del inputs["initial"]
    for function in (CHUNKED, STEPWISE):
        o, state = call(function[variant], variant, inputs)
        assert state is None
        torch.testing.assert_close(o, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cut", [1, 5, 64, 100, 149])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_parts_with_the_state_handed_on(variant, cut):
    inputs = random_inputs(variant, 150, seed=cut)

    def in_two(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        first, state = call(EITHER[variant], variant, part(variant, x, 0, cut), final=True)
        second, state = call(EITHER[variant], variant, part(variant, x, cut, 150) | {"initial": state}, final=True)
        return torch.cat((first, second), 1), state

    want = with_gradients(lambda x: call(EITHER[variant], variant, x, final=True), inputs)
    assert_equal(with_gradients(in_two, inputs), want, TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    "starts", [[0, 150], [0, 1, 2, 64, 65, 128, 150], [0, 40, 70, 149, 150], [0, 100, 150], [0, 64, 128, 150]], ids=str
)
@pytest.mark.parametrize("function", [CHUNKED, STEPWISE], ids=["chunked", "stepwise"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_equal_each_alone(variant, function, starts):
    inputs = random_inputs(variant, 150, seed=4)

    def alone(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        outputs = []
        for start, stop in itertools.pairwise(starts):
            first = x["initial"] if start == 0 else torch.zeros_like(x["initial"])
            o, state = recurrence(variant, part(variant, x, start, stop) | {"initial": first})
            outputs.append(o)
        return torch.cat(outputs, 1), state

    documents = torch.tensor(starts, dtype=torch.int32)
    got = with_gradients(lambda x: call(function[variant], variant, x, documents=documents, final=True), inputs)
    assert_equal(got, with_gradients(alone, inputs), TOLERANCE[torch.float64])


def test_random_lengths_and_documents():
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        variant = VARIANTS[seed % 2]
        s, chunk = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((9, 90), (1, 40)))
        inside = (torch.rand(s - 1, generator=generator) < 0.1).nonzero().flatten() + 1
        documents = torch.cat((torch.tensor([0]), inside, torch.tensor([s]))).int()
        inputs = random_inputs(variant, s, seed=seed, b=1, heads=3, groups=1)
        options = {"documents": documents, "final": True}
        want = with_gradients(lambda x, v=variant, o=options: call(STEPWISE[v], v, x, **o), inputs)
        got = with_gradients(lambda x, v=variant, o=options, c=chunk: call(CHUNKED[v], v, x, chunk=c, **o), inputs)
        assert_equal(got, want, TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    ("variant", "case"), [*itertools.product(VARIANTS, CASES), ("gdn", "beta 0"), ("gdn", "beta 1")]
)
def test_gate_extremes(variant, case, dtype):
    inputs = extremes(variant, case)
    want = with_gradients(lambda x: recurrence(variant, x), inputs)
    for function in (CHUNKED, STEPWISE):
        got = with_gradients(lambda x, f=function: call(f[variant], variant, x, final=True), to(inputs, dtype))
        assert_equal(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("function", [CHUNKED, STEPWISE], ids=["chunked", "stepwise"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16(variant, function):
    """bf16 tokens, fp32 gates per head and state: nothing but the input and the output is rounded to bf16."""
    inputs = random_inputs(variant, 130, seed=6)
    inputs |= {name: inputs[name].bfloat16().double() for name in TOKENS[variant]}
    given = {name: x.bfloat16() if name in TOKENS[variant] else x.float() for name, x in inputs.items()}
    o, state = call(function[variant], variant, given, final=True)
    want_o, want_state = recurrence(variant, inputs)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state.double(), want_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(o.double(), want_o, rtol=2**-8, atol=1e-4)
    got = with_gradients(lambda x: call(function[variant], variant, x, final=True), given)
    for name, x in given.items():
        assert got[f"gradient of {name}"].dtype == x.dtype
    assert all(x.isfinite().all() for x in got.values())


def test_sums_without_fp64_are_as_good():
    """What stands in for running sums in fp64 on devices that lack them."""
    generator = torch.Generator().manual_seed(9)
    weak, strong = -(torch.rand(3, 70, generator=generator) * 1e-3), torch.rand(3, 70, generator=generator) < 0.2
    log_decay = torch.where(strong, -60000.0, weak)
    exact = decay_sums(log_decay.double()).tril()
    for fp64 in (True, False):
        got = decay_sums(log_decay, fp64=fp64).tril()
        assert (got.double().exp() - exact.exp()).abs().max() < 1e-6


def test_head_gates_stay_apart():
    """A gate of one head moves that head's output alone."""
    for variant in VARIANTS:
        inputs = random_inputs(variant, 20, seed=8)
        before = call(EITHER[variant], variant, inputs)[0]
        for name in HEADS[variant]:
            changed = inputs[name].clone()
            changed[1] += 1.0
            after = call(EITHER[variant], variant, inputs | {name: changed})[0]
            moved = (after != before).flatten(3).any(-1).any(1).any(0)
            assert moved.tolist() == [False, True, False, False], (variant, name)
