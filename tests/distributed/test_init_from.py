"""Runs that start from another run's checkpoint, under other layouts, or from a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny_runs import LAYOUTS, Runs, close, train
from transformers import LlamaConfig, LlamaForCausalLM

from oryx_megatron import parallel
from oryx_megatron.checkpoint import find_checkpoint, read_manifest
from oryx_megatron.checkpoint.manifest import file_digest
from oryx_megatron.compat.megatron import allocate_torch_state
from oryx_megatron.config import load_run, validate
from oryx_megatron.config.schema import ModelConfig, MoEConfig, ParallelConfig, RopeScalingConfig
from oryx_megatron.data.train_tokenizer import train_sentencepiece
from oryx_megatron.errors import CheckpointError, ConfigError, ConversionError, DataError
from oryx_megatron.hf.convert import export
from oryx_megatron.hf.tensors import CheckpointReader
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.project import VOCABULARY, synthetic_texts, tiny_project
from oryx_megatron.tools import convert_from_hf
from oryx_megatron.train.__main__ import main
from oryx_megatron.train.differences import SHAPES
from oryx_megatron.train.init_from import check_shapes
from oryx_megatron.train.trainer import Trainer

HALF = "iteration_0000003"
ALL = ("init_from.optimizer=true", "init_from.schedule=true", "init_from.data=true")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint, without the optimizer's."""
    reader = CheckpointReader(find_checkpoint(folder))
    names = [name for name in reader.shapes() if not name.startswith("optimizer.")]
    return {name: reader.read(name) for name in names}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert one
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert torch.equal(tensor, two[name]), name


def save(trainer: Trainer) -> None:
    """Save before the first step, where the optimizer has no state yet."""
    allocate_torch_state(trainer.checkpoints.optimizer)  # type: ignore[attr-defined]
    trainer.save()
    trainer.stream.close()


def start(config: Path, name: str, *overrides: str) -> None:
    """Save what a run starts with, before its first step."""
    run = load_run(config, ["model.num_layers=2", *overrides, f"output_dir={config.parent / name}"])
    parallel.initialize(run.parallel, seed=run.seed)
    try:
        trainer = Trainer(run, validate(run, torch.distributed.get_world_size()), reports=False)
        assert trainer.iteration == 0
        save(trainer)
        close(trainer)
    finally:
        parallel.release()


def under_layouts(config: Path) -> None:
    """Two ranks: sources under tensor 2, starts from them under pipeline 2 and data 2."""
    for dtype in ("fp32", "bf16"):
        precision = f"precision.dtype={dtype}"
        train(config, dtype, *LAYOUTS["2x1x1"], precision, "checkpoint.interval=3")
        source = f"init_from={config.parent / dtype / 'checkpoints' / HALF}"
        train(config, f"{dtype} continued", *LAYOUTS["2x1x1"], precision, source, *ALL)
        start(config, f"{dtype} pipeline", *LAYOUTS["1x2x1"], precision, source, "seed=7", "data.sequence_length=40")
    start(config, "bf16 data", "precision.dtype=bf16", source, "modes.p_attention=0.5")
    if torch.distributed.get_rank() == 0:
        export(config.parent / "bf16" / "checkpoints" / HALF, config.parent / "hf")
    torch.distributed.barrier()
    start(config, "bf16 export", *LAYOUTS["1x2x1"], "precision.dtype=bf16", f"init_from={config.parent / 'hf'}")


@pytest.mark.timeout(600)
def test_weights_are_equal_under_other_layouts(tmp_path: Path) -> None:
    """Bit for bit the weights under other layouts; with everything taken along, the source's own losses."""
    run_distributed(under_layouts, 2, tiny_project(tmp_path), timeout=500)
    runs = Runs(tmp_path)
    for dtype in ("fp32", "bf16"):
        source = weights(tmp_path / dtype / "checkpoints" / HALF)
        assert_same(weights(tmp_path / f"{dtype} pipeline"), source)
        for field in ("loss", "grad_norm", "lr", "attention_share", "consumed_samples", "iteration"):
            assert runs.steps(f"{dtype} continued", field) == runs.steps(dtype, field)[3:]
    assert_same(weights(tmp_path / "bf16 data"), source)
    assert_same(weights(tmp_path / "bf16 export"), source)


# -------------------------------------------------------------------------------------------- one rank, in this process


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """run.yaml, with a run of five steps in source/, checkpoints at 3 and 5."""
    parallel.initialize(ParallelConfig(), seed=1)
    config = tiny_project(tmp_path_factory.mktemp("project"))
    make(config, config.parent / "source", "checkpoint.interval=3", "train.iterations=5").fit()
    yield config
    parallel.destroy()


def make(config: Path, folder: Path, *overrides: str) -> Trainer:
    small = ("model.num_layers=1", "train.global_batch_size=2", "data.split=[9, 0, 1]")
    run = load_run(config, [*small, f"output_dir={folder}", *overrides])
    return Trainer(run, validate(run, 1))


@pytest.fixture
def trainer(project: Path, tmp_path: Path) -> Callable[..., Trainer]:
    return lambda *overrides: make(project, tmp_path / "new", *overrides)


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]


def test_newest_and_its_record(
    trainer: Callable[..., Trainer], project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run folder is its newest checkpoint; what differs is told; every checkpoint says where the run began."""
    caplog.set_level("INFO")
    source = project.parent / "source"
    first = trainer(
        *(f"init_from={source}", "data.sequence_length=40", "modes.p_attention=0.5", "model.rope_theta=5e4"),
        *("train.iterations=2", "optimizer.lr=1e-3"),
    )
    assert (first.iteration, first.stream.consumed) == (0, 0)
    newest = source / "checkpoints" / "iteration_0000005"
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("init_from")]
    assert told == [
        f"init_from: weights alone of {newest}",
        "init_from: model.rope_theta 10000 → 50000",
        "init_from: data.sequence_length 48 → 40",
        "init_from: train.iterations 5 → 2",
        "init_from: modes.p_attention 0.25 → 0.5",
        "init_from: optimizer.lr 0.005 → 0.001",
    ]
    first.fit()
    manifest = read_manifest(find_checkpoint(tmp_path / "new"))
    assert manifest.init_from == {
        "path": str(newest),
        "iteration": 5,
        "manifest_sha256": file_digest(newest / "manifest.json")["sha256"],
        "weights": "trained",
        **dict.fromkeys(("optimizer", "schedule", "data"), False),
    }
    # From now on it resumes, also without the source, and another start from there is another source.
    caplog.clear()
    again = trainer("init_from=/nowhere", "data.sequence_length=40", "model.rope_theta=5e4", "train.iterations=2")
    again.stream.close()
    assert again.iteration == 2
    assert again.start.record == manifest.init_from
    assert "init_from: has no effect: this run has checkpoints of its own" in caplog.text


@pytest.mark.parametrize(
    ("taken", "iteration", "consumed"),
    [
        (("optimizer",), 0, 0),
        (("schedule",), 3, 0),
        (("data",), 0, 6),
        (("schedule", "data"), 3, 6),
    ],
    ids=("optimizer", "schedule", "data", "schedule and data"),
)
def test_positions(
    trainer: Callable[..., Trainer],
    project: Path,
    tmp_path: Path,
    taken: tuple[str, ...],
    iteration: int,
    consumed: int,
) -> None:
    """Schedule and data position are taken one by one, and a resume counts on from there."""
    source = project.parent / "source" / "checkpoints" / HALF
    overrides = (f"init_from={source}", *(f"init_from.{name}=true" for name in taken), "train.iterations=6")
    whole = trainer(*overrides)
    assert (whole.iteration, whole.stream.consumed) == (iteration, consumed)
    whole.fit()
    assert whole.stream.consumed == consumed + 2 * (6 - iteration)
    expected = losses(tmp_path / "new")
    shutil.rmtree(tmp_path / "new")
    trainer(*overrides, f"train.exit_after={iteration + 1}").fit()
    resumed = trainer(*overrides)
    assert (resumed.iteration, resumed.stream.consumed) == (iteration + 1, consumed + 2)
    resumed.fit()
    assert losses(tmp_path / "new") == expected


def test_a_damaged_checkpoint_of_the_source(
    trainer: Callable[..., Trainer], project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The one before it is taken, as at a resume; one named as such is an error, and so is a source without any."""
    shutil.copytree(project.parent / "source", tmp_path / "source")
    newest = find_checkpoint(tmp_path / "source")
    (newest / "common.pt").write_bytes(b"")
    began = trainer(f"init_from={tmp_path / 'source'}")
    began.stream.close()
    assert began.start.record is not None
    assert began.start.record["iteration"] == 3
    assert f"init_from: {newest} is damaged: common.pt" in caplog.text
    with pytest.raises(CheckpointError, match=r"iteration_0000005 is damaged: common.pt"):
        trainer(f"init_from={newest}")
    with pytest.raises(CheckpointError, match="nowhere does not exist; give a checkpoint or a run folder"):
        trainer(f"init_from={tmp_path / 'nowhere'}")
    (newest.parent / HALF / "common.pt").write_bytes(b"")
    for source in (tmp_path / "source", "memory://nowhere/run", newest / "manifest.json"):
        with pytest.raises(CheckpointError, match=r"^init_from: (?!.*init_from)"):
            trainer(f"init_from={source}")


@pytest.mark.parametrize(("factor", "told"), [(2, True), (4, False)])
def test_a_scaling_that_ends_before_the_sequence(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: int, told: bool
) -> None:
    """YaRN's factor counts from the length of pretraining, which a chain of runs makes easy to miss."""
    scaling = f"model.rope_scaling={{rope_type: yarn, factor: {factor}, original_max_position_embeddings: 12}}"
    small = ("model.num_layers=1", "train.global_batch_size=2", "data.split=[9, 0, 1]", f"output_dir={tmp_path / 'n'}")
    assert main([str(project), "--dry-run", *small, f"init_from={project.parent / 'source'}", scaling]) == 0
    line = (
        "model.rope_scaling: factor 2 × original_max_position_embeddings 12 = 24 tokens, and data.sequence_length is "
        "48; a factor of 4 reaches it\n"
    )
    assert (line in capsys.readouterr().out) is told


def test_a_scaling_that_counts_from_the_run_before(
    trainer: Callable[..., Trainer], project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def scaled(factor: int, original: int) -> str:
        return f"model.rope_scaling={{rope_type: yarn, factor: {factor}, original_max_position_embeddings: {original}}}"

    make(project, tmp_path / "first", scaled(4, 12), "train.iterations=1").fit()
    for settings, told in ((scaled(16, 12), False), (scaled(4, 48), True)):
        caplog.clear()
        trainer(f"init_from={tmp_path / 'first'}", settings, "data.sequence_length=96").stream.close()
        line = "original_max_position_embeddings 12 → 48: it is the length of pretraining, which stays"
        assert (line in caplog.text) is told


def test_dry_run_of_a_source(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A manifest that cannot be read gives the checkpoint before it; of a URL no tensor is fetched."""
    small = ("model.num_layers=1", "train.global_batch_size=2", "data.split=[9, 0, 1]", f"output_dir={tmp_path / 'n'}")
    shutil.copytree(project.parent / "source", tmp_path / "source")
    newest = find_checkpoint(tmp_path / "source")
    for tensors in newest.glob("*.distcp"):
        tensors.write_bytes(tensors.read_bytes()[::-1])
    url = f"init_from=file://{tmp_path / 'source'}"
    assert main([str(project), "--dry-run", *small, url, "init_from.optimizer=true"]) == 0
    assert f"init_from: weights, optimizer of file://{newest}\n" in capsys.readouterr().out
    (newest / "manifest.json").write_text("{")
    assert main([str(project), "--dry-run", *small, f"init_from={tmp_path / 'source'}"]) == 0
    assert f"init_from: weights alone of {newest.parent / HALF}\n" in capsys.readouterr().out
    assert caplog.text.count("trying the checkpoint before it") == 1
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')
    assert main([str(project), "--dry-run", *small, f"init_from={tmp_path / 'hf'}"]) == 2
    assert f"error: init_from: {tmp_path / 'hf'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            ("model.hidden_size=48", "model.num_kv_heads=4"),
            ConfigError,
            r"do not fit tiny: hidden_size \(there 32, here 48\), num_kv_heads \(there 2, here 4\); "
            r"set model.hidden_size=32 model.num_kv_heads=2$",
        ),
        (("model.qk_norm=false",), ConfigError, r"qk_norm \(there True, here False\); set model.qk_norm=true"),
        (
            ("init_from.optimizer=true", "parallel.distributed_optimizer=false"),
            ConfigError,
            "init_from.optimizer: .* written with parallel.distributed_optimizer true",
        ),
        (("init_from.schedule=true", "train.iterations=5"), ConfigError, "init_from.schedule: .* is at iteration 5"),
        (("init_from.data=true", "seed=7"), DataError, "init_from.data: .* had seed 1234, now it is 7"),
        (("engine=deepspeed",), ConfigError, "init_from: not with engine deepspeed"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_does_not_fit(
    trainer: Callable[..., Trainer], project: Path, overrides: tuple[str, ...], error: type, message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        trainer(f"init_from={project.parent / 'source'}", *overrides)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.hidden_size=64",),
        ("model.rope_theta=5e4",),
        ("seed=7",),
        ("optimizer.name=muon",),
        ("train.freeze=['*mlp*']",),
        ("train.freeze=['*nothing*']",),
        ("data.sequence_length=40",),
        ("parallel.distributed_optimizer=false",),
    ],
    ids=lambda overrides: overrides[0],
)
def test_dry_run_of_a_resume(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...]
) -> None:
    """What would refuse to resume refuses the dry run, in the same words."""
    shutil.copytree(project.parent / "source", tmp_path / "new")
    small = ("model.num_layers=1", "train.global_batch_size=2", "data.split=[9, 0, 1]", "train.iterations=8")
    assert main([str(project), "--dry-run", *small, f"output_dir={tmp_path / 'new'}", *overrides]) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    with pytest.raises((CheckpointError, ConfigError, DataError)) as refused:
        make(project, tmp_path / "new", "train.iterations=8", *overrides)
    assert error == f"error: {refused.value}"


def test_dry_run_tells_what_the_resume_tells(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    shutil.copytree(project.parent / "source", tmp_path / "new")
    small = ("model.num_layers=1", "data.split=[9, 0, 1]", f"output_dir={tmp_path / 'new'}", "init_from=/nowhere")
    changed = ("train.iterations=8", "train.global_batch_size=6")
    assert main([str(project), "--dry-run", *small, *changed]) == 0
    told = capsys.readouterr().out
    assert "start      resumes from iteration 5 of" in told
    caplog.clear()
    make(project, tmp_path / "new", "init_from=/nowhere", *changed).stream.close()
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("oryx_megatron")]
    begin = next(i for i, line in enumerate(lines) if line.startswith("resumed from"))
    tail = lines[begin + 1 :]
    assert len([line for line in tail if "learning rate jumps" in line or "changed since" in line]) == 3
    for line in ("init_from: has no effect: this run has checkpoints of its own", *tail):
        assert f"{line}\n" in told


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("init_from.data=true", "seed=7"),
            "init_from.data: .* had seed 1234, now it is 7: set it back, or set init_f",
        ),
        (("init_from.data=true", "data.sequence_length=40"), "init_from.data: .* had sequence_length 48, now it is 40"),
    ],
)
def test_dry_run_of_a_start(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str
) -> None:
    small = ("model.num_layers=1", "train.global_batch_size=2", "data.split=[9, 0, 1]", f"output_dir={tmp_path / 'n'}")
    source = f"init_from={project.parent / 'source'}"
    assert main([str(project), "--dry-run", *small, source, *overrides]) == 2
    assert re.search(message, capsys.readouterr().err)
    with pytest.raises(DataError, match=message):
        make(project, tmp_path / "n", source, *overrides)


def test_what_to_set_is_an_override(project: Path) -> None:
    """Nested fields too: pasted behind the command, the line's advice gives the source's model."""
    now = load_run(project).model
    moe = MoEConfig(experts=4, ffn_hidden_size=24, score="sigmoid")
    other = dataclasses.replace(moe, experts=8, aux_loss=0.5)
    then = dataclasses.replace(now, moe=moe, pattern=("attention", "both*2", "recurrent"))
    for changed, told in (
        (now, "moe (there {experts: 4, ffn_hidden_size: 24, score: sigmoid}, here None)"),
        (dataclasses.replace(then, moe=other), "moe.experts (there 4, here 8); set model.moe.experts=4"),
    ):
        with pytest.raises(ConfigError) as refused:
            check_shapes(then, changed, "source")
        assert told in str(refused.value)
        settings = shlex.split(str(refused.value).partition("; set ")[2])
        if changed is now:
            assert load_run(project, settings).model == then


def test_every_field_of_a_model_is_of_one_kind() -> None:
    """Fields that decide shapes, and those that may differ: a new one must be put on a side."""
    free = {"name", "rotary", "rope_theta", "norm_epsilon", "init_std", "decay_init", "dt_init", "recurrence_chunk"}
    free |= {"logit_softcap", "mup_base_hidden_size"}
    names = {field.name for field in fields(ModelConfig)}
    assert set(SHAPES) <= names
    assert names - set(SHAPES) - {"rope_scaling", "mtp"} == free


def test_new_heads_start_new_and_common_ones_from_the_source(
    trainer: Callable[..., Trainer], project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """New heads of multi-token prediction start from new weights, those that the source has too from its own."""
    caplog.set_level("INFO")
    source = project.parent / "source"
    untouched = weights(source)

    def told() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.getMessage().startswith("init_from: mtp.layers")]
        caplog.clear()
        return found

    one = "model.mtp={layers: 1}"
    frozen = ("train.freeze=['*', '!mtp.*']", "optimizer.lr=1")
    begun = make(project, tmp_path / "begun", f"init_from={source}", one)
    assert told() == ["init_from: mtp.layers.0: not in the source; starts from new weights"]
    save(begun)
    start = weights(tmp_path / "begun")
    trainer(f"init_from={source}", one, "train.iterations=2", *frozen).fit()
    caplog.clear()
    learned = weights(tmp_path / "new")
    assert_same({name: learned[name] for name in untouched}, untouched)  # the others are frozen
    heads = [name for name in learned if name.startswith("mtp.")]
    assert len(heads) == len(learned) - len(untouched) > 10
    still = [name for name in heads if torch.equal(learned[name], start[name])]
    assert len(still) < len(heads) / 2, still  # a mode that no plan drew has nothing to learn from

    more = make(project, tmp_path / "more", f"init_from={tmp_path / 'new'}", "model.mtp={layers: 2, loss_weight: 0.5}")
    assert told() == ["init_from: mtp.layers.1: not in the source; starts from new weights"]
    save(more)
    found = weights(tmp_path / "more")
    assert_same({name: found[name] for name in learned}, learned)
    none = make(project, tmp_path / "none", f"init_from={tmp_path / 'new'}")
    assert told() == ["init_from: mtp.layers.0: left out; the model has no such head (model.mtp)"]
    save(none)
    assert_same(weights(tmp_path / "none"), untouched)
    with pytest.raises(
        ConfigError, match=r"init_from.optimizer: .* state of 0 heads .* has 1 \(model.mtp\); set it to"
    ):
        make(project, tmp_path / "other", f"init_from={source}", one, "init_from.optimizer=true")
    # A resume may give them another weight, not another number.
    again = trainer(f"init_from={source}", "model.mtp={layers: 1, loss_weight: 2}", "train.iterations=3", *frozen)
    again.stream.close()
    assert again.iteration == 2
    with pytest.raises(CheckpointError, match="differs in mtp"):
        trainer(f"init_from={source}", "model.mtp={layers: 2}", "train.iterations=3", *frozen)


def test_an_export_starts_a_run_where_its_checkpoint_was(
    trainer: Callable[..., Trainer], project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An export is where its checkpoint was, without a checkpoint on the way; nothing temporary stays."""
    source = project.parent / "source"
    export(source, tmp_path / "hf")
    caplog.set_level("INFO")
    began = trainer(f"init_from={tmp_path / 'hf'}", "train.iterations=2", "data.sequence_length=40")
    save(began)
    assert_same(weights(tmp_path / "new"), weights(source))
    record = read_manifest(find_checkpoint(tmp_path / "new")).init_from
    assert record is not None
    assert (record["path"], record["iteration"]) == (str(tmp_path / "hf"), 5)
    told = [line for line in caplog.messages if line.startswith("init_from: ")]
    assert told == [
        f"init_from: weights alone of {tmp_path / 'hf'}",
        "init_from: data.sequence_length 48 → 40",
        "init_from: train.iterations 5 → 2",
    ]
    assert not list((tmp_path / "new").glob(".init_from*"))
    with pytest.raises(ConfigError, match=r"init_from.data: .*hf is a Hugging Face folder, of weights alone"):
        make(project, tmp_path / "other", f"init_from={tmp_path / 'hf'}", "init_from.data=true")
    with pytest.raises(DataError):
        make(project, tmp_path / "other", f"init_from={tmp_path / 'hf'}", "data.blend=[/nowhere]")
    assert not list((tmp_path / "other").glob(".init_from*"))
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"holds no model\.safetensors"):
        make(project, tmp_path / "other", f"init_from={tmp_path / 'hf'}")


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_another_tokenizer_is_told(
    trainer: Callable[..., Trainer],
    project: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    """Of as many tokens, so that the weights fit; by the dry run too."""
    train_sentencepiece(synthetic_texts(seed=1), tmp_path / "tokenizer", VOCABULARY, source="synthetic")
    source = project.parent / "source"
    if kind == "export":
        export(source, tmp_path / "hf")
        source = tmp_path / "hf"
    other = (f"init_from={source}", f"data.tokenizer={tmp_path / 'tokenizer'}")
    trainer(*other).stream.close()
    (line,) = (line for line in caplog.messages if "embeddings mean other tokens" in line)
    assert line.startswith("init_from: the source was trained with tokenizer")
    caplog.clear()
    trainer(other[0]).stream.close()
    assert "embeddings" not in caplog.text
    small = ("model.num_layers=1", "data.split=[9, 0, 1]", f"output_dir={tmp_path / 'new'}")
    assert main([str(project), "--dry-run", *small, *other]) == 0
    assert f"{line}\n" in capsys.readouterr().out


def test_a_llama(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], trainer: Callable[..., Trainer]
) -> None:
    """The error of a model that does not fit says what does; with that the run starts, and --dry-run says the same."""
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, head_dim=8, tie_word_embeddings=True,
        )
    ).save_pretrained(tmp_path / "llama")  # fmt: skip
    with pytest.raises(ConfigError, match="num_kv_heads") as refused:
        trainer(f"init_from={tmp_path / 'llama'}")
    settings = str(refused.value).partition("; set ")[2].split()
    small = ["model.num_layers=1", f"output_dir={tmp_path / 'new'}", f"init_from={tmp_path / 'llama'}"]
    assert main([str(project), "--dry-run", *small]) == 2
    assert "num_kv_heads (there 4, here 2)" in capsys.readouterr().err
    assert main([str(project), "--dry-run", *small, *settings]) == 0
    assert f"init_from: weights alone of {tmp_path / 'llama'}\n" in capsys.readouterr().out
    convert = [str(tmp_path / "llama"), str(tmp_path / "start"), "--run", str(project)]
    assert convert_from_hf.main([*convert, "model.num_layers=2"]) == 2
    error = capsys.readouterr().err
    assert "`model.num_layers=2` has no effect: the model is the folder's, all but rope_theta and rope_scaling" in error
    scaled = ["model.rope_theta=5e4", "model.rope_scaling={rope_type: linear, factor: 2}"]
    assert convert_from_hf.main([*convert, "train.iterations=1", *scaled]) == 0
    assert f"train it: python -m oryx_megatron.train {tmp_path / 'start'}/config.yaml" in capsys.readouterr().out
    run = load_run(tmp_path / "start" / "config.yaml")
    assert run.model.mixer == load_run(str(project)).model.mixer == "gdn"
    assert run.model.rope_theta == 5e4
    assert run.model.rope_scaling == RopeScalingConfig(rope_type="linear", factor=2.0)
    with pytest.raises(CheckpointError, match=r"num_kv_heads \(there 4, here 2\).*; train .*start/config.yaml, or"):
        make(project, tmp_path / "start")
    resumed = Trainer(run, validate(run, 1))
    resumed.fit()
    assert (resumed.iteration, resumed.folder) == (1, tmp_path / "start")
    began = trainer(f"init_from={tmp_path / 'llama'}", *settings, "model.num_kv_heads=null", "train.iterations=1")
    began.fit()
    assert began.iteration == 1
