"""The fused mixer against the separate steps, its kernels written out in plain torch or in Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/numerics/test_fused_mixer.py

The interpreter needs Triton, which torch for CPUs does not bring, and takes minutes here; test_triton_kernels.py runs
each kernel alone, in CI. tests/gpu runs the compiled ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from oryx_megatron import ops, parallel, planner, platform
from oryx_megatron.config.schema import ModelConfig, MTPConfig, ParallelConfig, PrecisionConfig
from oryx_megatron.model import SequenceInfo, sequence
from oryx_megatron.model.build import build_chunk
from oryx_megatron.model.config import OryxTransformerConfig, transformer_config
from oryx_megatron.model.initialize import initialize_weights
from oryx_megatron.model.sequence import regroup
from oryx_megatron.modes import parse_plan, plan_for
from oryx_megatron.testing import fused_steps, run_distributed
from oryx_megatron.testing.fused_steps import delta_by_steps

INTERPRETED = platform.installed("triton") and os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(platform.has_gpu(), reason="tests/gpu runs the compiled kernels")

PLANS = ("attention", "recurrent", "ratio:0.5", "runs:a0-13,r13-30,a30-37")
LAYER_PLANS = (
    "layers:0=ratio:0.5,rest=runs:a0-13,r13-30,a30-end",
    "layers:0=attention,rest=recurrent",
    "layers:0=attention,rest=every:3",
)
"""Rows move in the first alone: layers whose tokens are in one mode take the order of their neighbours."""
LENGTH, ROWS, VOCABULARY = 37, 2, 31
RANKS = 2
DOCUMENTS = (0, 9, 10, 26, 37)


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for owner, name, _ in fused_steps.replacements():
            patched.setattr(owner, name, getattr(owner, name))  # to be put back
        replace_kernels()
        parallel.initialize(ParallelConfig(), seed=1)
        yield
        parallel.destroy()


def replace_kernels() -> None:
    """Those that this machine cannot run."""
    ops.delta_scan = delta_by_steps  # type: ignore[assignment]
    if not INTERPRETED:
        fused_steps.install()


def config(**changes) -> ModelConfig:
    fields = {"name": "t", "mixer": "gdn", "num_layers": 2, "hidden_size": 24, "ffn_hidden_size": 40, "num_heads": 2}
    fields |= {"qk_head_dim": 16, "v_head_dim": 32, "vocab_size": VOCABULARY, "init_std": 0.2}
    return ModelConfig(**(fields | changes))


def gradients(
    model: ModelConfig,
    plan: str,
    *,
    fused: bool,
    documents: Tensor | None,
    length: int = LENGTH,
    context: int = 1,
    sort: bool | None = None,
    **fields: Any,
) -> dict[str, Tensor]:
    """Loss and gradients by parameter name, queries under the names that both mixers share.

    `fields`: further ones of the config.
    """
    extra = (fused_steps.FUSED if fused else {}) | fields
    chunk = build_chunk(
        transformer_config(model, ParallelConfig(context=context), PrecisionConfig(dtype="fp32"), **extra)
    )
    initialize_weights(chunk, model, seed=3)
    rows = 1 if documents is not None else ROWS
    tokens = torch.randint(0, VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    where = {"device": platform.device(), "documents": documents, "sort": fused if sort is None else sort}
    info = SequenceInfo.build(plan_for(model.reads_plans, plan, length, chunk=8), **where)
    weights = torch.linspace(0.5, 1.5, length).expand(rows, -1)
    rank, share = parallel_state.get_context_parallel_rank(), length // context
    own = slice(rank * share, (rank + 1) * share)
    if model.mtp is not None:
        counted = (tokens[:, 1:] % 5 > 0).float()
        info = info.with_futures(tokens[:, :-1], tokens[:, 1:], counted, model.mtp.layers, own)
    inputs = info.arrange(tokens[:, :-1])[:, own]
    labels, weights = (info.arrange_labels(x)[:, own] for x in (tokens[:, 1:], weights))
    loss = (chunk(inputs, None, None, labels=labels, packed_seq_params=info) * weights).sum()
    loss.backward()
    found = {"loss": loss.detach()}
    if context > 1:
        for x in (found["loss"], *(parameter.grad for parameter in chunk.parameters())):
            torch.distributed.all_reduce(x)
    for name, parameter in chunk.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("in_proj.weight"):
            mixer = chunk.get_submodule(name.removesuffix(".in_proj.weight"))
            parts = parameter.grad.split(list(mixer.in_proj_rows.values()))
            found |= {f"{name}.{part}": grad for part, grad in zip(mixer.in_proj_rows, parts)}
        elif ".query_attention" in name or ".query_recurrent" in name:
            part = name.split(".")[-2]
            found[name.replace(f"{part}.weight", f"in_proj.weight.{part}")] = parameter.grad
        else:
            found[name] = parameter.grad
    return found


@pytest.mark.parametrize("plan", [*PLANS, *LAYER_PLANS])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixer": "mamba2"},
        {"mixer": "mamba2", "num_heads": 4, "num_kv_heads": 2, "qk_norm": False, "rotary": "none"},
        {"num_heads": 4, "num_kv_heads": 2, "conv_width": 0, "output_gate": False},
        {"mixer": "mamba2", "pattern": ("attention", "recurrent")},
        {"pattern": ("both", "attention", "recurrent", "both"), "num_layers": 4},
        {"mtp": MTPConfig(layers=2)},
        {"mixer": "mamba2", "mtp": MTPConfig(), "pattern": ("both", "attention")},
    ],
    ids=[
        "gdn",
        "mamba2",
        "mamba2 grouped, plain keys",
        "gdn grouped, no convolution, no gate",
        "hybrid",
        "mixed",
        "heads",
        "a head in a mixed model",
    ],
)
def test_fused_equals_separate(changes, plan):
    if plan in LAYER_PLANS and not changes.get("pattern"):
        changes = {**changes, "num_layers": 3}
    for documents in (None, torch.tensor(DOCUMENTS, dtype=torch.int32)):
        separate = gradients(config(**changes), plan, fused=False, documents=documents)
        fused = gradients(config(**changes), plan, fused=True, documents=documents)
        assert fused.keys() == separate.keys()
        for name, want in separate.items():
            error = (fused[name] - want).norm() / want.norm().clamp(min=1e-3)
            assert error < 2e-4, (name, error)


@pytest.mark.parametrize("plan", [*PLANS, "runs:a0-4,r4-37", "runs:a0-33,r33-37"])
def test_projections_by_modules(plan, monkeypatch):
    """As in FP8, where TransformerEngine's modules multiply multiples of 16 rows."""
    separate = gradients(config(), plan, fused=False, documents=None)
    monkeypatch.setattr(OryxTransformerConfig, "quantized", True)
    for multiple in (1, 8):
        found = gradients(config(), plan, fused=True, documents=None, row_multiple=multiple)
        assert found.keys() == separate.keys()
        for name, want in separate.items():
            assert (found[name] - want).norm() / want.norm().clamp(min=1e-3) < 2e-4, name


@pytest.mark.parametrize(
    ("plan", "moves"),
    [
        ("ratio:0.5", 0),
        ("layers:0-2=ratio:0.5,3=ratio:.5", 0),
        (LAYER_PLANS[1], 0),
        (LAYER_PLANS[2], 0),
        ("layers:0=attention,1=ratio:0.5,2=recurrent,3=ratio:0.5", 0),
        ("layers:0-1=ratio:0.5,2=recurrent,3=every:4", 1),
        ("layers:even=ratio:0.5,odd=every:4", 3),
    ],
)
def test_rows_move_only_between_different_plans_of_both_modes(plan, moves, monkeypatch):
    found = []
    monkeypatch.setattr(
        sequence, "regroup", lambda *given, **keywords: found.append(given) or regroup(*given, **keywords)
    )
    gradients(config(num_layers=4), plan, fused=True, documents=None)
    assert len(found) == moves


def test_one_plan_everywhere_is_that_plan():
    """Bit by bit, also where it is written by layers."""
    for spec in ("attention", "every:3"):
        for fused in (False, True):
            want = gradients(config(), spec, fused=fused, documents=None)
            found = gradients(config(), f"layers:even={spec},odd={spec}", fused=fused, documents=None)
            assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize(
    "changes",
    [{"shared_query": True}, {"rotary": "both"}, {"conv_width": 3}, {}],
    ids=lambda c: next(iter(c), "default"),
)
def test_fused_mixers_take_separate_steps_where_their_kernels_do_not_serve(changes):
    """As with TransformerEngine's linears, which come with this mixer."""
    separate = gradients(config(**changes), "ratio:0.5", fused=False, documents=None)
    found = gradients(config(**changes), "ratio:0.5", fused=True, documents=None, sort=False)
    assert found.keys() == separate.keys()
    for name, want in separate.items():
        assert (found[name] - want).norm() / want.norm().clamp(min=1e-3) < 2e-4, name


def of_one_rank_in_two(changes: dict, plans: tuple[str, ...]) -> list[list[dict[str, Tensor]]]:
    replace_kernels()
    parallel.initialize(ParallelConfig(context=RANKS), seed=1)
    documents = (None, torch.tensor((*DOCUMENTS[:-1], LENGTH + 1), dtype=torch.int32))
    return [
        [
            gradients(config(**changes), plan, fused=True, documents=d, length=LENGTH + 1, context=RANKS)
            for d in documents
        ]
        for plan in plans
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixer": "mamba2", "num_heads": 4, "num_kv_heads": 2},
        {"conv_width": 0, "output_gate": False},
        {"pattern": ("both", "attention", "recurrent"), "num_layers": 3},
    ],
    ids=["gdn", "mamba2 grouped", "gdn, no convolution, no gate", "mixed"],
)
def test_fused_under_context_parallelism(changes):
    """Two ranks, of which one has rows of both modes or none of attention, against the separate steps on one."""
    plans = (*PLANS[:3], "runs:a0-5,r5-30,a30-31,r31-38", "runs:r0-3,a3-38", LAYER_PLANS[0], LAYER_PLANS[2])
    found = run_distributed(of_one_rank_in_two, RANKS, changes, plans)
    for plan, *ranks in zip(plans, *found, strict=True):
        for i, documents in enumerate((None, torch.tensor((*DOCUMENTS[:-1], LENGTH + 1), dtype=torch.int32))):
            want = gradients(config(**changes), plan, fused=False, documents=documents, length=LENGTH + 1)
            for rank in ranks:
                assert rank[i].keys() == want.keys()
                for name, expected in want.items():
                    error = (rank[i][name] - expected).norm() / expected.norm().clamp(min=1e-3)
                    assert error < 2e-4, (plan, i, name, error)


def bytes_exchanged(mixer: str, spec: str) -> int:
    """Sent to the other rank by one microbatch, forward and backward, in fp32."""
    replace_kernels()
    parallel.initialize(ParallelConfig(context=RANKS), seed=1)
    sent, exchange = [], torch.distributed.all_to_all_single

    def counted(output: Tensor, given: Tensor, **keywords) -> None:
        sent.append(given.nbytes * (RANKS - 1) // RANKS)
        exchange(output, given, **keywords)

    torch.distributed.all_to_all_single = counted
    gradients(config(mixer=mixer), spec, fused=True, documents=None, length=LENGTH + 1, context=RANKS)
    return sum(sent)


@pytest.mark.parametrize(("mixer", "spec"), [("gdn", "ratio:0.5"), ("mamba2", "recurrent"), ("gdn", "attention")])
def test_bytes_of_the_exchange_are_those_of_the_planner(mixer, spec):
    model, length = config(mixer=mixer), LENGTH + 1
    work = planner.Work(length, ROWS, parse_plan(spec, length, chunk=8).attention_share)
    layout = planner.layout_of(model, work, ParallelConfig(context=RANKS), ROWS, RANKS)
    planned = planner.traffic_bytes(model, layout, work, ROWS, "none")["context"]  # in bf16
    assert run_distributed(bytes_exchanged, RANKS, mixer, spec) == [2 * planned] * RANKS
