"""What only a GPU runs, as far as it can be held to account without one."""

from __future__ import annotations

import dataclasses
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.extensions import transformer_engine as extensions
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from oryx_megatron import parallel, platform
from oryx_megatron.checkpoint import load_model_weights
from oryx_megatron.checkpoint.state import sharded_state
from oryx_megatron.config import load_model
from oryx_megatron.config.schema import (
    ModelConfig,
    MoEConfig,
    MTPConfig,
    ParallelConfig,
    PrecisionConfig,
    Recompute,
)
from oryx_megatron.errors import ConfigError
from oryx_megatron.hf.layers_oryx import eager_attention_forward
from oryx_megatron.model.build import build_chunk, build_model
from oryx_megatron.model.config import OryxTransformerConfig, transformer_config
from oryx_megatron.model.initialize import Slicer, normal_draw
from oryx_megatron.model.parts import LocalLinear, RMSNorm
from oryx_megatron.model.warm import _random
from oryx_megatron.modes import Mode, parse_plan, plan_for
from oryx_megatron.ops import TokenLayout, backends, fused, scans
from oryx_megatron.ops.scans import delta_scan
from oryx_megatron.testing import fused_steps
from oryx_megatron.testing.fused_steps import FUSED
from oryx_megatron.testing.layouts import tiny_run
from oryx_megatron.train.freeze import _grouped, divide, named_parts
from oryx_megatron.train.optimizer import build_optimizer, wrap
from oryx_megatron.train.step import Microbatch, OryxProgram
from oryx_megatron.warmup import check, share_of


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    parallel.initialize(ParallelConfig(), seed=1)
    yield
    parallel.destroy()


def chunk(model: ModelConfig, dtype: str = "fp32", **overrides) -> torch.nn.Module:
    return build_chunk(transformer_config(model, ParallelConfig(), PrecisionConfig(dtype=dtype), **overrides))


@pytest.mark.parametrize(
    "changes",
    [{"mixer": "gdn"}, {"mixer": "mamba2"}, {"shared_query": True}, {"pattern": ("recurrent*3", "attention")}],
    ids=str,
)
def test_fused_blocks_save_under_the_names_of_the_others(changes: dict) -> None:
    model = dataclasses.replace(load_model("tiny-gdn"), **changes)
    plain, fast = (chunk(model, **extra).sharded_state_dict(metadata={}) for extra in ({}, FUSED))
    assert {part.key for part in fast.values()} >= {"embedding.word_embeddings.weight"}
    parts = [{s.key for entry in state.values() for s in _tensors(entry)} for state in (plain, fast)]
    assert parts[0] == parts[1]


DEEP = dataclasses.replace(load_model("tiny-gdn"), num_layers=4)


def _batch(spec: str, length: int = 512) -> Microbatch:
    tokens = torch.zeros(1, length, dtype=torch.long)
    return Microbatch(tokens, tokens, torch.ones(1, length), plan_for(DEEP.reads_plans, spec, length, chunk=128))


def test_a_hybrid_has_one_graph_whatever_the_plan() -> None:
    """No layer reads the plan: rows lie in the order of tokens, and all that is computed is computed at once."""
    plans = ("attention", "recurrent", "ratio:0.5", "prefix:128")
    oryx, hybrid = (OryxProgram(load_model(name)) for name in ("tiny-gdn", "tiny-gdn-hybrid"))
    assert len({oryx.shape(_batch(plan)) for plan in plans}) == 4
    assert len({hybrid.shape(_batch(plan)) for plan in plans}) == 1
    assert len({hybrid.parts(_batch(plan)) for plan in plans}) == 1
    built = chunk(load_model("tiny-gdn-hybrid"), **FUSED)
    assert hybrid.place(_batch("ratio:0.5"), built).info.layout.ordered


def test_layers_of_one_mode_see_what_a_replay_brings() -> None:
    """Their tables are those of the microbatch, which `refill` overwrites in place."""
    model = dataclasses.replace(load_model("tiny-gdn"), pattern=("both", "attention", "recurrent", "both"))
    program, built = OryxProgram(model), chunk(model, **FUSED)
    first, second = _batch("runs:a0-256,r256-512"), _batch("runs:r0-256,a256-512")
    assert program.shape(first) == program.shape(second)
    placed = program.place(first, built)
    views = [placed.info.in_mode(mode).layout for mode in Mode]
    program.refill(placed, second)
    want = TokenLayout.of(second.plan, device=platform.device())
    for view, mode in zip(views, Mode, strict=True):
        assert view.attention == (mode is Mode.ATTENTION) * 512
        assert torch.equal(view.tokens, want.tokens)
        assert torch.equal(view.rows, want.rows)
        assert torch.equal(view.in_order.tokens, torch.arange(512))


def test_shapes_count_the_rows_of_every_layer():
    """Equal shapes launch the same kernels; all that host code branches on makes a shape."""
    shape = OryxProgram(DEEP).shape
    first = "layers:0-1=runs:a0-128,r128-end,rest=runs:r0-256,a256-end"
    assert shape(_batch(first)) == shape(_batch("layers:0-1=runs:r0-384,a384-end,rest=runs:a0-256,r256-end"))
    others = (
        "ratio:0.5",
        "layers:0-1=runs:a0-128,r128-end,rest=runs:r0-128,a128-end",  # other numbers of rows
        "layers:0-2=runs:a0-128,r128-end,rest=runs:r0-256,a256-end",  # other layers
        "layers:0-1=runs:r0-256,a256-end,rest=runs:a0-128,r128-end",  # the other way round
        "layers:0-1=runs:a0-128,r128-end,rest=recurrent",
        "layers:0-1=runs:a0-128,r128-end,rest=attention",
        "layers:0-1=recurrent,rest=runs:a0-128,r128-end",
        "layers:0-1=runs:a0-127,r127-end,rest=runs:r0-257,a257-end",  # rows that fill no blocks
        "layers:0=attention,rest=recurrent",
        "layers:even=runs:a0-128,r128-end,odd=runs:r0-256,a256-end",
    )
    shapes = [shape(_batch(spec)) for spec in (first, *others)]
    assert len(set(shapes)) == len(shapes)


def test_parts_are_those_of_each_layer():
    """A graph is captured when every layer's kernels have been launched."""
    parts = OryxProgram(DEEP).parts(_batch("layers:0=attention,1=every:2,rest=recurrent"))
    assert "attention query of layer 0" in parts
    assert "recurrent query of layer 0" not in parts
    assert {"attention query of layer 1", "recurrent query of layer 1", "recurrence of layer 1"} <= parts
    assert "attention query of layer 2" not in parts


def test_a_replay_brings_the_order_of_every_group_of_layers():
    """Tables are overwritten in place, so that layers, and rows that move between them, see the new ones."""
    program, built = OryxProgram(DEEP), chunk(DEEP, **FUSED)
    first = _batch("layers:0=attention,1=runs:a0-128,r128-end,rest=runs:r0-256,a256-end")
    second = _batch("layers:0=attention,1=runs:r0-384,a384-end,rest=runs:a0-256,r256-end")
    assert program.shape(first) == program.shape(second)
    placed = program.place(first, built)
    assert len(placed.info.layouts) == 2
    moves = placed.info.moves(2)
    assert [placed.info.moves(i) for i in (0, 1, 3)] == [None] * 3
    program.refill(placed, second)
    for i, own in enumerate(second.plan.orders):
        want, layout = TokenLayout.of(own, device=platform.device()), placed.info.of_layer(i).layout
        assert torch.equal(layout.tokens, want.tokens)
        assert torch.equal(layout.rows, want.rows)
    assert placed.info.of_layer(0).layout.attention == 512
    assert [torch.equal(table.tokens, placed.info.of_layer(i).layout.tokens) for table, i in zip(moves, (1, 2))] == [
        True
    ] * 2


def test_one_layer_of_each_kind_is_warmed_up() -> None:
    run = tiny_run(model__pattern=("recurrent*3", "attention"))
    assert share_of(run).model.layer_modes == ("attention", "recurrent")
    assert share_of(tiny_run()).model.layer_modes == ("both",)


def test_a_run_of_many_ranks_is_checked_on_one() -> None:
    """Ranks that hold experts or are profiled need not be there; a layout that no number of ranks fits is told."""
    moe = MoEConfig(experts=4, ffn_hidden_size=32)
    run = tiny_run(model__moe=moe, parallel__expert=4, parallel__tensor=2, logging__profile=(1, 2))
    check(dataclasses.replace(run, logging=dataclasses.replace(run.logging, profile_ranks=(0, 8))))
    with pytest.raises(ConfigError, match="experts 4 is not divisible by expert 3"):
        check(dataclasses.replace(run, parallel=ParallelConfig(expert=3)))


@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
def test_weights_of_fused_blocks_load_into_the_others_and_back(tmp_path: Path, monkeypatch, mixer: str) -> None:
    """Trained on a GPU and evaluated on a CPU, or the other way round: their linears keep other states for FP8."""
    # Not the queue of this package's saves, which are made in a process of their own.
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    model = load_model(f"tiny-{mixer}")
    built = {"plain": chunk(model), "fast": chunk(model, **FUSED)}
    for name, source in built.items():
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        folder = tmp_path / name
        folder.mkdir()
        dist_checkpointing.save(sharded_state([source], None), str(folder))
        target = built["fast" if name == "plain" else "plain"]
        load_model_weights(folder, [target])
        written = _weights(source)
        assert written
        for a, b in zip(written, _weights(target), strict=True):
            assert a.key == b.key
            assert torch.equal(a.data, b.data), a.key


class NormLinear(ColumnParallelLinear):
    """As TransformerEngine's, the norm inside."""

    def __init__(self, width: int, *args: Any, config: Any, **more: Any) -> None:
        super().__init__(width, *args, config=config, **more)
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(width))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerEngine's linears, replaced by those that hold the same on a CPU."""
    linears = {"TEColumnParallelLinear": ColumnParallelLinear, "TERowParallelLinear": RowParallelLinear}
    linears |= {"TELayerNormColumnParallelLinear": NormLinear, "TENorm": RMSNorm}
    for name, stand_in in linears.items():
        monkeypatch.setattr(extensions, name, stand_in)
    local = ModuleType("oryx_megatron.model.te")
    local.TELocalLinear = LocalLinear  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, local.__name__, local)


@pytest.mark.usefixtures("stand_ins")
def test_the_norm_before_a_mixer_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In FP8 in_proj holds it, in bf16 it is a module: each loads the other's weights, and is frozen by one name."""
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    model = load_model("tiny-gdn")
    plain = chunk(model)

    def built(*, quantized: bool) -> torch.nn.Module:
        monkeypatch.setattr(OryxTransformerConfig, "quantized", quantized)
        made = chunk(model, te_linears=True, **FUSED)
        names = dict(made.decoder.layers[0].named_parameters())
        assert ("self_attention.in_proj.layer_norm_weight" in names) == quantized
        assert ("input_layernorm.weight" in names) == (not quantized)
        return made

    for quantized in (True, False):
        source = built(quantized=quantized)
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        folder = tmp_path / str(quantized)
        folder.mkdir()
        dist_checkpointing.save(sharded_state([source], None), str(folder))
        frozen = [{name for _, parts in named_parts(m, tied=True) for name in parts} for m in (source, plain)]
        assert {name for name in frozen[0] if "norm" in name} == {name for name in frozen[1] if "norm" in name}
        target = built(quantized=not quantized)
        for other in (target, plain):
            load_model_weights(folder, [other])
            for a, b in zip(_weights(source), _weights(other), strict=True):
                assert a.key == b.key
                assert torch.equal(a.data, b.data), a.key


def _weights(source) -> list[ShardedTensor]:
    state = source.sharded_state_dict(metadata={})
    tensors = [s for entry in state.values() for s in _tensors(entry) if isinstance(s, ShardedTensor)]
    return sorted(tensors, key=lambda tensor: (tensor.key, tensor.global_offset))


def _tensors(entry):
    built = entry.build() if hasattr(entry, "build") else entry
    found = built.values() if isinstance(built, dict) else built if isinstance(built, list) else [built]
    return [tensor for tensor in found if not tensor.key.endswith("_extra_state")]


def test_warming_up_takes_the_runs_precision() -> None:
    """The first parameters of a mixer, its decays, are fp32 in a bf16 model."""
    mixer = chunk(load_model("tiny-gdn"), "bf16", **FUSED).decoder.layers[0].self_attention
    assert next(mixer.parameters()).dtype == torch.float32
    assert _random(2, 3, like=mixer).dtype == torch.bfloat16


def test_single_columns_of_block_tables_have_stride_one() -> None:
    """One block of attention rows, two of keys: flash-attn-4 refuses the strides that a transposed table brings."""
    layout = TokenLayout.of(parse_plan("last:64", 256, chunk=64), device=torch.device("cpu"))
    for table in (layout.keys_of_queries, layout.queries_of_keys, layout.by_token):
        assert all(part.stride(-1) == 1 for part in table)


def test_fp8_attention_only_where_transformer_engine_has_it(monkeypatch) -> None:
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setattr(platform, "transformer_engine_missing", lambda: None)
    monkeypatch.setattr(platform, "capability", lambda: (9, 0))
    monkeypatch.setattr(fused, "in_use", lambda: True)
    precision = PrecisionConfig(fp8="tensorwise", fp8_attention=True)
    with pytest.raises(ConfigError, match=r"precision.fp8_attention: .* tensorwise on this GPU; choose delayed"):
        transformer_config(load_model("tiny-gdn"), ParallelConfig(), precision)


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_what_a_fused_mlp_keeps(recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, step in fused_steps.replacements():
        monkeypatch.setattr(owner, name, step)
    model, layout = load_model("tiny-gdn"), ParallelConfig(recompute=recompute)
    mlp = build_chunk(transformer_config(model, layout, PrecisionConfig(dtype="fp32"), **FUSED)).decoder.layers[0].mlp
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    outputs: list[torch.Tensor] = []
    mlp.activation_func.register_forward_hook(lambda module, inputs, y: outputs.append(y))
    x = torch.randn(5, 1, model.hidden_size, requires_grad=True)
    output, _ = mlp(x)
    with torch.no_grad():
        mlp(x)
    kept, evaluated = (y.untyped_storage().size() > 0 for y in outputs)
    assert kept == (recompute == "none")
    assert evaluated
    output.square().sum().backward()
    assert torch.equal(outputs[0], outputs[1])


def test_in_fp8_no_swiglu_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setattr(platform, "transformer_engine_missing", lambda: None)
    monkeypatch.setattr(platform, "capability", lambda: (9, 0))
    monkeypatch.setattr(fused, "in_use", lambda: True)
    for fp8, again in (("none", True), ("tensorwise", False)):
        layout, precision = ParallelConfig(recompute="mixer"), PrecisionConfig(fp8=fp8)  # type: ignore[arg-type]
        assert transformer_config(load_model("tiny-gdn"), layout, precision).recompute_swiglu == again


def test_a_discarded_swiglu_is_gone_after_its_backward_pass(monkeypatch) -> None:
    """The loss of a microbatch, and with it its graph, lives until the next one has its own."""
    monkeypatch.setattr(fused, "_swiglu", fused_steps.swiglu_into)
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    hidden, y = x * 1.0, torch.empty(5, 4, requires_grad=True) * 1.0
    fused_steps.swiglu_into(hidden, y)
    (want,) = torch.autograd.grad((y @ weight).sum(), weight)
    output = y @ weight
    fused.discard_swiglu(y, hidden, output)
    assert y.untyped_storage().size() == 0
    held = weakref.ref(hidden.untyped_storage()), weakref.ref(y.untyped_storage())
    loss = output.sum()
    (found,) = torch.autograd.grad(loss, weight)
    assert torch.equal(found, want)
    del hidden, y
    assert [storage() for storage in held] == [None, None]
    assert loss.grad_fn is not None


def test_odd_heads_of_128_are_padded(monkeypatch) -> None:
    """Where flash_qla computes them it cannot take an odd number."""
    shapes = []

    def scan(q, k, v, *, g, beta, scale, initial_state, output_final_state):
        shapes.append([x.shape[2] for x in (q, k, v, g, beta)] + [initial_state.shape[1]])
        state = initial_state + torch.einsum("bshn,bshp->bhnp", k, v)
        return scale * torch.einsum("bshn,bhnp->bshp", q, state) * g.exp().unsqueeze(-1), state

    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = scan  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    for heads in (3, 4):
        q, k, v = (torch.randn(2, 5, heads, 128, requires_grad=True) for _ in "qkv")
        gates, initial = torch.randn(2, 5, heads, requires_grad=True), torch.randn(2, heads, 128, 128)
        o, state = delta_scan(q, k, v, gates, gates, initial=initial, final=True)
        want, last = scan(q, k, v, g=gates, beta=gates, scale=1.0, initial_state=initial, output_final_state=True)
        assert state is not None
        torch.testing.assert_close((o, state), (want, last))
        inputs = [q, k, v, gates]
        torch.testing.assert_close(torch.autograd.grad(o.sum(), inputs), torch.autograd.grad(want.sum(), inputs))
    assert shapes[0] == [4] * 6
    assert shapes[2] == [4] * 6


@pytest.mark.parametrize(("batch", "joined"), [(1, False), (2, True), (16, True), (17, False)])
def test_few_heads_go_to_flash_qla_as_one_sequence_with_bounds(monkeypatch, batch: int, joined: bool) -> None:
    """It fills a GPU with parts of sequences in a batch of one only. A GPU of 132 multiprocessors; 4 heads."""
    bounds = []

    def scan(q, k, v, *, g, beta, scale, initial_state, output_final_state, cu_seqlens=None):
        bounds.append(cu_seqlens)
        if cu_seqlens is not None:
            assert q.shape[0] == 1
            parts = cu_seqlens.diff().tolist()
            q, k, v, g = (torch.cat(x.split(parts, 1)) for x in (q, k, v, g))
        state = initial_state + torch.einsum("bshn,bshp->bhnp", k.float(), v.float())
        o = torch.einsum("bshn,bhnp->bshp", q.float(), state) * g.exp().unsqueeze(-1)
        o = o.to(q.dtype)
        return (o if cu_seqlens is None else o.flatten(0, 1).unsqueeze(0)), state

    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = scan  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    monkeypatch.setattr(platform, "multiprocessors", lambda: 132)
    monkeypatch.setattr(platform, "capability", lambda: (9, 0))
    monkeypatch.setattr(platform, "installed", lambda package: package == "flash_qla")
    q, k, v = (torch.randn(batch, 5, 4, 128, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    gates, initial = torch.randn(batch, 5, 4, requires_grad=True), torch.randn(batch, 4, 128, 128)
    for _ in range(2):
        o, state = delta_scan(q, k, v, gates, gates, initial=initial, final=True)
    assert (bounds[0] is not None) == joined
    assert bounds[0] is bounds[1]
    if joined:
        assert bounds[0].tolist() == [5 * i for i in range(batch + 1)]
    want, last = scan(q, k, v, g=gates, beta=gates, scale=1.0, initial_state=initial, output_final_state=True)
    assert state is not None
    torch.testing.assert_close((o, state), (want, last))
    inputs = [q, k, v, gates]
    torch.testing.assert_close(torch.autograd.grad(o.sum(), inputs), torch.autograd.grad(want.sum(), inputs))
    wide = torch.randn(batch, 5, 4, 64, dtype=torch.bfloat16)
    delta_scan(q, k, wide, gates, gates, initial=initial[..., :64], final=True)  # not flash_qla's
    assert bounds[-1] is None


def test_parameters_can_be_handed_to_another_optimizer() -> None:
    """As cpu_offload does: fp32 parameters of a bf16 model too, of which megatron-core keeps views."""
    run = tiny_run("gdn", precision=PrecisionConfig(dtype="bf16"))
    optimizer = build_optimizer(run, wrap(run, build_model(run.model, run.parallel, run.precision, seed=1)))
    groups = optimizer.param_groups
    assert {parameter.dtype for group in groups for parameter in group["params"]} == {torch.float32}
    assert all(parameter.is_leaf for group in groups for parameter in group["params"])


@pytest.mark.parametrize("overrides", [{}, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("mixer", ["gdn", "mamba2"])
def test_every_weight_is_made_on_the_device(mixer: str, overrides: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer without flat buffers takes parameters as they lie, and refuses one in host memory."""
    device = torch.device("meta")
    monkeypatch.setattr(platform, "device", lambda: device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)  # where megatron-core makes its own
    experts = MoEConfig(experts=4, top_k=2, ffn_hidden_size=8, shared_ffn_hidden_size=8, score="sigmoid")
    for moe in (None, experts, dataclasses.replace(experts, aux_loss=0.0, bias_update_rate=0.1)):
        changes: dict = {"mixer": mixer, "tie_embeddings": moe is None, "moe": moe, "mtp": MTPConfig(layers=1)}
        built = chunk(dataclasses.replace(load_model("tiny-gdn"), **changes), "bf16", **overrides)
        tensors = dict(built.named_parameters()) | dict(built.named_buffers())
        assert moe is None or any(name.endswith("router.weight") for name in tensors)
        assert not {name for name, tensor in tensors.items() if tensor.device != device}


@pytest.fixture
def no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in platform.KERNEL_CACHES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_caches")
def test_a_folder_for_every_kernel_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/own")
    platform.use_kernel_cache(str(tmp_path / "deep" / "kernels"))
    found = {name: os.environ[name] for name in platform.KERNEL_CACHES}
    assert found.pop("TRITON_CACHE_DIR") == "/own"
    assert found == {
        name: str(tmp_path / "deep" / "kernels" / part)
        for name, part in platform.KERNEL_CACHES.items()
        if name != "TRITON_CACHE_DIR"
    }


@pytest.mark.usefixtures("no_caches")
def test_a_kernel_cache_that_cannot_be_written_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As that of a run which is evaluated on another machine."""
    (tmp_path / "file").touch()
    platform.use_kernel_cache(str(tmp_path / "file" / "kernels"))
    assert not any(name in os.environ for name in platform.KERNEL_CACHES)
    assert f"kernels.cache_dir {tmp_path / 'file' / 'kernels'} is not used: Not a directory" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "available", "reason"),
    [
        ("bf16", 227, None),
        ("fp32", 227, "heads of 128 × 128 in fp32 need 328 KiB of shared memory; this GPU has 227"),
        ("bf16", 163, None),
        ("bf16", 99, "heads of 128 × 128 in bf16 need 112 KiB of shared memory; this GPU has 99"),
    ],
    ids=["H100", "H100 in fp32", "A100", "L40S"],
)
def test_the_scan_declines_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, dtype: str, available: int, reason: str | None
) -> None:
    """Rather than fail in the first backward pass; test_triton_compiles.py holds the figures."""
    monkeypatch.setattr(platform, "shared_memory", lambda: available << 10)
    assert scans._triton_declines(backends.Workload(load_model("1.4b-mamba2"), dtype)) == reason


def test_experts_multiplied_in_one_call_keep_their_gradients() -> None:
    """TransformerEngine's grouped linears ask the first weight whether all get gradients."""
    grouped = torch.nn.Module()
    for i in range(4):
        grouped.register_parameter(f"weight{i}", torch.nn.Parameter(torch.ones(2, 3)))
    model = torch.nn.Module()
    model.fc1, model.alone = grouped, torch.nn.Parameter(torch.ones(2))
    (group,) = _grouped(model)
    assert group == list(grouped.parameters())
    found = [(weight, {f"experts.{i}.fc1": slice(None)}) for i, weight in enumerate(group)]
    found.append((model.alone, {"alone": slice(None)}))
    wholly, partly = divide(found, ("experts.[01].*", "alone"), [group])
    assert [id(x) for x in wholly] == [id(model.alone)]
    assert [(id(x), rows) for x, rows in partly] == [(id(x), [slice(None)]) for x in group[:2]]
    wholly, partly = divide(found, ("experts.*",), [group])
    assert [id(x) for x in wholly] == [id(x) for x in group]
    assert partly == []


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_attention_written_out(dtype: torch.dtype) -> None:
    """What a compiled single query takes on a GPU, with the masks of the kernel that it stands for."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, length, 8) for heads, length in ((6, 1), (2, 13), (2, 13)))
    mask = torch.rand(3, 1, 1, 13) < 0.6
    mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    given = mask if dtype == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    found, _ = eager_attention_forward(module, query, key, value, given, scaling=0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, wanted.transpose(1, 2))


def test_masters_of_fp8_weights_begin_at_the_drawn_values() -> None:
    """megatron-core asks the weight for them; TransformerEngine gave it what memory held before it was drawn."""
    weight = torch.nn.Parameter(torch.full((8, 4), torch.nan, dtype=torch.bfloat16), requires_grad=False)
    weight._high_precision_init_val = weight.detach().cpu()
    weight.get_high_precision_init_val = lambda: weight._high_precision_init_val
    Slicer(None, 1).fill("in_proj", weight, normal_draw(0.02), axis=0, parts={"key": 2, "value": 6})
    assert weight.std() > 0.01
    assert torch.equal(weight.get_high_precision_init_val(), weight)
