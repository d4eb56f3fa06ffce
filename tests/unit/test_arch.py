"""Parameter, FLOP and memory arithmetic, against numbers worked out by hand."""

import json

import pytest

from oryx_megatron import arch
from oryx_megatron.config import load_model, preset_names
from oryx_megatron.config.schema import ModelConfig, MoEConfig, MTPConfig
from oryx_megatron.modes import plan_for

SIZES = ("tiny", "130m", "370m", "780m", "1.4b")
ORYX = [f"{size}-{mixer}" for size in SIZES for mixer in ("gdn", "mamba2")]


def small(**changes) -> ModelConfig:
    fields = {"name": "small", "mixer": "gdn", "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 10}
    fields |= {"num_heads": 4, "num_kv_heads": 2, "qk_head_dim": 3, "v_head_dim": 5, "vocab_size": 7, "conv_width": 4}
    return ModelConfig(**(fields | changes))


def by_name(model: ModelConfig) -> dict[str, int]:
    return {part.name: part.count for part in arch.parameter_counts(model).parts}


def test_counts_by_hand():
    """H=4, G=2, N=3, P=5, d=8, f=10, w=4, two layers."""
    assert by_name(small()) == {
        "embedding": 7 * 8,
        "in_proj.key": 2 * 6 * 8,
        "in_proj.value": 2 * 10 * 8,
        "in_proj.query_attention": 2 * 12 * 8,
        "in_proj.query_recurrent": 2 * 12 * 8,
        "in_proj.output_gate": 2 * 20 * 8,
        "conv": 2 * 16 * 4,
        "decay_proj": 2 * 8 * 8,
        "a_log, dt_bias": 2 * 8,
        "query_norm, key_norm": 2 * 6,
        "out_norm": 2 * 5,
        "out_proj": 2 * 20 * 8,
        "mlp": 2 * 240,
        "layer norms": 5 * 8,
    }
    counts = arch.parameter_counts(small())
    assert counts.attention_only == 192 + 12
    assert counts.recurrent_only == 192 + 128 + 16
    assert counts.shared == 96 + 160 + 320 + 128 + 10 + 320 + 480 + 40
    assert counts.non_embedding == 204 + 336 + 1554
    assert counts.total == counts.non_embedding + 56
    assert counts.share("attention") == 1554 / (1554 + 204)
    assert counts.share("recurrent") == 1554 / (1554 + 336)
    assert counts.share("whole") == 1554 / 2094
    assert counts.share("whole", embedding=True) == 1610 / 2150


def test_heads_by_hand():
    """Two heads, each a projection of two vectors to one and an attention layer (H=4, G=2, N=3, P=5, d=8, f=10)."""
    heads = small(mtp=MTPConfig(layers=2), pattern=("recurrent", "attention"))
    plain = small(pattern=("recurrent", "attention"))
    counts = arch.parameter_counts(heads)
    mixer = (6 + 10 + 12 + 20) * 8 + 16 * 4 + 2 * 3 + 5 + 20 * 8
    assert counts.of("mtp") == 2 * (2 * 64 + mixer + 3 * 8 * 10 + 5 * 8)
    assert counts.total == arch.parameter_counts(plain).total + counts.of("mtp")
    assert [counts.share(mode) for mode in ("attention", "recurrent", "whole")] == [1, 1, 1]
    flops = 2 * ((6 + 10 + 12 + 20) * 8 + 16 * 4 + 20 * 8 + 2 * 64 + 3 * 8 * 10 + 7 * 8) + 4 * 2 * (3 + 5) * 17 / 2
    for share in (0.0, 0.5):  # the head ignores the plan
        assert arch.mtp_flops_per_token(heads, 16, share) == 2 * flops
        without = arch.training_flops_per_token(plain, 16, share)
        assert arch.training_flops_per_token(heads, 16, share) == pytest.approx(without + 3 * 2 * flops)
        assert arch.flops_per_token(heads, 16, share) == arch.flops_per_token(plain, 16, share)
    assert f"\n  mtp projections{256:>24,}  mtp heads" in arch.table(heads, 16)


def test_experts_by_hand():
    """d=8, f=10; three layers, of which two have 6 experts of width 4, a shared one of width 5; a token takes 2."""
    moe = MoEConfig(experts=6, ffn_hidden_size=4, shared_ffn_hidden_size=5, first_dense=1)
    dense, sparse = small(num_layers=3), small(num_layers=3, moe=moe)
    parts = by_name(sparse)
    assert {name: n for name, n in parts.items() if by_name(dense).get(name) != n} == {
        "mlp": 3 * 8 * 10,
        "experts": 2 * 6 * 3 * 8 * 4,
        "router": 2 * 6 * 8,
        "shared experts": 2 * 3 * 8 * 5,
    }
    counts = arch.parameter_counts(sparse)
    assert counts.total - counts.active == 2 * 4 * 3 * 8 * 4
    assert arch.parameter_counts(dense).active == arch.parameter_counts(dense).total
    flops = arch.flops_per_token(sparse, 16, 0.5)
    assert flops["mlp"] == 2 * 240
    assert flops["experts"] == 2 * 2 * 2 * 96
    assert flops["router"] == 2 * 96
    assert flops["shared experts"] == 2 * 240
    assert "mlp" not in by_name(small(moe=MoEConfig(experts=2, ffn_hidden_size=4)))
    assert "active for a token" in arch.table(sparse, 16)


def test_counts_of_other_shapes():
    base = by_name(small())
    mamba2 = by_name(small(mixer="mamba2"))
    assert mamba2["decay_proj"] == 2 * 4 * 8
    assert mamba2["a_log, dt_bias, d"] == 2 * 12
    assert "a_log, dt_bias" not in mamba2
    assert base.keys() - by_name(small(modes="attention")).keys() == {
        "in_proj.query_recurrent",
        "decay_proj",
        "a_log, dt_bias",
    }
    assert base.keys() - by_name(small(modes="recurrent")).keys() == {"in_proj.query_attention", "query_norm, key_norm"}
    assert base.keys() - by_name(small(conv_width=0, output_gate=False)).keys() == {"conv", "in_proj.output_gate"}
    assert by_name(small(shared_query=True))["in_proj.query"] == 2 * 12 * 8
    assert arch.parameter_counts(small(shared_query=True)).attention_only == 12
    assert by_name(small(tie_embeddings=False))["output_layer"] == 56
    assert arch.parameter_counts(small(tie_embeddings=False)).embedding == 112


def test_1_4b_by_hand():
    """The paper's size: 14 d² per layer, and the small parts."""
    d, layers = 2048, 24
    counts = arch.parameter_counts(load_model("1.4b-gdn"))
    layer = 6 * d * d + 3 * d * 5504 + 2 * d * 4 + 2 * 16 * d + 2 * 16 + 2 * 128 + 128 + 2 * d
    assert counts.non_embedding == layers * layer + d == 1_417_654_016
    assert counts.embedding == 32768 * d
    assert counts.attention_only == layers * (d * d + 2 * 128)
    assert counts.recurrent_only == layers * (d * d + 2 * 16 * d + 2 * 16)
    assert abs(counts.non_embedding / (layers * 14 * d * d) - 1) < 0.01


@pytest.mark.parametrize("name", ORYX)
def test_shares(name):
    """At least 90 % of what a mode uses is shared; the whole-model share is what docs/model.md's 12/14 says."""
    counts = arch.parameter_counts(load_model(name))
    for mode in ("attention", "recurrent"):
        assert 0.90 <= counts.share(mode) < counts.share(mode, embedding=True) < 1
    assert 0.84 < counts.share("whole") < 0.87


@pytest.mark.parametrize("name", ORYX)
def test_baselines_are_of_equal_size(name):
    size, mixer = name.split("-")
    own = arch.parameter_counts(load_model(name))
    for baseline in (f"{size}-transformer", f"{name}-only", f"{name}-hybrid"):
        model = load_model(baseline)
        counts = arch.parameter_counts(model)
        assert abs(counts.non_embedding / own.non_embedding - 1) <= 0.02
        assert abs(counts.total / own.total - 1) <= 0.02
        assert model.num_layers == load_model(name).num_layers
    assert load_model(f"{name}-only").mixer == mixer
    assert load_model(f"{name}-only").modes == "recurrent"
    hybrid = load_model(f"{name}-hybrid")
    assert hybrid.mixer == mixer
    assert hybrid.layer_modes == ("recurrent", "recurrent", "recurrent", "attention") * (hybrid.num_layers // 4)


def test_hybrids_by_hand():
    """One layer of each kind: a layer holds and computes what its own mode needs, whatever the plan."""
    model = small(pattern=("recurrent", "attention"))
    counts = by_name(model)
    uniform = by_name(small())
    halved = (
        "in_proj.query_attention",
        "in_proj.query_recurrent",
        "decay_proj",
        "a_log, dt_bias",
        "query_norm, key_norm",
    )
    assert counts == {name: count // 2 if name in halved else count for name, count in uniform.items()}
    assert arch.parameter_counts(model).shared == arch.parameter_counts(model).non_embedding
    flops = {share: arch.flops_per_token(model, 9, share) for share in (0, 0.25, 1)}
    assert flops[0] == flops[0.25] == flops[1]
    single = {
        mode: arch.flops_per_token(small(modes=mode, num_layers=1), 9, mode == "attention")
        for mode in ("attention", "recurrent")
    }
    output = single["attention"].pop("output_layer")
    del single["recurrent"]["output_layer"]
    assert sum(flops[0].values()) == sum(sum(terms.values()) for terms in single.values()) + output
    assert arch.kv_bytes_per_token(model) == arch.kv_bytes_per_token(small()) // 2
    assert arch.state_bytes(model) == arch.state_bytes(small()) // 2
    assert arch.window_bytes(model) == arch.window_bytes(small())


def test_mixed_models_by_hand():
    """Oryx layers beside one of each kind: the plan decides in the Oryx layers alone."""
    model = small(pattern=("both*2", "attention", "recurrent"), num_layers=4)
    counts = arch.parameter_counts(model)
    parts = {part.name: part for part in counts.parts}
    assert (parts["in_proj.query_attention"].count, parts["in_proj.query_attention (fixed)"].count) == (192, 96)
    assert parts["in_proj.query_attention"].user == "attention"
    assert parts["in_proj.query_attention (fixed)"].user == "shared"
    assert counts.attention_only == 192 + 2 * 6
    attends, recurs = (arch.flops_per_token(model, 9, share) for share in (1, 0))
    assert attends["attention"] == 3 * arch.flops_per_token(small(), 9, 1)["attention"] / 2
    assert recurs["attention"] == arch.flops_per_token(small(), 9, 1)["attention"] / 2
    assert recurs["recurrence read"] == 3 * attends["recurrence read"] > 0


def test_plans_by_layer_by_hand():
    """Layer 0 attends alone and runs no recurrence; heads read the last layer's plan: a mean tells neither."""
    model = small(mtp=MTPConfig(layers=2))
    plan = plan_for(model.reads_plans, "layers:0=attention,1=recurrent", 9, chunk=3)
    terms = arch.flops_per_token(model, 9, plan.layer_shares)
    one = {share: arch.flops_per_token(small(num_layers=1), 9, share) for share in (0, 1)}
    output = one[0]["output_layer"]
    assert sum(terms.values()) == sum(map(sum, (one[0].values(), one[1].values()))) - output
    assert terms["recurrence update"] == arch.flops_per_token(model, 9, plan.attention_share)["recurrence update"] / 2
    assert arch.mtp_flops_per_token(model, 9, plan.layer_shares) == arch.mtp_flops_per_token(model, 9, 0.0)
    turned = plan_for(model.reads_plans, "layers:0=recurrent,1=attention", 9, chunk=3)
    assert arch.mtp_flops_per_token(model, 9, turned.layer_shares) == arch.mtp_flops_per_token(model, 9, 1.0)
    heads = 3 * (arch.mtp_flops_per_token(model, 9, 1.0) - arch.mtp_flops_per_token(model, 9, 0.0))
    differ = [arch.training_flops_per_token(model, 9, each.layer_shares) for each in (plan, turned)]
    assert differ[1] - differ[0] == pytest.approx(heads)
    hybrid = small(pattern=("both", "attention"), mtp=MTPConfig())  # what a layer of one mode is given does not matter
    assert arch.flops_per_token(hybrid, 9, (0.5, 0.0)) == arch.flops_per_token(hybrid, 9, 0.5)
    assert arch.mtp_flops_per_token(hybrid, 9, (0.5, 0.0)) == arch.mtp_flops_per_token(hybrid, 9, 1.0)
    with pytest.raises(ValueError, match="3 attention shares for the 2 layers"):
        arch.flops_per_token(model, 9, (1.0, 0.0, 0.0))


def test_flops_of_microbatches_are_not_those_of_their_mean_share():
    ends = [arch.training_flops_per_token(small(), 9, share) for share in (1.0, 0.0)]
    assert arch.mean_training_flops(small(), 9, [1.0, 0.0]) == sum(ends) / 2
    assert arch.mean_training_flops(small(), 9, [1.0, 0.0]) < arch.training_flops_per_token(small(), 9, 0.5)


@pytest.mark.parametrize("size", SIZES)
def test_transformers_are_plain(size):
    model = load_model(f"{size}-transformer")
    assert (model.modes, model.conv_width, model.output_gate) == ("attention", 0, False)


def test_flops_by_hand():
    """Two per multiply-add; s=9, so that a causal row sees 5 tokens on average; half of the tokens attend."""
    terms = arch.flops_per_token(small(), 9, 0.5)
    assert terms == {
        "in_proj.key": 2 * 96,
        "in_proj.value": 2 * 160,
        "in_proj.query_attention": 192,
        "in_proj.query_recurrent": 192,
        "in_proj.output_gate": 2 * 320,
        "conv": 2 * 128,
        "attention": 0.5 * 2 * 4 * 2 * 8 * 5,
        "decay_proj": 2 * 128,
        "recurrence update": 2 * 4 * 5 * 15,
        "recurrence read": 0.5 * 2 * 4 * 2 * 15,
        "out_proj": 2 * 320,
        "mlp": 2 * 480,
        "output_layer": 2 * 56,
    }
    assert arch.training_flops_per_token(small(), 9, 0.5) == 3 * sum(terms.values())
    assert arch.flops_per_token(small(mixer="mamba2"), 9, 0.5)["recurrence update"] == 2 * 4 * 3 * 15
    shared = arch.flops_per_token(small(shared_query=True), 9, 0.5)
    assert shared["in_proj.query"] == 2 * 192


def test_flops_at_the_ends():
    attention, recurrent = (arch.flops_per_token(small(), 9, share) for share in (1.0, 0.0))
    for name in ("decay_proj", "recurrence update", "recurrence read", "in_proj.query_recurrent"):
        assert attention[name] == 0 < recurrent[name]
    for name in ("attention", "in_proj.query_attention"):
        assert recurrent[name] == 0 < attention[name]
    plain = arch.flops_per_token(small(modes="attention"), 9, 1.0)
    assert sum(plain.values()) == sum(attention.values())
    plain = arch.flops_per_token(small(modes="recurrent"), 9, 0.0)
    assert sum(plain.values()) == sum(recurrent.values())


def test_flops_follow_parameters():
    """Without attention's and the recurrence's own work, a forward pass is two FLOPs per parameter used."""
    model = load_model("1.4b-gdn")
    counts = arch.parameter_counts(model)
    terms = arch.flops_per_token(model, 2048, 0.0)
    work = sum(terms.values()) - terms["recurrence update"] - terms["recurrence read"]
    assert work == pytest.approx(2 * (counts.shared + counts.recurrent_only + counts.embedding), rel=2e-4)


def test_flops_of_missing_modes():
    for model, share in ((small(modes="attention"), 0.5), (small(modes="recurrent"), 0.5), (small(), 1.1)):
        with pytest.raises(ValueError):
            arch.flops_per_token(model, 9, share)


def test_memory_by_hand():
    assert arch.kv_bytes_per_token(small()) == 2 * 2 * 8 * 2
    assert arch.state_bytes(small()) == 2 * 4 * 15 * 4
    assert arch.window_bytes(small()) == 2 * 2 * 8 * 3 * 2
    assert arch.window_bytes(small(conv_width=0)) == 0
    assert arch.kv_bytes_per_token(small(modes="recurrent")) == 0
    assert arch.state_bytes(small(modes="attention")) == 0


@pytest.mark.parametrize("name", preset_names())
def test_the_table_fits_80_columns(name, capsys):
    assert arch.main([name, "--sequence", "131072"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    total = arch.parameter_counts(load_model(name)).total
    assert any(line.split() == ["total", f"{total:,}"] for line in lines)


def test_json(capsys):
    assert arch.main(["tiny-gdn", "--json", "--sequence", "512"]) == 0
    data = json.loads(capsys.readouterr().out)
    counts = arch.parameter_counts(load_model("tiny-gdn"))
    assert data["parameters"]["total"] == counts.total
    assert sum(part["count"] for part in data["parameters"]["parts"].values()) == counts.total
    assert data["shares"]["non_embedding"]["attention"] == counts.share("attention")
    half = data["flops_per_token_by_attention_share"]["0.25"]
    assert half["training"] == arch.training_flops_per_token(load_model("tiny-gdn"), 512, 0.25)


def test_a_run_is_counted_at_its_own_length(capsys):
    """Its 4,096 tokens, unless the command names others."""
    run = "configs/run/pretrain-1.4b-gdn.yaml"
    for arguments, sequence in (([run], 4096), ([run, "--sequence", "512"], 512), (["1.4b-gdn"], 2048)):
        assert arch.main(arguments) == 0
        assert f"MFLOPs per token, s={sequence} " in capsys.readouterr().out


def test_models_that_cannot_be_read_are_named(tmp_path, capsys):
    assert arch.main(["1.4b-gnd"]) == 2
    assert "did you mean `1.4b-gdn`?" in capsys.readouterr().err
    bad = tmp_path / "bad.yaml"
    bad.write_text("preset: tiny-gdn\nnum_kv_heads: 3\n")
    assert arch.main([str(bad)]) == 2
    assert capsys.readouterr().err == f"error: {bad}: model.num_kv_heads 3 does not divide model.num_heads 4\n"
    assert arch.main(["tiny-gdn", "--sequence", "0"]) == 2
    assert "--sequence: 0 should be above 0" in capsys.readouterr().err
