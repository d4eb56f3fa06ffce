"""Config loading, overrides, the cross-field checks and their messages, the shipped files, the reference."""

import dataclasses
import inspect
import json
import typing
from pathlib import Path

import pytest
import yaml

from oryx_megatron.config import (
    Layout,
    ModelConfig,
    RunConfig,
    from_dict,
    load_model,
    load_run,
    loading,
    preset_names,
    to_dict,
    to_yaml,
    told_with_place,
    validate,
)
from oryx_megatron.config.__main__ import main as config_main
from oryx_megatron.config.bounds import Range, check_ranges, ranges
from oryx_megatron.config.pattern import layer_modes, pattern_of, period
from oryx_megatron.config.reference import field_docs, inner_class, reference
from oryx_megatron.config.schema import BlendEntry, MoEConfig
from oryx_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted((ROOT / "configs" / "run").glob("*.yaml"))
ATTENTION = ["modes.p_attention=1", "modes.p_recurrent=0", "evaluation.plans=[attention]"]
RECURRENT = ["modes.p_attention=0", "modes.p_recurrent=1", "evaluation.plans=[recurrent]"]

# Eight heads, eight layers: everything divides by 2, 4 and 8.
RUN = """\
model:
  name: small
  mixer: gdn
  num_layers: 8
  hidden_size: 128
  ffn_hidden_size: 256
  num_heads: 8
  qk_head_dim: 16
  v_head_dim: 16
  vocab_size: 512
data:
  sequence_length: 256
  tokenizer: tokenizers/small
  blend: [data/a, {path: data/b, weight: 3}]
train:
  iterations: 100
  global_batch_size: 16
modes:
  chunk: 32
output_dir: runs/small
"""


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def fault(run_file, *overrides, world_size=1) -> str:
    """The one-line message of a run that must not load or validate."""
    with pytest.raises(ConfigError) as error:
        validate(load_run(run_file, overrides), world_size)
    message = str(error.value)
    assert "\n" not in message
    return message


# Shipped files


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_shipped_runs(path):
    run = load_run(path)
    for world_size in {"quickstart": (2,), "own-text": (1, 2), "copies": (1,)}.get(path.stem, (1, 2, 8, 64)):
        layout = validate(run, world_size)
        assert layout.world_size == world_size
        sequences = layout.microbatches * layout.dp * run.train.micro_batch_size
        assert sequences == run.train.global_batch_size
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run


def test_shipped_names():
    assert {path.stem for path in RUNS} >= {"quickstart", "pretrain-130m-gdn", "pretrain-1.4b-gdn"}
    kinds = ("gdn", "mamba2", "transformer", "gdn-only", "mamba2-only", "gdn-hybrid", "mamba2-hybrid")
    assert set(preset_names()) >= {
        f"{size}-{kind}" for size in ("tiny", "130m", "370m", "780m", "1.4b") for kind in kinds
    }


@pytest.mark.parametrize("name", preset_names())
def test_presets_run(name):
    """Every preset trains under a run with its modes, on one rank and (heads allow) on two."""
    model = load_model(name)
    assert model.name == name
    extra = {None: [], "attention": ATTENTION, "recurrent": RECURRENT}[model.single_mode]
    run = load_run(ROOT / "configs" / "run" / "pretrain-130m-gdn.yaml", [f"model={name}", *extra])
    assert run.model == model
    validate(run, 1)
    validate(load_run(RUNS[0], [f"model={name}", *extra, "parallel.tensor=2", "parallel.pipeline=2"]), 4)
    if not name.startswith("tiny"):
        assert model.qk_head_dim == model.v_head_dim == 128
        assert model.vocab_size == 32768
        assert model.tie_embeddings


def test_quickstart():
    run = load_run(ROOT / "configs" / "run" / "quickstart.yaml")
    assert run.model == load_model("tiny-gdn")
    assert run.model.vocab_size == 8192
    assert validate(run, 2) == Layout(
        tp=2,
        pp=1,
        vpp=1,
        cp=1,
        dp=1,
        microbatches=run.train.global_batch_size // run.train.micro_batch_size,
        stage_layers=(run.model.num_layers,),
    )


# Loading


def test_values_of_a_file_are_read_with_their_types(run_file):
    run = load_run(run_file)
    assert run.data.blend == (BlendEntry(path="data/a"), BlendEntry(path="data/b", weight=3.0))
    assert isinstance(run.data.blend[1].weight, float)
    assert run.model.kv_heads == 8
    assert run.modes.p_attention == 0.25


def test_round_trip(run_file, tmp_path):
    run = load_run(
        run_file, ["data.validation={web: [data/v]}", "modes.schedule=[{start: 5, p_attention: 0, p_recurrent: 1}]"]
    )
    assert run.data.validation == {"web": (BlendEntry(path="data/v"),)}
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(run))
    assert load_run(again) == run


def test_overrides(run_file):
    run = load_run(
        run_file,
        [
            "train.iterations=7",
            "optimizer.lr=3e-4",
            "optimizer.weight_decay=0",
            "evaluation.plans=[attention, 'ratio:0.5']",
            "data.blend=[{path: x, weight: 2}, y]",
            "model.num_layers=2",
            "model.num_kv_heads=4",
            "model.num_kv_heads=null",
            "precision={dtype: fp32}",
            "output_dir=runs/a=b",
            "data.validation.web=[v]",
        ],
    )
    assert run.train.iterations == 7
    assert run.optimizer.lr == 3e-4
    assert run.optimizer.weight_decay == 0.0
    assert run.evaluation.plans == ("attention", "ratio:0.5")
    assert run.data.blend == (BlendEntry(path="x", weight=2.0), BlendEntry(path="y"))
    assert run.model.num_layers == 2
    assert run.model.num_kv_heads is None
    assert run.precision.dtype == "fp32"
    assert run.output_dir == "runs/a=b"
    assert run.data.validation == {"web": (BlendEntry(path="v"),)}


def test_old_names_are_read_with_a_note(run_file, tmp_path, caplog):
    """Run files, model files, overrides and manifests of 0.1, each with the names of that time."""
    loading._note.cache_clear()
    old = tmp_path / "old.yaml"
    text = RUN.replace("qk_head_dim", "key_width").replace("v_head_dim: 16", "value_width: 16\n  rotary_base: 5e3")
    old.write_text(text + "faults: {returns: 5}\n")
    run = load_run(old)
    assert (run.model.qk_head_dim, run.model.v_head_dim, run.model.rope_theta) == (16, 16, 5e3)
    assert run.faults.max_rollbacks == 5
    notes = {f"config: `{a}` is now `{b}`; the old name is read until 0.4" for a, b in (
        ("model.key_width", "model.qk_head_dim"), ("model.value_width", "model.v_head_dim"),
        ("model.rotary_base", "model.rope_theta"), ("faults.returns", "faults.max_rollbacks"),
    )}  # fmt: skip
    assert {record.getMessage() for record in caplog.records} == notes
    assert len(caplog.records) == len(notes)
    assert load_run(old, ["model.rope_theta=7", "faults.max_rollbacks=1"]).model.rope_theta == 7
    assert load_run(old, ["model.rotary_base=7", "faults.returns=1"]).faults.max_rollbacks == 1
    assert load_run(run_file, ["faults={returns: 2}", "model={preset: tiny-gdn, rotary_base: 9}"]).model.rope_theta == 9
    assert from_dict(RunConfig, to_dict(run) | {"faults": {"returns": 4}}).faults.max_rollbacks == 4
    preset = tmp_path / "old-model.yaml"
    preset.write_text(yaml.safe_dump(yaml.safe_load(text)["model"]))
    assert load_run(run_file, [f"model={{preset: {preset}, rope_theta: 8}}"]).model.rope_theta == 8
    message = fault(run_file, "model={preset: tiny-gdn, rotary_base: 9, rope_theta: 9}")
    assert "`model.rotary_base` is the old name of `model.rope_theta`: remove one of the two" in message


def test_keys_that_had_no_effect(run_file: Path) -> None:
    """Checkpoints of a day hold `moe.freeze`, empty; with a value it is as unknown as any."""
    experts = "model.moe={experts: 4, ffn_hidden_size: 32, freeze: FREEZE}"
    assert load_run(run_file, [experts.replace("FREEZE", "[]")]).model.moe == MoEConfig(experts=4, ffn_hidden_size=32)
    with pytest.raises(ConfigError, match=r"unknown key `model\.moe\.freeze`"):
        load_run(run_file, [experts.replace("FREEZE", "['*']")])


def test_model_by_name_path_and_change(run_file, tmp_path):
    data = yaml.safe_load(RUN)
    (tmp_path / "mine.yaml").write_text("preset: tiny-gdn\nnum_layers: 3\n")

    def model(value, *overrides):
        run_file.write_text(yaml.safe_dump({**data, "model": value}))
        return load_run(run_file, overrides).model

    tiny = load_model("tiny-gdn")
    assert model("tiny-gdn") == tiny
    assert model("tiny-gdn", "model.num_layers=2") == dataclasses.replace(tiny, num_layers=2)
    assert model("tiny-gdn", "model=tiny-mamba2", "model.num_layers=2").mixer == "mamba2"
    assert model({"preset": "tiny-gdn", "name": "x"}) == dataclasses.replace(tiny, name="x")
    assert model({"preset": "tiny-gdn", "name": "x"}, "model.num_layers=2").num_layers == 2
    assert model("mine.yaml") == dataclasses.replace(tiny, num_layers=3)
    assert model({"preset": "mine.yaml", "num_heads": 2}).num_layers == 3
    assert load_model(str(tmp_path / "mine.yaml")) == dataclasses.replace(tiny, num_layers=3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train:", "trian:", "unknown key `trian`; did you mean `train`?"),
        ("iterations:", "iteratons:", "unknown key `train.iteratons`; did you mean `train.iterations`?"),
        ("  num_heads:", "  heads: 3\n  num_heads:", "unknown key `model.heads`; did you mean `model.num_heads`?"),
        ("weight: 3", "wieght: 3", "unknown key `data.blend[1].wieght`; did you mean `data.blend[1].weight`?"),
        ("chunk: 32", "zzz: 32", "unknown key `modes.zzz`; known: chunk, p_attention"),
        ("iterations: 100", "iterations: many", "train.iterations: expected integer, got 'many' (str)"),
        ("iterations: 100", "iterations: 1.5", "train.iterations: expected integer, got 1.5 (float)"),
        ("iterations: 100", "iterations: true", "train.iterations: expected integer, got True (bool)"),
        ("  iterations: 100\n", "", "`train.iterations` is missing (integer)"),
        ("weight: 3", "weight: heavy", "data.blend[1].weight: expected number, got 'heavy' (str)"),
        ("mixer: gdn", "mixer: gnd", "model.mixer: expected one of gdn | mamba2, got 'gnd' (str); did you mean `gdn`?"),
        ("mixer: gdn", "num_kv_heads: all", "model.num_kv_heads: expected integer, got 'all' (str)"),
        ("mixer: gdn", "num_kv_heads: [1]", "model.num_kv_heads: expected integer or null, got [1] (list)"),
        ("mixer: gdn", "qk_norm: 1", "model.qk_norm: expected true or false, got 1 (int)"),
        ("mixer: gdn", "dt_init: [0.1]", "model.dt_init: expected list of 2 × number, got [0.1] (list)"),
        ("output_dir: runs/small", "output_dir: 3", "output_dir: expected text, got 3 (int)"),
        (
            "blend: [data/a,",
            "validation: 3\n  blend: [data/a,",
            "data.validation: expected mapping of names to list of Blend",
        ),
        ("modes:\n  chunk: 32", "modes: 3", "modes: expected a mapping of ModesConfig fields, got 3 (int)"),
        ("  chunk: 32", "  chunk: 32\n  chunk: 64", "line 20, column 3: not valid YAML: key `chunk` is given twice"),
        ("  chunk: 32", "  32: 1", "line 19, column 3: not valid YAML: key 32 is not a name"),
        ("{path: data/b", "{{path: data/b", "not valid YAML: "),
        (RUN, "", "expected `name: value` lines, found nothing"),
        (RUN, "train:\n\titerations: 3\n", "indent with spaces, not tabs"),
        (RUN, "- a\n", "expected `name: value` lines, found ['a'] (list)"),
    ],
)
def test_faults_in_files(run_file, old, new, message):
    assert old in RUN
    run_file.write_text(RUN.replace(old, new, 1))
    text = fault(run_file)
    assert text.startswith(str(run_file))
    assert message in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.iterations", "expected key=value"),
        ("=3", "expected key=value"),
        ("train..iterations=3", "expected key=value"),
        ("trian.iterations=3", "unknown key `trian`; did you mean `train`?"),
        ("train.iteratons=3", "unknown key `train.iteratons`; did you mean `train.iterations`?"),
        ("model.num_head=3", "unknown key `model.num_head`; did you mean `model.num_heads`?"),
        ("train.iterations.x=3", "`train.iterations` is one value (integer), it has no `x`"),
        ("train.iterations=x", "train.iterations: expected integer, got 'x' (str)"),
        ("train=3", "train: expected a mapping of TrainConfig fields, got 3 (int)"),
        ("evaluation.plans=attention", "evaluation.plans: expected list of text, got 'attention' (str)"),
        ("evaluation.plans=[", "not valid YAML"),
        ("train.freeze=[*mlp*]", """begins with * or ! needs quotes of its own, in a shell '["*", "!*b"]'"""),
        ("train.freeze=!*mlp*", "begins with * or ! needs quotes of its own"),
        ("init_from=", "override `init_from=`: has no value; write init_from=null for none"),
    ],
)
def test_faults_in_overrides(run_file, override, message):
    text = fault(run_file, override)
    assert text.startswith(f"override `{override}`")
    assert message in text


def test_faulty_files(tmp_path, run_file):
    assert fault(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such config file"
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    assert "latin.yaml: cannot be read: 'utf-8' codec" in fault(tmp_path / "latin.yaml")
    assert "run.yaml: model: no preset `tiny-gnd`; did you mean `tiny-gdn`?" in fault(run_file, "model=tiny-gnd")
    assert "model: no such config file none.yaml" in fault(run_file, "model=none.yaml")
    assert "model: expected a preset's name, a path or a mapping, got 3" in fault(run_file, "model=3")
    assert "model.preset: expected a preset's name or a path, got 3" in fault(run_file, "model={preset: 3}")
    (tmp_path / "bad.yaml").write_text("preset: tiny-gdn\nlayers: 3\n")
    assert fault(run_file, "model=bad.yaml").startswith(f"{tmp_path}/bad.yaml: unknown key `layers`")
    (tmp_path / "circle.yaml").write_text("preset: circle.yaml\n")
    assert "circle" in fault(run_file, "model=circle.yaml")
    with pytest.raises(ConfigError, match="no preset `tiny`; did you mean"):
        load_model("tiny")


@pytest.mark.parametrize(
    ("pattern", "layers", "modes"),
    [
        (("recurrent*3", "attention"), 8, "rrrarrra"),
        (("both",), 3, "bbb"),
        (("attention", "both * 2", "recurrent"), 4, "abbr"),
        (("recurrent*2", "recurrent", "attention"), 4, "rrra"),
    ],
)
def test_patterns(pattern, layers, modes):
    found = layer_modes(pattern, layers)
    assert "".join(mode[0] for mode in found) == modes
    assert layer_modes(pattern_of(found), layers) == found
    assert sum(len(period((entry,))) for entry in pattern_of(found)) <= len(period(pattern))


def test_what_a_pattern_makes_of_a_model(run_file):
    """Hybrids take any plan, and ignore it; a pattern of one mode is that baseline."""
    hybrid = load_run(run_file, ["model.pattern=[recurrent*3, attention]"])
    validate(hybrid, 1)
    model = hybrid.model
    assert (model.has_attention, model.has_recurrence, model.takes_plans, model.single_mode) == (
        True,
        True,
        False,
        None,
    )
    assert model.ignores_plans
    assert not load_model("tiny-gdn").ignores_plans
    assert not load_model("tiny-gdn-only").ignores_plans
    assert load_run(run_file, ["model.pattern=[attention]"]).model.single_mode == "attention"
    mixed = load_run(run_file, ["model.pattern=[both, recurrent]", "model.shared_query=true"]).model
    assert mixed.takes_plans
    assert [mixed.with_modes(modes).shared_query for modes in ("both", "recurrent")] == [True, False]


# Bounds of single numbers


def config_classes(cls: type = RunConfig) -> list[type]:
    inner = [inner_class(kind) for kind in loading.field_types(cls).values()]
    return [cls, *(found for kind in inner if kind is not None for found in config_classes(kind))]


NUMBERS = [
    (cls, name, loading.without_null(kind))
    for cls in dict.fromkeys(config_classes())
    for name, kind in loading.field_types(cls).items()
    if loading.without_null(kind) in (int, float)
]


@pytest.mark.parametrize(("cls", "name", "kind"), NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_every_number_has_bounds_and_is_held_to_them(cls, name, kind):
    bounds = ranges(cls)[name]
    low = bounds.ge if bounds.ge is not None else bounds.gt
    high = bounds.le if bounds.le is not None else bounds.lt
    outside = [low - 1] + ([] if bounds.gt is None else [low]) + ([] if high is None else [high + 1])
    outside += [] if bounds.lt is None else [high]
    inside = [low if bounds.gt is None else low + 1e-9] + ([] if bounds.le is None else [high])
    values = [kind(x) for x in outside] + ([float("nan"), float("inf"), -float("inf")] if kind is float else [])
    required = {field.name: None for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    for value in values:
        with pytest.raises(ConfigError) as error:
            check_ranges(cls(**(required | {name: value})), "here")
        message = str(error.value)
        assert message.startswith(f"here.{name}: {value} should ")
        assert "\n" not in message
    for value in inside:
        check_ranges(cls(**(required | {name: kind(value)})), "here")


AS_A_WHOLE = {"split", "decay_init", "dt_init"}
"""Lists whose numbers are checked together, below."""
LISTS = [
    (cls, name, loading.without_null(kind))
    for cls in dict.fromkeys(config_classes())
    for name, kind in loading.field_types(cls).items()
    if typing.get_origin(loading.without_null(kind)) is tuple
    and {int, float} & set(typing.get_args(loading.without_null(kind)))
    and name not in AS_A_WHOLE
]


@pytest.mark.parametrize(("cls", "name", "kind"), LISTS, ids=lambda x: getattr(x, "__name__", x))
def test_every_number_of_a_list_has_bounds_and_is_held_to_them(cls, name, kind):
    one, *rest = typing.get_args(kind)
    good, bad = one(1), one(-1)
    required = {field.name: None for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    for place in (0, 1):
        value = [good] * (2 if rest == [Ellipsis] else len(rest) + 1)
        check_ranges(cls(**(required | {name: tuple(value)})), "here")
        value[place] = bad
        with pytest.raises(ConfigError, match=rf"^here\.{name}\[{place}\]: {bad} should (not be negative|be above 0)$"):
            check_ranges(cls(**(required | {name: tuple(value)})), "here")
    row = next(row for row in reference().splitlines() if row.startswith(f"| `{name}` | list"))
    assert f" | each {ranges(cls)[name].words()} | " in row


def test_bounds_are_in_the_reference():
    table = reference()
    for cls, name, _ in NUMBERS:
        rows = table[table.index(f"\n{inspect.getdoc(cls)}\n") :].splitlines()
        assert f" | {ranges(cls)[name].words()} | " in next(row for row in rows if row.startswith(f"| `{name}` |"))


@pytest.mark.parametrize(
    ("bounds", "words", "wrong"),
    [
        (Range(ge=1), "at least 1", {0: "should be above 0", -3: "should be above 0"}),
        (Range(ge=0), "at least 0", {-1: "should not be negative"}),
        (Range(gt=0), "above 0", {0.0: "should be above 0", float("inf"): "should be above 0 and finite"}),
        (Range(ge=8), "at least 8", {7: "should be at least 8"}),
        (Range(ge=1, le=3), "1, 2 or 3", {4: "should be 1, 2 or 3", 0: "should be 1, 2 or 3"}),
        (Range(ge=0, le=1024), "from 0 to 1024", {-1: "should not be negative", 1025: "should be at most 1024"}),
        (Range(ge=0, lt=1), "at least 0 and below 1", {1.0: "should be at least 0 and below 1"}),
        (Range(ge=0, le=1, what="a share"), "from 0 to 1", {1.5: "should be a share from 0 to 1"}),
        (Range(ge=0, lt=2**32), "at least 0 and below 2³²", {2**32: "should be below 2³²"}),
    ],
)
def test_words_of_bounds(bounds, words, wrong):
    assert bounds.words() == words
    assert {value: bounds.why_not(value) for value in wrong} == wrong


def test_bounds_reach_lists_and_mappings(run_file):
    path = ["data.validation={web: [{path: a, weight: .nan}]}"]
    assert fault(run_file, *path) == "data.validation.web[0].weight: nan should be above 0 and finite"
    assert "data.stages[0].start: -1 should not be negative" in fault(run_file, "data.stages=[{start: -1, blend: [a]}]")


# Cross-field checks


@pytest.mark.parametrize(
    ("world_size", "overrides", "layout"),
    [
        (1, [], Layout(tp=1, pp=1, vpp=1, cp=1, dp=1, microbatches=16, stage_layers=(8,))),
        (8, ["parallel.tensor=2", "parallel.pipeline=2"], Layout(2, 2, 1, 1, 2, 8, (4, 4))),
        (8, ["parallel.tensor=2", "parallel.context=4"], Layout(2, 1, 1, 4, 1, 16, (8,))),
        (4, ["parallel.pipeline=4", "parallel.virtual_pipeline=2"], Layout(1, 4, 2, 1, 1, 16, (2, 2, 2, 2))),
        (4, ["parallel.pipeline=4", "parallel.first_stage_layers=2", "parallel.last_stage_layers=4",
             "model.num_layers=10"], Layout(1, 4, 1, 1, 1, 16, (2, 2, 2, 4))),
        (2, ["parallel.pipeline=2", "parallel.first_stage_layers=3"], Layout(1, 2, 1, 1, 1, 16, (3, 5))),
        (2, ["parallel.pipeline=2", "parallel.first_stage_layers=3", "parallel.last_stage_layers=5"],
         Layout(1, 2, 1, 1, 1, 16, (3, 5))),
        (2, ["train.micro_batch_size=4"], Layout(1, 1, 1, 1, 2, 2, (8,))),
    ],
)  # fmt: skip
def test_a_valid_layout_is_computed(run_file, world_size, overrides, layout):
    result = validate(load_run(run_file, overrides), world_size)
    assert result == layout
    assert result.world_size == world_size


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_layers=0"], "model.num_layers: 0 should be above 0"),
        (["model.num_kv_heads=3"], "model.num_kv_heads 3 does not divide model.num_heads 8"),
        (["model.conv_width=1"], "model.conv_width: 1 should be 0 (no convolution) or at least 2"),
        (["model.qk_head_dim=15"], "model.qk_head_dim 15 should be even for rotary embedding"),
        (["model.rope_scaling={rope_type: dynamic, factor: 4}"], "rope_scaling.rope_type: expected one of linear"),
        (
            ["model.rope_scaling={rope_type: yarn, factor: 4}"],
            "original_max_position_embeddings: is missing; rope_type",
        ),
        (
            ["model.rope_scaling={rope_type: linear, factor: 0.5}"],
            "model.rope_scaling.factor: 0.5 should be at least 1",
        ),
        (
            ["model.rope_scaling={rope_type: linear, factor: 2, mscale: 1}"],
            "mscale: has no effect with rope_type linear",
        ),
        (
            ["model.rope_scaling={rope_type: linear, factor: 2, low_freq_factor: 1}"],
            "low_freq_factor: has no effect with rope_type",
        ),
        (
            ["model.rope_scaling={rope_type: yarn, factor: 4, original_max_position_embeddings: 64, rope_theta: 5e5}"],
            "rope_scaling.rope_theta: 500000 is not model.rope_theta 10000; set that one",
        ),
        (
            ["model.rope_scaling={rope_type: yarn, factor: 4, original_max_position_embeddings: 64, beta_fast: 1}"],
            "beta_fast: should be above beta_slow; unset they are 32 and 1",
        ),
        (
            ["model.rope_scaling={rope_type: yarn, factor: 4, original_max_position_embeddings: 64, mscale: 1}"],
            "mscale: has an effect with mscale_all_dim alone; set both or none",
        ),
        (
            [
                "model.rotary=none",
                "model.rope_scaling={rope_type: yarn, factor: 4, original_max_position_embeddings: 64}",
            ],
            "model.rope_scaling: this model has no rotary embedding in attention",
        ),
        (
            ["model.rope_scaling={rope_type: yarn, factor: 4, original_max_position_embeddings: 64, type: yarn}"],
            "unknown key `model.rope_scaling.type`; did you mean",
        ),
        (
            ["model.shared_query=true", "model.modes=attention"],
            "model.shared_query: a model with modes=attention has one",
        ),
        (["model.pattern=[recurent*3, attention]"], "model.pattern[0]: `recurent*3` should be both, attention or"),
        (["model.pattern=[both, recurrent*0]"], "model.pattern[1]: `recurrent*0` should be both, attention or"),
        (["model.pattern=[3*both]"], "model.pattern[0]: `3*both` should be both, attention or recurrent, with `*N`"),
        (
            ["model.pattern=[recurrent*2, attention]"],
            "model.num_layers 8 is not divisible by the 3 layers of model.pattern; use 6 or 9",
        ),
        (["model.pattern=[both*16]"], "model.num_layers 8 is not divisible by the 16 layers of model.pattern; use 16"),
        (
            ["model.pattern=[recurrent, attention]", "model.modes=attention"],
            "model.modes: attention, but model.pattern (recurrent, attention) has those of each layer; remove one",
        ),
        (
            ["model.pattern=[recurrent, attention]", "model.shared_query=true"],
            "model.shared_query: a model with model.pattern has one query",
        ),
        (["model.pattern=[recurrent]"], "modes: model small has only the mode recurrent: set p_attention: 0"),
        (["logging.profile=[0, 2]"], "logging.profile[0]: 0 should be above 0"),
        (["logging.profile=[101, 102]"], "logging.profile: step 101 is after train.iterations 100"),
        (["logging.profile=[1, 2]", "logging.profile_ranks=[]"], "logging.profile_ranks: names no rank; name one"),
        (["checkpoint.steps=[3, -1]"], "checkpoint.steps[1]: -1 should not be negative"),
        (["schedule.restarts=[0]"], "schedule.restarts[0]: 0 should be above 0"),
        (["model.dt_init=[0.1, 0.01]"], "model.dt_init: [0.1, 0.01] should be 0 < low ≤ high"),
        (["model.decay_init=[0, 1]"], "model.decay_init: [0.0, 1.0] should be 0 < low ≤ high"),
        (["model.decay_init=[1, .inf]"], "model.decay_init: [1.0, inf] should be 0 < low ≤ high, and finite"),
        (["model.dt_init=[.nan, 1]"], "model.dt_init: [nan, 1.0] should be 0 < low ≤ high, and finite"),
        (["modes.chunk=100"], "data.sequence_length 256 is not divisible by modes.chunk 100; use 200 or 300"),
        (["modes.chunk=0"], "modes.chunk: 0 should be above 0"),
        (["modes.p_attention=1.5"], "modes.p_attention: 1.5 should be a probability from 0 to 1"),
        (["modes.p_recurrent=-.5"], "modes.p_recurrent: -0.5 should be a probability"),
        (["modes.p_recurrent=.nan"], "modes.p_recurrent: nan should be a probability"),
        (["modes.p_attention=0.8"], "modes: p_attention 0.8 + p_recurrent 0.25 is more than 1"),
        (
            ["modes.schedule=[{start: 3, p_attention: 1, p_recurrent: 1}]"],
            "modes.schedule[0]: p_attention 1.0 + p_recurrent 1.0 is more than 1",
        ),
        (
            ["modes.schedule=[{start: 100, p_attention: 1, p_recurrent: 0}]"],
            "modes.schedule[0].start: 100 is not within the run's 100 iterations",
        ),
        (
            ["modes.schedule=[{start: 9, p_attention: 1, p_recurrent: 0}, {start: 9, p_attention: 0, p_recurrent: 0}]"],
            "modes.schedule[1].start: 9 should be after the stage before it at 9",
        ),
        (
            ["modes.schedule=[{start: 9, p_attention: 1, p_recurrent: 0}]", "modes.fixed=attention"],
            "modes.fixed: a fixed plan and modes.schedule exclude each other",
        ),
        (["modes.fixed=half"], "modes.fixed: mode plan `half`: unknown form"),
        (
            ["evaluation.plans=[attention, 'prefix:300']"],
            "evaluation.plans[1]: mode plan `prefix:300`: 300 tokens are more",
        ),
        (["evaluation.plans=[attention, attention]"], "evaluation.plans: a plan is given twice"),
        (["evaluation.plans=['prompt:attention,new:recurrent']"], "there is no prompt here"),
        (["evaluation.plans=['ratio:0.1']"], "`ratio:0.1` gives no attention at all: the 256 tokens are only 8 chunks"),
        (["evaluation.plans=['every:9']"], "`every:9` gives no attention at all"),
        (["evaluation.plans=['router:0.1']"], "evaluation.plans[0]: `router:0.1` needs a router: set `router: {}`"),
        (["router={}", "evaluation.plans=['router:2']"], "evaluation.plans[0]: mode plan `router:2`: `2` is not"),
        (["router={}", "modes.fixed=router:0.1"], "modes.fixed: mode plan `router:0.1`: a router chooses by the text"),
        (["router.heads=3"], "router.width 64 is not divisible by router.heads 3"),
        (["router.texts=0"], "router.texts: 0 should be above 0"),
        (["router={}", "data.split=[1,0,0]"], "router: needs validation texts; data.split [1.0, 0.0, 0.0] leaves none"),
        (["router={}", "output_dir=s3://bucket/run"], "router: output_dir s3://bucket/run is not on this machine"),
        (["router={}", *RECURRENT, "model.modes=recurrent"], "router: no layer of model small reads a mode plan"),
        (
            ["model.modes=attention"],
            "modes: model small has only the mode attention: set p_attention: 1 and p_recurrent: 0, or modes.fixed",
        ),
        (["model.modes=recurrent", "modes.fixed=recurrent"], "evaluation.plans[0]: `attention` is not all recurrent"),
        (["model.modes=recurrent", "modes.fixed=every:1"], "modes.fixed: `every:1` is not all recurrent"),
        (["data.blend=[]"], "data.blend: no dataset"),
        (["data.blend=[{path: a, weight: 0}]"], "data.blend[0].weight: 0.0 should be above 0"),
        (["data.blend=['']"], "data.blend[0].path: is empty"),
        (["data.stages=[{start: 5, blend: []}]"], "data.stages[0].blend: no dataset"),
        (["data.stages=[{start: 200, blend: [a]}]"], "data.stages[0].start: 200 is not within the run's 100"),
        (["data.split=[0, 1, 1]"], "data.split: [0.0, 1.0, 1.0] should be sizes"),
        (["data.split=[2, -1, 1]"], "data.split: [2.0, -1.0, 1.0] should be sizes"),
        (["data.validation={valid: [a]}"], "data.validation.valid: `valid` is the split's own part"),
        (["data.validation={train: [a]}"], "data.validation.train: `train` is the split's own part"),
        (
            ["data.blend=[a, b, ./a]"],
            "data.blend[2].path: ./a is there already; name it once, with the sum of the weights",
        ),
        (
            ["schedule.name=constant", "schedule.min_lr=1e-4"],
            "schedule.min_lr: has no effect with schedule.name constant",
        ),
        (
            ["schedule.decay_shape=linear"],
            "schedule.decay_shape: has no effect without schedule.name wsd; use that, or",
        ),
        (["optimizer.muon_momentum=0.9"], "optimizer.muon_momentum: has no effect without optimizer.name muon"),
        (["modes.layer_groups=3"], "modes.layer_groups: has no effect without modes.p_layers; set that, or remove it"),
        (["modes.prompt='prompt:recurrent,new:attention'"], "modes.prompt: has no effect without modes.p_prompt"),
        (["faults.spike_window=32"], "faults.spike_window: has no effect without faults.spike"),
        (
            ["faults.bad_steps=0", "faults.max_rollbacks=1"],
            "faults.max_rollbacks: has no effect with faults.bad_steps 0",
        ),
        (
            ["parallel.recompute=swiglu", "precision.fp8=tensorwise"],
            "parallel.recompute: swiglu has no effect with precision.fp8, which keeps a narrower copy of it",
        ),
        (
            ["parallel.recompute=swiglu", "precision.fp4=nvfp4"],
            "parallel.recompute: swiglu has no effect with precision.fp4",
        ),
        (
            ["parallel.recompute=swiglu", "kernels.mixer=reference"],
            "parallel.recompute: swiglu has no effect with kernels.mixer reference",
        ),
        (
            ["parallel.recompute=swiglu", "model.moe={experts: 4, ffn_hidden_size: 32}"],
            "parallel.recompute: swiglu has no effect with experts in every layer",
        ),
        (["logging.profile_ranks=[1]"], "logging.profile_ranks: has no effect without logging.profile; set that, or"),
        (
            ["model.moe={experts: 4, ffn_hidden_size: 32, aux_loss: 0, aux_loss_over: sequence}"],
            "model.moe.aux_loss_over: has no effect with model.moe.aux_loss 0; raise that, or remove it",
        ),
        (["data.stages=[{start: 0, blend: [b]}]"], "data.blend: has no effect in training, data.stages[0] takes over"),
        (
            ["evaluation.plans=[runs:a0-64,r64-end]"],
            """plan with commas needs quotes of its own, in a shell '["runs:a0-32,r32-end"]'""",
        ),
        (["evaluation.plans=[layers:0=attention, rest=recurrent]"], "a plan with commas needs quotes of its own"),
        (["evaluation.plans=[prompt:attention,new:recurrent]"], "a plan with commas needs quotes of its own"),
        (["seed=4294967296"], "seed: 4294967296 should be below 2³²"),
        (["data.validation={web: []}"], "data.validation.web: no dataset"),
        (["data.num_workers=-1"], "data.num_workers: -1 should not be negative"),
        (["data.tokenizer=''"], "data.tokenizer: is empty"),
        (["train.iterations=0"], "train.iterations: 0 should be above 0"),
        (["train.exit_after=101"], "train.exit_after: 101 is not within the run's 100 iterations"),
        (["optimizer.lr=0"], "optimizer.lr: 0.0 should be above 0"),
        (["optimizer.lr=.inf"], "optimizer.lr: inf should be above 0"),
        (["optimizer.beta2=1"], "optimizer.beta2: 1.0 should be at least 0 and below 1"),
        (["optimizer.clip_grad=-1"], "optimizer.clip_grad: -1.0 should not be negative"),
        (["schedule.warmup=101"], "schedule.warmup: 101 should be from 0 to 99, below train.iterations"),
        (["schedule.min_lr=1"], "schedule.min_lr: 1.0 should be from 0 to optimizer.lr 0.0003"),
        (["schedule.decay=5"], "schedule.decay: only the wsd schedule has a final decay, not cosine"),
        (
            ["schedule.name=wsd", "schedule.decay=60", "schedule.warmup=50"],
            "schedule.decay: 60 iterations after 50 of warm-up are not within the run's 100",
        ),
        (
            ["schedule.name=wsd", "schedule.warmup=95"],
            "schedule.decay: 10 iterations after 95 of warm-up are not within the run's 100",
        ),
        (["schedule.name=wsd", "schedule.decay_shape=exponential"], "schedule.min_lr: an exponential decay needs"),
        (["seed=-1"], "seed: -1 should not be negative"),
        (["output_dir=''"], "output_dir: is empty"),
        (["checkpoint.keep=-1"], "checkpoint.keep: -1 should not be negative"),
        (["logging.wandb_project='team/oryx:1'"], "logging.wandb_project: 'team/oryx:1' is no project of"),
        (["logging.interval=0"], "logging.interval: 0 should be above 0"),
        (["parallel.tensor=0"], "parallel.tensor: 0 should be above 0"),
        (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline: 2 model chunks need parallel.pipeline above 1"),
        (["parallel.first_stage_layers=2"], "last_stage_layers need parallel.pipeline above 1"),
        (["precision.fp8_params=true"], "precision.fp8_params: has no effect without precision.fp8"),
        (
            ["precision.fp8=tensorwise", "precision.fp8_params=true", "optimizer.name=muon"],
            "precision.fp8_params: not with optimizer.name muon; set it to false",
        ),
        (
            ["precision.fp8=tensorwise", "precision.fp8_params=true", "parallel.distributed_optimizer=false"],
            "precision.fp8_params: needs parallel.distributed_optimizer; set that to true",
        ),
        (
            ["precision.fp8=delayed", "precision.dtype=fp32"],
            "precision.fp8: delayed needs precision.dtype bf16, not fp32",
        ),
        (["precision.fp8=delayed", "precision.bf16_first_layers=8"], "leave none of the 8 layers in FP8"),
        (
            ["precision.fp8=delayed", "model.hidden_size=120"],
            "precision.fp8: model.hidden_size = 120 is not a multiple of 16",
        ),
        (
            ["precision.fp8=delayed", "model.ffn_hidden_size=264"],
            "model.ffn_hidden_size 264 / tensor 1 = 264 is not a mult",
        ),
        (["precision.fp8=delayed", "model.v_head_dim=17"], "the mixer's output width 136 / tensor 1 = 136"),
        (
            ["precision.fp8=delayed", "model.v_head_dim=17", "model.output_gate=false"],
            "the mixer's input projection 520 / tensor 1 = 520 is not a multiple of 16",
        ),
        (
            ["precision.fp8=delayed", "data.sequence_length=8", "modes.chunk=1"],
            "precision.fp8: 8 tokens per rank and microbatch",
        ),
    ],
)
def test_faults_of_one_rank(run_file, overrides, message):
    assert message in fault(run_file, *overrides)


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (3, ["parallel.tensor=3"], "model.num_heads 8 is not divisible by tensor 3; use 6 or 9"),
        (4, ["parallel.tensor=4", "model.num_kv_heads=2"], "model.num_kv_heads 2 is not divisible by tensor 4; use 4"),
        (
            8,
            ["parallel.tensor=2", "parallel.context=4", "model.num_kv_heads=4"],
            "model.num_kv_heads 4 is not divisible by tensor 2 × context 4 = 8; use 8",
        ),
        (
            16,
            ["parallel.tensor=4", "parallel.context=4"],
            "model.num_heads 8 is not divisible by tensor 4 × context 4 = 16",
        ),
        (
            2,
            ["parallel.tensor=2", "model.ffn_hidden_size=257"],
            "model.ffn_hidden_size 257 is not divisible by tensor 2",
        ),
        (
            2,
            ["parallel.tensor=2", "model.vocab_size=511"],
            "model.vocab_size 511 is not divisible by tensor 2; use 510 or 512",
        ),
        (
            2,
            ["parallel.tensor=2", "data.sequence_length=25", "modes.chunk=5"],
            "data.sequence_length 25 is not divisible by tensor 2; use 24 or 26",
        ),
        (
            4,
            ["parallel.tensor=2", "parallel.context=2", "data.sequence_length=250", "modes.chunk=25"],
            "data.sequence_length 250 is not divisible by context 2 × tensor 2 = 4; use 248 or 252",
        ),
        (
            2,
            ["parallel.context=2", "data.sequence_length=25", "modes.chunk=5"],
            "data.sequence_length 25 is not divisible by context 2",
        ),
        (
            3,
            ["parallel.pipeline=3"],
            "model.num_layers 8 do not divide evenly over pipeline 3: 8 layers are left for 3 stages",
        ),
        (16, ["parallel.pipeline=16"], "model.num_layers 8 do not divide evenly over pipeline 16"),
        (
            4,
            ["parallel.pipeline=4", "parallel.first_stage_layers=3"],
            "over pipeline 4, first stage 3: 5 layers are left for 3 stages",
        ),
        (
            2,
            ["parallel.pipeline=2", "parallel.last_stage_layers=8"],
            "parallel.last_stage_layers: 8 should be from 1 to 7",
        ),
        (
            2,
            ["parallel.pipeline=2", "parallel.first_stage_layers=3", "parallel.last_stage_layers=3"],
            "2 layers are left for 0 stages",
        ),
        (
            2,
            ["parallel.pipeline=2", "parallel.virtual_pipeline=3"],
            "parallel.virtual_pipeline: a pipeline stage of 4 layers is not divisible into 3 chunks",
        ),
        (
            2,
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch_size=3"],
            "microbatches per step 3 is not divisible by pipeline 2 (parallel.virtual_pipeline 2); use 2 or 4",
        ),
        (
            2,
            ["train.global_batch_size=6", "train.micro_batch_size=2"],
            "train.global_batch_size 6 is not divisible by train.micro_batch_size 2 × data 2 = 4; use 4 or 8",
        ),
        (
            8,
            ["precision.fp8=tensorwise", "parallel.tensor=8", "model.ffn_hidden_size=192"],
            "model.ffn_hidden_size 192 / tensor 8 = 24 is not a multiple of 16",
        ),
    ],
)
def test_faults_of_layouts(run_file, world_size, overrides, message):
    assert message in fault(run_file, *overrides, world_size=world_size)


def test_world_size_that_does_not_factor(run_file):
    overrides = ["parallel.tensor=2", "parallel.pipeline=2", "train.global_batch_size=12"]
    message = fault(run_file, *overrides, world_size=6)
    assert message == (
        "world size 6 ≠ tensor 2 × pipeline 2 × context 1 × data ? (a multiple of 4); layouts that work: "
        "tensor 2 × pipeline 3 (first stage 2 layers) × context 1 × data 1; "
        "tensor 1 × pipeline 2 × context 1 × data 3; tensor 2 × pipeline 1 × context 1 × data 3"
    )
    for proposal in message.partition("work: ")[2].replace(" (first stage 2 layers)", "").split("; "):
        sizes = [int(word) for word in proposal.split() if word.isdigit()]
        changed = [f"parallel.{k}={v}" for k, v in zip(("tensor", "pipeline", "context"), sizes)]
        changed.append(f"parallel.first_stage_layers={2 if sizes[1] == 3 else 'null'}")
        assert validate(load_run(run_file, [*overrides, *changed]), 6).dp == sizes[3]
    assert "no layout of 11 ranks fits" in fault(run_file, *overrides, world_size=11)
    assert "world size 0 ≠" in fault(run_file, world_size=0)


# The reference


def test_every_field_is_documented():
    def visit(cls):
        docs = field_docs(cls)
        for field in dataclasses.fields(cls):
            assert docs.get(field.name), f"{cls.__name__}.{field.name} has no docstring"
            if inner := inner_class(typing.get_type_hints(cls)[field.name]):
                visit(inner)

    visit(RunConfig)
    assert field_docs(ModelConfig)["num_layers"] == "Number of blocks (mixer + SwiGLU)."


def test_reference_is_current():
    """After a change of the schema: python -m oryx_megatron.config > docs/configuration.md"""
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == reference()


def test_configs_that_ship_are_printed(tmp_path, monkeypatch, capsys):
    """As they are, in any working folder; a name that is none of them is one line."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs/run/pretrain-1.4b-gdn.yaml", "configs/cluster/cpu.yaml", "./configs/install/cuda13.txt"):
        assert config_main([name]) == 0
        assert capsys.readouterr().out == (ROOT / name).read_text(encoding="utf-8")
    for name in ("configs/run/pretrain-1.4b-gnd.yaml", "configs", "../x", "/etc/passwd"):
        assert config_main([name]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"error: {name} is none of the configs that ship with the package; configs/")


PLACED = """model: tiny-gdn
output_dir: runs/x
data: {sequence_length: 64, tokenizer: t, blend: [d]}
train: {iterations: 9, global_batch_size: 4, micro_batch_size: 2}
optimizer:
  lr: 1e-3
modes:
  chunk: 32
evaluation:
  plans:
    - attention
    - recurrent
"""


@pytest.mark.parametrize(
    ("old", "new", "overrides", "start", "end"),
    [
        ("lr: 1e-3", "lr: -1", [], "{file}: optimizer.lr: -1.0 should be above 0", "(line 6)"),
        ("lr: 1e-3", "lr: [1]", [], "{file}: optimizer.lr: expected number, got [1] (list)", "(line 6)"),
        ("lr: 1e-3", "lrr: 1", [], "{file}: unknown key `optimizer.lrr`; did you mean `optimizer.lr`?", "(line 6)"),
        ("- recurrent", "- ratio:7", [], "{file}: evaluation.plans[1]: mode plan `ratio:7`: `7` is not", "(line 12)"),
        (
            "chunk: 32",
            "chunk: 33",
            [],
            "{file}: data.sequence_length 64 is not divisible by modes.chunk 33",
            "(line 3)",
        ),
        (
            "",
            "",
            ["modes.chunk=33"],
            "override `modes.chunk=33`: data.sequence_length 64 is not divisible by",
            "use 33 or 66",
        ),
        (
            "",
            "",
            ["train={iterations: -1, global_batch_size: 4}"],
            "override `train={{iterations: -1, global_batch",
            "train.iterations: -1 should be above 0",
        ),
        (
            "tiny-gdn",
            "{preset: tiny-gdn, num_layers: 0}",
            [],
            "{file}: model.num_layers: 0 should be above 0",
            "(line 1)",
        ),
        ("micro_batch_size: 2", "micro_batch_size: 3", [], "{file}: train.global_batch_size 4 is not", "(line 4)"),
    ],
)
def test_faults_name_file_and_line(
    tmp_path: Path, old: str, new: str, overrides: list[str], start: str, end: str
) -> None:
    """Of values that are wrong alone, and of those that contradict each other; or the override that gives them."""
    path = tmp_path / "placed.yaml"
    path.write_text(PLACED.replace(old, new, 1) if old else PLACED, encoding="utf-8")
    with pytest.raises(ConfigError) as raised, told_with_place(path, overrides):
        validate(load_run(path, overrides), 1)
    assert str(raised.value).startswith(start.format(file=path))
    assert end in str(raised.value)
    assert str(raised.value).count(str(path)) <= 1
    assert str(raised.value).count("(line ") <= 1


def test_what_is_no_fields_fault_names_no_place(tmp_path: Path) -> None:
    path = tmp_path / "placed.yaml"
    path.write_text(PLACED, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^world size 3 ≠ "), told_with_place(path, ["parallel.tensor=2"]):
        validate(load_run(path, ["parallel.tensor=2"]), 3)
