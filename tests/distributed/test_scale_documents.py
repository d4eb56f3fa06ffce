"""Isolated documents: a packed sequence equals every document run alone, both variants, any plan, under CP and TP."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from oryx_megatron import parallel
from oryx_megatron.config.schema import ParallelConfig
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.layouts import Worlds, tiny_run

STARTS = [0, 1, 8, 31, 52, 64]
"""Documents of 1, 7, 23, 21 and 12 tokens; one lies across the middle, where context parallelism cuts."""
PLANS = ("attention", "recurrent", "runs:r0-8,a8-24,r24-32,a32-48,r48-64")
MIXERS = ("gdn", "mamba2")
SPLITS = {"one rank": (1, 1), "context 2": (1, 2), "tensor 2": (2, 1)}

Result = tuple[Tensor, dict[str, Tensor]]
"""Loss of every token [s], and gradients of their sum by parameter."""


def _forward(chunk: torch.nn.Module, tokens: Tensor, spec: str, pieces: list[tuple[int, int]], context: int) -> Result:
    """Losses of the pieces of `tokens` [s + 1] run one after the other; with one piece, of the packed sequence."""
    from megatron.core import parallel_state

    from oryx_megatron.model import SequenceInfo
    from oryx_megatron.modes import parse_plan

    chunk.zero_grad()
    whole, losses = parse_plan(spec, STARTS[-1], chunk=8), []
    for start, stop in pieces:
        packed = stop - start == STARTS[-1]
        documents = torch.tensor(STARTS, dtype=torch.int32) if packed else None
        info = SequenceInfo.build(whole.slice(start, stop), device=torch.device("cpu"), documents=documents)
        share, rank = (stop - start) // context, parallel_state.get_context_parallel_rank()
        own = slice(start + rank * share, start + (rank + 1) * share)
        labels = tokens[own.start + 1 : own.stop + 1]
        losses.append(chunk(tokens[own][None], None, None, labels=labels[None], packed_seq_params=info)[0])
    torch.cat(losses).sum().backward()
    gradients = {name: p.grad.clone() for name, p in chunk.named_parameters() if p.grad is not None}
    loss = torch.cat(losses).detach()
    if context > 1:
        group = parallel_state.get_context_parallel_group()
        parts = [torch.empty_like(loss) for _ in range(context)]
        torch.distributed.all_gather(parts, loss, group=group)
        loss = torch.cat(parts)
        for gradient in gradients.values():
            torch.distributed.all_reduce(gradient, group=group)
    return loss, gradients


def _documents() -> dict[Any, Result]:
    from oryx_megatron.model import build_model

    worlds, results = Worlds(), {}
    alone = list(itertools.pairwise(STARTS))
    tokens = torch.randint(1, 96, (STARTS[-1] + 1,), generator=torch.Generator().manual_seed(5))
    for split, (tensor, context) in SPLITS.items():
        for mixer in worlds.share(tensor * context, MIXERS):
            with worlds.of(tensor * context, f"{split} {mixer}"):
                run = tiny_run(mixer, parallel=ParallelConfig(tensor=tensor, context=context, sequence=False))
                parallel.initialize(run.parallel, seed=run.seed)
                (chunk,) = build_model(run.model, run.parallel, run.precision, seed=run.seed)
                for plan in PLANS:
                    results[split, mixer, plan] = _forward(chunk, tokens, plan, [(0, STARTS[-1])], context)
                    if split == "one rank":
                        results["alone", mixer, plan] = _forward(chunk, tokens, plan, alone, 1)
                parallel.release()
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[Any, Result]]:
    return run_distributed(_documents, 2, timeout=600)


@pytest.mark.timeout(700)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("split", SPLITS)
def test_packed_equals_alone(split: str, mixer: str, plan: str, results: list[dict[Any, Result]]) -> None:
    merged = results[1] | results[0]
    loss, gradients = merged[split, mixer, plan]
    expected_loss, expected = merged["alone", mixer, plan]
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items() if split != "tensor 2" else ():  # there each rank has a part
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
