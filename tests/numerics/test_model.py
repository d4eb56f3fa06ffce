"""The megatron-core model against plain models written out here from the paper's equations, and against itself.

Nothing of the library is used in the written-out models but the values of the weights. Shapes: b batch, s sequence,
H heads, G key/value heads, N key width, P value width, d hidden size.
"""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from oryx_megatron import arch, platform
from oryx_megatron.config import load_model, preset_names
from oryx_megatron.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, Recompute
from oryx_megatron.model import SequenceInfo, build_meta, build_model
from oryx_megatron.modes import LayerPlans, Mode, ModePlan, Plan

VARIANTS = ("gdn", "mamba2")
VOCABULARY, ROWS = 41, 2
CASES: dict[str, dict] = {
    "grouped": {},
    "ungrouped": {"num_kv_heads": None},
    "one group": {"num_kv_heads": 1},
    "rotary both": {"rotary": "both"},
    "no rotary": {"rotary": "none"},
    "no qk_norm": {"qk_norm": False},
    "no convolution": {"conv_width": 0},
    "two taps": {"conv_width": 2},
    "no gate": {"output_gate": False},
    "shared query": {"shared_query": True},
    "shared query, rotary both": {"shared_query": True, "rotary": "both"},
    "untied": {"tie_embeddings": False},
    "attention baseline": {"modes": "attention"},
    "recurrent baseline": {"modes": "recurrent"},
    "hybrid": {"pattern": ("recurrent", "attention")},
    "mixed": {"pattern": ("both", "attention", "recurrent"), "num_layers": 3},
    "mixed, shared query, rotary both": {"pattern": ("recurrent", "both"), "shared_query": True, "rotary": "both"},
    "plain Transformer": {"modes": "attention", "conv_width": 0, "output_gate": False},
}
pytestmark = pytest.mark.usefixtures("one_rank")
cases = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
variants = pytest.mark.parametrize("variant", VARIANTS)


def config(variant: str, **changes) -> ModelConfig:
    fields = {"name": "t", "mixer": variant, "num_layers": 2, "hidden_size": 20, "ffn_hidden_size": 28, "num_heads": 4}
    fields |= {"num_kv_heads": 2, "qk_head_dim": 8, "v_head_dim": 6, "vocab_size": VOCABULARY, "init_std": 0.3}
    return ModelConfig(**(fields | {"recurrence_chunk": 16} | changes))


def build(model: ModelConfig, dtype: torch.dtype = torch.float64, **layout) -> GPTModel:
    (chunk,) = build_model(model, ParallelConfig(**layout), PrecisionConfig(dtype="fp32"), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # norms and skips off their initial ones, so that a forgotten weight shows
        for name, parameter in chunk.named_parameters():
            if "norm" in name or name.endswith(".d"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return chunk.to(dtype)


def forward(chunk: GPTModel, tokens: Tensor, plan: Plan, **info) -> Tensor:
    """Logits [b, s, vocabulary]."""
    sequence = SequenceInfo.build(plan, device=platform.device(), **info)
    return chunk(tokens.to(platform.device()), None, None, packed_seq_params=sequence)


def random_tokens(length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def random_plan(model: ModelConfig, length: int, seed: int = 2) -> ModePlan:
    """Runs of one to a few tokens in either mode, or in the one that the model has."""
    if model.single_mode is not None:
        return ModePlan.uniform(Mode[model.single_mode.upper()], length)
    return ModePlan.from_mask(torch.rand(length, generator=torch.Generator().manual_seed(seed)).numpy() < 0.5)


def layer_plan(model: ModelConfig, length: int) -> Plan:
    """A random plan of its own for every layer that reads one."""
    plans = [random_plan(model, length, seed) for seed in range(model.num_layers)]
    return LayerPlans.of(plans, model.reads_plans)


# ------------------------------------------------------------------------------------------- the written-out models


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rotate(x: Tensor) -> Tensor:
    """[b, s, heads, N]: channel i turns with channel i + N/2 by position / 10000^(2i/N)."""
    half = x.shape[-1] // 2
    turned = torch.view_as_complex(torch.stack((x[..., :half], x[..., half:]), -1))
    speed = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * speed
    turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angle), angle))
    return torch.cat((turned[..., 0], turned[..., 1]), -1)


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """x [b, s, c], taps [c, w], the last of them on the token itself."""
    width = taps.shape[1]
    return sum(
        torch.nn.functional.pad(x, (0, 0, back, 0))[:, : x.shape[1]] * taps[:, width - 1 - back]
        for back in range(min(width, x.shape[1]))
    )


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [b, s, H, N], k [b, s, H, N], v [b, s, H, P]: every token attends to itself and all before it."""
    scores = torch.einsum("bihn,bjhn->bhij", q, k) / math.sqrt(q.shape[-1])
    later = torch.ones(q.shape[1], q.shape[1]).triu(1).bool()
    return torch.einsum("bhij,bjhp->bihp", scores.masked_fill(later, -torch.inf).softmax(-1), v)


def mamba2(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, dt_bias: Tensor, a_log: Tensor, d: Tensor) -> Tensor:
    state, outputs = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[1]):
        step = torch.log1p(torch.exp(dt[:, t] + dt_bias))  # [b, H]
        decay = torch.exp(-torch.exp(a_log) * step)
        state = decay[..., None, None] * state + torch.einsum("bh,bhn,bhp->bhnp", step, k[:, t], v[:, t])
        outputs.append(torch.einsum("bhnp,bhn->bhp", state, q[:, t]) + d[:, None] * v[:, t])
    return torch.stack(outputs, 1)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, dt_bias: Tensor, a_log: Tensor) -> Tensor:
    q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q / math.sqrt(q.shape[-1])
    a, b = gates.chunk(2, -1)
    state, outputs = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[1]):
        decay = torch.exp(-torch.exp(a_log) * torch.log1p(torch.exp(a[:, t] + dt_bias)))
        beta = 1 / (1 + torch.exp(-b[:, t]))
        erase = torch.eye(k.shape[-1], dtype=k.dtype) - torch.einsum("bh,bhn,bhm->bhnm", beta, k[:, t], k[:, t])
        written = torch.einsum("bh,bhn,bhp->bhnp", beta, k[:, t], v[:, t])
        state = decay[..., None, None] * torch.einsum("bhnm,bhmp->bhnp", erase, state) + written
        outputs.append(torch.einsum("bhnp,bhn->bhp", state, q[:, t]))
    return torch.stack(outputs, 1)


def written_out(w: dict[str, Tensor], model: ModelConfig, tokens: Tensor, attends: Tensor) -> Tensor:
    """Logits [b, s, vocabulary] of weights `w` by megatron-core's names; `attends` bool [s] or [layers, 1, s]."""
    output = "embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"
    return written_out_states(w, model, tokens, attends) @ w[output].T


def written_out_states(w: dict[str, Tensor], model: ModelConfig, tokens: Tensor, attends: Tensor) -> Tensor:
    """What the output layer reads, [b, s, d]."""
    x = w["embedding.word_embeddings.weight"][tokens]
    plans = attends.reshape(-1, attends.shape[-1]).expand(model.num_layers, -1)
    for layer, plan in enumerate(plans):
        x = written_out_layer(w, f"decoder.layers.{layer}.", model, model.layer_modes[layer], x, plan)
    return norm(x, w["decoder.final_layernorm.weight"])


def written_out_layer(
    w: dict[str, Tensor], at: str, model: ModelConfig, modes: str, x: Tensor, attends: Tensor
) -> Tensor:
    """[b, s, d] through the layer whose weights' names begin with `at`."""
    heads, groups, n, p = model.num_heads, model.kv_heads, model.qk_head_dim, model.v_head_dim
    serving = [head // (heads // groups) for head in range(heads)]
    if model.pattern:  # layers of one mode ignore the plan
        model = model.with_modes(modes)
        attends = attends if model.modes == "both" else torch.full_like(attends, model.modes == "attention")
    h, mix = norm(x, w[at + "input_layernorm.weight"]), at + "self_attention."
    queries = {"both": ["query_attention", "query_recurrent"], "attention": ["query_attention"]}
    names = ["query"] if model.shared_query else queries.get(model.modes, ["query_recurrent"])
    names = ["key", "value", *names, *(["output_gate"] if model.output_gate else [])]
    rows = {"key": groups * n, "value": groups * p, "output_gate": heads * p}
    projected = (h @ w[mix + "in_proj.weight"].T).split([rows.get(name, heads * n) for name in names], -1)
    parts = dict(zip(names, projected, strict=True))
    k, v = parts["key"], parts["value"]
    if model.conv_width:
        key_taps, value_taps = w[mix + "conv.weight"].split((groups * n, groups * p))
        k, v = convolve(k, key_taps), convolve(v, value_taps)
        k, v = (silu(k), silu(v)) if model.mixer == "gdn" else (k, v)
    k, v = k.unflatten(-1, (groups, n)), v.unflatten(-1, (groups, p))[:, :, serving]
    o = torch.zeros(*v.shape, dtype=v.dtype)
    if attends.any():
        q, key = parts["query" if model.shared_query else "query_attention"].unflatten(-1, (heads, n)), k
        if model.qk_norm:
            q, key = norm(q, w[mix + "query_norm.weight"]), norm(key, w[mix + "key_norm.weight"])
        if model.rotary != "none":
            q, key = rotate(q), rotate(key)
        o = torch.where(attends[:, None, None], softmax_attention(q, key[:, :, serving], v), o)
    if not attends.all():
        q, key = parts["query" if model.shared_query else "query_recurrent"].unflatten(-1, (heads, n)), k
        if model.rotary == "both":
            q, key = rotate(q), rotate(key)
        gates, small = h @ w[mix + "decay_proj.weight"].T, (w[mix + "dt_bias"], w[mix + "a_log"])
        if model.mixer == "mamba2":
            recurrent = mamba2(q, key[:, :, serving], v, gates, *small, w[mix + "d"])
        else:
            recurrent = delta_rule(q, key[:, :, serving], v, gates, *small)
        o = torch.where(attends[:, None, None], o, recurrent)
    y = norm(o, w[mix + "out_norm.weight"])
    if model.output_gate:
        y = y * silu(parts["output_gate"]).unflatten(-1, (heads, p))
    x = x + y.flatten(2) @ w[mix + "out_proj.weight"].T
    h = norm(x, w[at + "pre_mlp_layernorm.weight"])
    gate, up = (h @ w[at + "mlp.linear_fc1.weight"].T).chunk(2, -1)
    x = x + (silu(gate) * up) @ w[at + "mlp.linear_fc2.weight"].T
    return x


# ------------------------------------------------------------------------------------------------------------ tests


@variants
@cases
def test_plain_models(variant: str, changes: dict) -> None:
    """All attention = a Transformer, all recurrent = a Mamba-2 or Gated DeltaNet model, plans that mix
    them, one of them over the layers too: logits and the gradient of every parameter, which none lacks (fp64)."""
    model = config(variant, **changes)
    chunk = build(model)
    for length in (1, 33):
        tokens = random_tokens(length)
        probe = torch.randn(ROWS, length, VOCABULARY, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        plans = [ModePlan.uniform(mode, length) for mode in Mode if model.single_mode in (None, mode.name.lower())]
        for plan in [*plans, random_plan(model, length), layer_plan(model, length)]:
            chunk.zero_grad()
            logits = forward(chunk, tokens, plan)
            (logits * probe.to(logits.device)).sum().backward()
            weights = {name: p.detach().cpu().clone().requires_grad_() for name, p in chunk.named_parameters()}
            expected = written_out(weights, model, tokens, torch.from_numpy(plan.is_attention()))
            (expected * probe).sum().backward()
            torch.testing.assert_close(logits.detach().cpu(), expected.detach(), atol=1e-9, rtol=1e-9)
            for name, parameter in chunk.named_parameters():
                assert parameter.grad is not None, f"{name} has no gradient under {plan}"
                grad = weights[name].grad
                grad = torch.zeros_like(weights[name]) if grad is None else grad
                torch.testing.assert_close(
                    parameter.grad.cpu(), grad, atol=1e-8, rtol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
                )


@variants
def test_causality(variant: str) -> None:
    """Neither the modes nor the tokens after t change anything up to t."""
    model = config(variant)
    chunk, tokens, plan = build(model), random_tokens(40), random_plan(model, 40)
    mask = plan.is_attention()
    with torch.no_grad():
        logits = forward(chunk, tokens, plan)
        for t in (0, 15, 16, 38):  # around a chunk of the recurrence, too
            flipped = mask.copy()
            flipped[t + 1 :] = ~flipped[t + 1 :]
            others = tokens.clone()
            others[:, t + 1 :] = (others[:, t + 1 :] + 1) % VOCABULARY
            for changed in (
                forward(chunk, tokens, ModePlan.from_mask(flipped)),
                forward(chunk, others, plan),
                forward(chunk, others, ModePlan.from_mask(flipped)),
            ):
                torch.testing.assert_close(changed[:, : t + 1], logits[:, : t + 1], atol=1e-12, rtol=0)
                assert ((changed[:, t + 1 :] - logits[:, t + 1 :]).abs() > 1e-3).any()


@variants
@cases
def test_decoding_equals_one_pass(variant: str, changes: dict) -> None:
    """Token by token, and in prefilled pieces, with the states of every layer (fp32, 1e-4)."""
    model = config(variant, **changes)
    chunk = build(model, torch.float32).eval()
    length = 28 if changes else 70  # 70 outgrows the cache's first capacity
    tokens = random_tokens(length)
    with torch.no_grad():
        by_layer = layer_plan(model, length)
        for plan, sizes in (
            (random_plan(model, length, 2), [1] * length),
            (random_plan(model, length, 3), [13, 1, 1, 9, length - 24]),
            (random_plan(model, length, 4), [length - 1, 1]),
            (by_layer, [13, 1, 1, 9, length - 24]),
        ):
            states: dict = {}
            parts, start = [], 0
            for size in sizes:
                piece = plan.slice(start, start + size)
                parts.append(forward(chunk, tokens[:, start : start + size], piece, offset=start, states=states))
                start += size
            assert sorted(states) == list(range(1, model.num_layers + 1))
            for number, state in states.items():  # each layer keeps what it reads
                kind = model.layer_modes[number - 1]
                assert state.length == (0 if kind == "recurrent" else length)
                assert (state.keys is None) == (kind == "recurrent")
                assert (state.recurrent is None) == (kind == "attention")
            torch.testing.assert_close(torch.cat(parts, 1), forward(chunk, tokens, plan), atol=1e-4, rtol=1e-4)


@variants
def test_the_modes_of_the_past_are_in_the_states(variant: str) -> None:
    """A switch after t tokens reads hidden states made in their own modes: states under other plans differ."""
    model = config(variant)
    chunk, tokens = build(model), random_tokens(12)
    kept = []
    with torch.no_grad():
        for mode in Mode:
            states: dict = {}
            forward(chunk, tokens, ModePlan.uniform(mode, 12), states=states)
            kept.append(states)
    for layer, equal in ((1, True), (2, False)):  # the first layer's input knows no modes
        one, two = (states[layer] for states in kept)
        assert one.length == two.length == 12
        for name in ("keys", "values", "recurrent", "window"):
            first, second = getattr(one, name), getattr(two, name)
            if name in ("keys", "values"):
                first, second = first[:, :12], second[:, :12]
            assert torch.allclose(first, second, atol=1e-12) is equal, name


@variants
def test_isolated_documents(variant: str) -> None:
    """Documents in one row = each document alone."""
    model = config(variant, rotary="both")
    chunk, tokens = build(model), random_tokens(50)
    bounds = [0, 2, 3, 20, 50]
    for plan in (random_plan(model, 50), layer_plan(model, 50)):
        with torch.no_grad():
            together = forward(chunk, tokens, plan, documents=torch.tensor(bounds, dtype=torch.int32))
            alone = [forward(chunk, tokens[:, a:b], plan.slice(a, b)) for a, b in itertools.pairwise(bounds)]
        torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-10, rtol=1e-10)


@variants
def test_recomputing_changes_nothing(variant: str) -> None:
    model = config(variant)
    tokens = random_tokens(24)
    results = []
    for recompute in get_args(Recompute):
        chunk = build(model, recompute=recompute).train()
        grads = []
        for plan in (ModePlan.uniform(Mode.ATTENTION, 24), random_plan(model, 24), layer_plan(model, 24)):
            chunk.zero_grad()
            forward(chunk, tokens, plan).square().mean().backward()
            assert all(p.grad is not None for p in chunk.parameters())
            grads.append({name: p.grad.clone() for name, p in chunk.named_parameters()})
        results.append(grads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-12, rtol=1e-9)


@variants
def test_initial_weights(variant: str) -> None:
    model = config(variant, num_layers=8, hidden_size=64, init_std=0.02, num_heads=16)
    (chunk,) = build_model(model, ParallelConfig(), PrecisionConfig(dtype="bf16"), seed=3)
    drawn = dict(chunk.named_parameters())
    for name, weight in drawn.items():
        values = weight.detach().float()
        if name.endswith("a_log"):
            assert values.exp().min() >= 1 - 1e-5
            assert values.exp().max() <= 16 + 1e-4
            assert values.unique().numel() == 16
        elif name.endswith("dt_bias"):
            dt = torch.nn.functional.softplus(values)
            assert dt.min() >= 0.999e-3
            assert dt.max() <= 0.1001
        elif name.endswith("conv.weight"):
            assert 0.45 < values.abs().max() <= 0.5
        elif "norm" in name or name.endswith(".d"):
            assert (values == 1).all()
        else:
            std = 0.02 / 4 if name.endswith(("out_proj.weight", "fc2.weight")) else 0.02
            assert values.std() == pytest.approx(std, rel=0.15), name
        small = name.rsplit(".", 1)[-1] in ("a_log", "dt_bias", "d")
        assert weight.dtype == (torch.float32 if small else torch.bfloat16), name
    (again,) = build_model(model, ParallelConfig(), PrecisionConfig(dtype="bf16"), seed=3)
    (other,) = build_model(model, ParallelConfig(), PrecisionConfig(dtype="bf16"), seed=4)
    assert all(torch.equal(p, drawn[name]) for name, p in again.named_parameters())
    first, second = (drawn[f"decoder.layers.{layer}.self_attention.in_proj.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, other.decoder.layers[0].self_attention.in_proj.weight)


def test_plans_that_a_baseline_cannot_run() -> None:
    mixed = ModePlan.from_mask([True, False])
    for modes in ("attention", "recurrent"):
        chunk = build(config("gdn", modes=modes))
        for plan in (mixed, ModePlan.uniform(Mode.RECURRENT if modes == "attention" else Mode.ATTENTION, 2)):
            with pytest.raises(ValueError, match=f"modes={modes} cannot run the plan"):
                forward(chunk, random_tokens(2), plan)
    with pytest.raises(TypeError, match="plan"):
        chunk(random_tokens(2), None, None)


@pytest.mark.parametrize("name", preset_names())
def test_counts_of_presets(name: str) -> None:
    """The arithmetic of `arch` = a model built without storage, in all and part by part."""
    model = load_model(name)
    built = {key: parameter.numel() for key, parameter in build_meta(model).named_parameters()}
    counts = arch.parameter_counts(model)
    assert counts.total == sum(built.values())
    parts = {part.name: part.count for part in counts.parts}

    def of(*endings: str) -> int:
        return sum(number for key, number in built.items() if key.endswith(endings))

    assert parts["embedding"] == of("word_embeddings.weight")
    mlps = ("mlp", "experts", "shared experts")
    assert sum(parts.get(part, 0) for part in mlps) == of("fc1.weight", "fc2.weight")
    assert parts.get("router", 0) == of("router.weight")
    assert parts["out_proj"] == of("out_proj.weight")
    assert sum(n for part, n in parts.items() if part.startswith("in_proj")) == of("in_proj.weight")
    assert parts.get("conv", 0) == of("conv.weight")
    assert parts.get("decay_proj", 0) == of("decay_proj.weight")
    small = sum(n for part, n in parts.items() if part.startswith("a_log"))
    assert small == of(".a_log", ".dt_bias", "self_attention.d")
