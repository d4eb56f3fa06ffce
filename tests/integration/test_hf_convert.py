"""Training checkpoints to Hugging Face folders and back: every tensor, every bit, and what is computed with them.

With a small Llama: the command of docs/huggingface.md that starts from one.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hf_checkpoints import CASES, LLAMA3, YARN, resave, run_of
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from oryx_megatron.checkpoint import find_checkpoint, read_manifest
from oryx_megatron.checkpoint.manifest import write_manifest as write_checkpoint_manifest
from oryx_megatron.config import load_run, to_dict
from oryx_megatron.config.schema import (
    BlendEntry,
    DataStage,
    InitFromConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    ParallelConfig,
    RopeScalingConfig,
)
from oryx_megatron.data.tokenizer import load_tokenizer, write_manifest
from oryx_megatron.errors import CheckpointError, ConfigError, ConversionError
from oryx_megatron.hf.convert import export, import_, import_llama
from oryx_megatron.hf.fields import BIAS_UPDATE_RATE, CONFIG, EXPERTS, ROPE, from_hf_config, to_hf_config
from oryx_megatron.hf.folders import open_export
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM
from oryx_megatron.hf.portable import portable
from oryx_megatron.hf.tensors import CheckpointReader
from oryx_megatron.hf.tokenizer import export_tokenizer
from oryx_megatron.hf.verify import verify, verify_generation
from oryx_megatron.testing import run_distributed
from oryx_megatron.testing.project import synthetic_texts, tiny_project

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def project(hf_project: Path) -> Path:
    """run.yaml of a folder with a tokenizer and a checkpoint of every case."""
    return hf_project


@pytest.fixture
def exported(project: Path, tmp_path: Path) -> Path:
    export(project.parent / "gdn tp2", tmp_path / "hf")
    return tmp_path / "hf"


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(find_checkpoint(checkpoint))
    return {name: reader.read(name) for name in reader.shapes()}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("case", CASES)
def test_both_sides_compute_the_same_and_the_round_trip_is_exact(case: str, project: Path, tmp_path: Path) -> None:
    source = project.parent / case
    done = export(source, tmp_path / "hf")
    results = verify(source, tmp_path / "hf", plans=2, length=70)
    assert len(results) == 2 * (1 if run_of(project, case).model.single_mode else 4)
    back = import_(tmp_path / "hf", tmp_path / "back", run_of(project, case))
    assert_same(tensors_of(source), tensors_of(tmp_path / "back"))
    before, after = read_manifest(find_checkpoint(source)), read_manifest(find_checkpoint(tmp_path / "back"))
    assert dataclasses.replace(before, files={}) == dataclasses.replace(after, files={})
    import_(tmp_path / "hf", tmp_path / "without")  # the run's folders are not in the export
    alone = read_manifest(find_checkpoint(tmp_path / "without"))
    assert dataclasses.replace(alone, files={}) == dataclasses.replace(portable(before), files={})
    assert tensors_of(tmp_path / "without").keys() == tensors_of(source).keys()
    export(tmp_path / "back", tmp_path / "again")
    for name in ("config.json", "model.safetensors", "README.md"):
        text = (tmp_path / "again" / name).read_bytes().replace(b'"again"', b'"hf"')
        assert text == (tmp_path / "hf" / name).read_bytes(), name
    assert done.model == back.model
    assert not list(tmp_path.glob(".*"))  # nothing temporary stays


@pytest.mark.parametrize("case", ["mamba2 pp2", "hybrid pp2", "experts ep2", "experts pp2"])
def test_an_imported_checkpoint_loads_under_other_layouts(case: str, project: Path, tmp_path: Path) -> None:
    """And comes out of them bit for bit."""
    export(project.parent / case, tmp_path / "hf")
    import_(tmp_path / "hf", tmp_path / "back")
    target = tmp_path / "iteration_0000007"
    run_distributed(resave, 2, project, case, find_checkpoint(tmp_path / "back"), target, ParallelConfig(tensor=2))
    assert_same(tensors_of(project.parent / case), tensors_of(target))


def test_formats_and_shards(project: Path, tmp_path: Path) -> None:
    export(project.parent / "gdn tp2", tmp_path / "one", dtype="fp32", mode_plan="recurrent")
    export(project.parent / "gdn tp2", tmp_path / "many", shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert all((tmp_path / "many" / file).stat().st_size < 30_000 for file in files)
    one = OryxForCausalLM.from_pretrained(tmp_path / "one")
    many = OryxForCausalLM.from_pretrained(tmp_path / "many")
    assert one.dtype == torch.float32
    assert many.dtype == torch.bfloat16
    assert one.config.default_plan == "recurrent"
    for (name, a), b in zip(one.named_parameters(), many.parameters()):
        assert torch.equal(a, b.float()), name
    assert many.model.layers[0].mixer.a_log.dtype == torch.float32
    import_(tmp_path / "many", tmp_path / "back")
    assert_same(tensors_of(project.parent / "gdn tp2"), tensors_of(tmp_path / "back"))


def test_config_table_holds_every_field() -> None:
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    of_training = {"mup_base_hidden_size"}  # it decides first weights and learning rates, nothing that is computed
    assert fields - set(CONFIG) == {"name", *of_training, *ROPE}
    assert len(set(CONFIG.values())) == len(CONFIG)
    model = ModelConfig(
        name="m", mixer="mamba2", modes="both", num_layers=3, hidden_size=40, ffn_hidden_size=72, num_heads=6,
        num_kv_heads=3, qk_head_dim=10, v_head_dim=14, vocab_size=99, conv_width=3, output_gate=False, qk_norm=False,
        rotary="both", rope_theta=5e4, shared_query=True, tie_embeddings=False, norm_epsilon=1e-6, init_std=0.03,
        decay_init=(0.5, 8.0), dt_init=(2e-3, 0.2), recurrence_chunk=32,
    )  # fmt: skip
    assert from_hf_config(to_hf_config(model), "m") == model
    hybrid = dataclasses.replace(model, num_layers=4, pattern=("both", "recurrent*3"))
    config = to_hf_config(hybrid)
    assert config.layer_modes == ["both", "recurrent", "recurrent", "recurrent"]
    assert from_hf_config(config, "m") == hybrid
    moe = MoEConfig(
        experts=6, top_k=3, ffn_hidden_size=20, shared_ffn_hidden_size=12, first_dense=1, frequency=2, score="sigmoid",
        bias_update_rate=BIAS_UPDATE_RATE,
    )  # fmt: skip
    assert set(EXPERTS) <= {field.name for field in dataclasses.fields(MoEConfig)}
    assert from_hf_config(to_hf_config(dataclasses.replace(model, moe=moe)), "m").moe == moe
    heads = dataclasses.replace(model, mtp=MTPConfig(layers=3))
    assert to_hf_config(heads).num_nextn_predict_layers == 3
    assert from_hf_config(to_hf_config(heads), "m") == heads
    for scaling in (None, YARN, LLAMA3, {"rope_type": "linear", "factor": 2.0}):
        scaled = dataclasses.replace(model, rope_scaling=scaling and RopeScalingConfig(**scaling))
        assert from_hf_config(to_hf_config(scaled), "m") == scaled


def test_exports_of_version_0_2_load(exported: Path, tmp_path: Path) -> None:
    """Their config.json had the rotary base under a name of its own; commands and transformers read it."""
    rewrite(exported, rotary_base=5000.0)
    config = json.loads((exported / "config.json").read_text())
    del config["rope_parameters"]
    (exported / "config.json").write_text(json.dumps(config))
    assert OryxForCausalLM.from_pretrained(exported).config.rope.rope_theta == 5000.0
    (exported / "oryx_manifest.json").unlink()  # whose checksum config.json no longer has
    assert open_export(exported).model.rope_theta == 5000.0


def test_length_and_scaling_of_an_export(project: Path, tmp_path: Path) -> None:
    """As transformers writes them, and lm-eval reads them: what YaRN extends the model to, else the run's samples."""
    for case, longest in (("mixed tp2", 64), ("attention pp2", 48)):
        export(project.parent / case, tmp_path / case)
        config = json.loads((tmp_path / case / "config.json").read_text())
        assert config["max_position_embeddings"] == longest
        scaling = YARN | {"rope_theta": 10000.0} if case == "mixed tp2" else LLAMA3 | {"rope_theta": 500.0}
        assert config["rope_parameters"] == scaling
        assert AutoTokenizer.from_pretrained(tmp_path / case).model_max_length == longest


def test_model_card_is_filled_from_the_manifest(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    for fact in ("1,344 tokens: 7 steps of 4 × 48", "| data | 1 |", "| `recurrent` | 2.5000 | 12.180 | 1.2500 | 7 |",
                 "| torch | ", "0" * 40, "Gated DeltaNet"):  # fmt: skip
        assert fact in card, fact


def test_an_export_names_no_folder_of_this_machine(project: Path, tmp_path: Path) -> None:
    """Of a run with every path that a config may have, data read so far, and a source; over all files, byte by byte."""
    source = tmp_path / "elsewhere" / "run"
    shutil.copytree(project.parent / "gdn tp2", source)
    folder = find_checkpoint(source)
    manifest = read_manifest(folder)
    run = manifest.run()
    two = tuple(BlendEntry(path=str(tmp_path / part / "text"), weight=2.0) for part in ("web", "code"))
    data = dataclasses.replace(
        run.data, blend=two, validation={"held": two[:1]}, cache_dir=str(tmp_path / "cache"),
        stages=(DataStage(start=3, blend=two),),
    )  # fmt: skip
    kernels = dataclasses.replace(run.kernels, cache_dir=str(tmp_path / "kernels"))
    begun = InitFromConfig(path=str(tmp_path / "before"))
    run = dataclasses.replace(run, data=data, kernels=kernels, init_from=begun, output_dir=str(source))
    identity = {"files": {"0f3a": {"path": two[0].path, "size": 3}}, "stages": [[two[1].path, 1.0]], "share": [1, 0]}
    trained_on = manifest.data | {"train": {"consumed": 28, "identity": identity}}
    record = {"path": begun.path, "iteration": 5, "manifest_sha256": "0" * 64}
    changed = dataclasses.replace(manifest, config=to_dict(run), data=trained_on, init_from=record)
    write_checkpoint_manifest(folder, changed)
    export(source, tmp_path / "hf", tokenizer=project.parent / "tokenizer")
    secret = {str(tmp_path), str(project.parent), str(TOOLS.parent), str(Path.home()), sys.prefix}
    for path in (tmp_path / "hf").rglob("*"):
        assert not [text for text in secret if text.encode() in path.read_bytes()], path.name
    kept = json.loads((tmp_path / "hf" / "oryx_manifest.json").read_text())
    assert [entry["path"] for entry in kept["config"]["data"]["blend"]] == ["web/text", "code/text"]
    assert kept["data"]["train"]["identity"]["files"]["0f3a"] == {"path": "web/text", "size": 3}
    assert kept["init_from"]["path"] == kept["config"]["init_from"]["path"] == "before"
    # Of the same run on another machine, all is there again; a changed field is another run, at its own first step.
    moved = dataclasses.replace(
        data, blend=tuple(BlendEntry(path=f"/new/{p}/text", weight=2.0) for p in ("web", "code"))
    )
    here = dataclasses.replace(run, data=moved, output_dir="/new/run")
    import_(tmp_path / "hf", tmp_path / "back", here)
    back = read_manifest(find_checkpoint(tmp_path / "back"))
    assert (back.iteration, back.run()) == (7, here)
    import_(tmp_path / "hf", tmp_path / "next", dataclasses.replace(here, seed=8))
    assert read_manifest(find_checkpoint(tmp_path / "next")).iteration == 0


def test_license_of_the_weights(
    exported: Path, project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The card's metadata states it; it is no other run; without one the export says so."""
    assert "license:" not in (exported / "README.md").read_text()
    source = project.parent / "gdn tp2"
    export(source, tmp_path / "licensed", license="apache-2.0")
    assert not [record for record in caplog.records if record.name.startswith("oryx_megatron")]
    card = (tmp_path / "licensed" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    import_(tmp_path / "licensed", tmp_path / "back", run_of(project, "gdn tp2"))
    kept = read_manifest(find_checkpoint(tmp_path / "back"))
    assert kept.iteration == read_manifest(find_checkpoint(source)).iteration > 0
    with pytest.raises(ConfigError, match=r"license: 'Apache 2' is no identifier"):
        export(source, tmp_path / "no", license="Apache 2")
    assert not (tmp_path / "no").exists()
    export(source, tmp_path / "none", with_tokenizer=False)
    (warning,) = (record for record in caplog.records if record.name.startswith("oryx_megatron"))
    assert warning.getMessage().startswith("no license is set")


def test_tokenizer_of_an_export_reads_as_the_runs(exported: Path, project: Path) -> None:
    ours = load_tokenizer(project.parent / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    for text in [*synthetic_texts(20, seed=5), "  été\n\t</s> 中 ", ""]:
        assert theirs(text, split_special_tokens=True).input_ids == ours.encode(text)
        assert "</s>" in text or theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == text
    assert theirs.eos_token_id == ours.eod_id
    # What fine-tuning puts into a text becomes the id that training ended texts with, and no collator masks it.
    assert theirs("a</s>b").input_ids == [*ours.encode("a"), ours.eod_id, *ours.encode("b")]
    assert theirs.pad_token_id not in (None, ours.eod_id)
    generation = json.loads((exported / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (ours.eod_id, theirs.pad_token_id)
    assert set(theirs("a")) == {"input_ids", "attention_mask"}
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert theirs("a<|im_end|>").input_ids[-1] == theirs.convert_tokens_to_ids("<|im_end|>")
    batch = theirs(["a", "a longer one"], padding=True, padding_side="left", return_tensors="pt")
    assert batch.attention_mask[0].tolist() == [0] * (batch.input_ids.shape[1] - 1) + [1]


@pytest.mark.parametrize("kind", ["unigram", "bpe with prefix", "huggingface"])
def test_other_tokenizers_travel_too(kind: str, tmp_path: Path) -> None:
    import sentencepiece
    import tokenizers

    folder, out = tmp_path / "tokenizer", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    texts = synthetic_texts(80)
    if kind == "huggingface":
        fast = tokenizers.Tokenizer(tokenizers.models.BPE())
        fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = tokenizers.decoders.ByteLevel()
        fast.train_from_iterator(
            texts, tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], show_progress=False)
        )
        fast.save(str(folder / "tokenizer.json"))
        tokenizer = write_manifest(folder, source="test", eod="<end>")
    else:
        (tmp_path / "text").write_text("\n".join(texts))
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text"),
            model_prefix=str(folder / "tokenizer"),
            model_type=kind.split()[0],
            vocab_size=300 if kind != "unigram" else 50,
            byte_fallback=kind != "unigram",
            minloglevel=2,
        )
        tokenizer = write_manifest(folder, source="test")
    template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    pad = export_tokenizer(tokenizer, out, 128)
    theirs = AutoTokenizer.from_pretrained(out)
    for text in synthetic_texts(20, seed=6):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eod_id
    assert theirs.pad_token_id == pad
    assert (pad == tokenizer.eod_id) == (kind == "huggingface")  # whose vocabulary has nothing else
    ids = theirs.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True, return_dict=True)["input_ids"]
    assert ids[-1] == tokenizer.eod_id


@pytest.mark.parametrize("mixer", ["mamba2", "gdn"])
def test_a_llama_becomes_an_oryx_that_attends_to_the_same(mixer: str, project: Path, tmp_path: Path) -> None:
    """With the one part that Llama lacks taken out, the RMSNorm behind the mixer, attention mode is the Llama."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            initializer_range=0.3,
            tie_word_embeddings=mixer == "gdn",
            rope_parameters=(LLAMA3 if mixer == "gdn" else YARN) | {"rope_theta": 5000.0},
            max_position_embeddings=64,
        )
    ).eval()
    llama.save_pretrained(tmp_path / "llama")
    run = load_run(project, [])
    import_llama(tmp_path / "llama", tmp_path / "start", run, mixer=mixer)
    manifest = read_manifest(find_checkpoint(tmp_path / "start"))
    assert (manifest.iteration, manifest.run().model.mixer) == (0, mixer)
    export(tmp_path / "start", tmp_path / "hf")
    verify(tmp_path / "start", tmp_path / "hf", plans=1, length=40)
    oryx = OryxForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(0, 320, (2, 50))  # beyond the original length of both scalings
    with torch.no_grad():
        assert torch.isfinite(oryx(ids, mode_plan="recurrent").logits).all()
        for layer in oryx.model.layers:
            layer.mixer.out_norm = Passing()
        torch.testing.assert_close(oryx(ids, mode_plan="attention").logits, llama(ids).logits, atol=1e-4, rtol=0)
    shutil.rmtree(tmp_path / "start")
    rewrite(tmp_path / "llama", hidden_act="gelu")
    with pytest.raises(ConversionError, match="hidden_act is 'gelu'"):
        import_llama(tmp_path / "llama", tmp_path / "start", run, mixer=mixer)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type: 'dynamic' has no counterpart; known: default, linear,"),
        ({"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}, "rope_type: 'longrope' has no counterpart"),
        (YARN | {"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor: only the whole head"),
        (YARN | {"sharpness": 2}, "rope_parameters.sharpness: has no counterpart"),
        (YARN | {"factor": 0.5}, "rope_scaling.factor: 0.5 should be at least 1"),
        ({"rope_type": "llama3", "factor": 2.0}, "rope_scaling.low_freq_factor: is missing; rope_type llama3 needs it"),
    ],
)
def test_rotary_scalings_without_counterpart(rope: dict, message: str, project: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes)).save_pretrained(tmp_path / "llama")
    rewrite(tmp_path / "llama", rope_parameters=rope)
    with pytest.raises(ConversionError) as refused:
        import_llama(tmp_path / "llama", tmp_path / "start", load_run(project, []))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


class Passing(torch.nn.Module):
    def forward(self, x: torch.Tensor, gate: None) -> torch.Tensor:
        return x


def rewrite(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def drop_tensor(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def add_tensor(folder: Path, name: str) -> None:
    save_file(load_file(folder / "model.safetensors") | {name: torch.zeros(2)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "model.safetensors is damaged"),
        (lambda f: (f / "config.json").unlink(), "is this a Hugging Face folder"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: rewrite(f, model_type="gpt2"), "model type 'gpt2'; known: oryx, llama"),
        (lambda f: rewrite(f, mixer="rwkv"), "mixer is 'rwkv'"),
        (lambda f: rewrite(f, intermediate_size=50), "has shape \\[48, 32\\], the config asks for \\[50, 32\\]"),
        (lambda f: drop_tensor(f, "model.norm.weight"), "lacks model.norm.weight"),
        (lambda f: add_tensor(f, "model.extra"), "holds tensors that nothing maps: model.extra"),
        (lambda f: (f / "oryx_manifest.json").unlink(), "give a run config with --run"),
        (lambda f: (f / "oryx_manifest.json").write_text('{"a": 1}'), "oryx_manifest.json is damaged"),
        (lambda f: rewrite(f, attn_implementation="a/b"), "config.json: `attn_implementation` is not a field"),
        (lambda f: rewrite(f, quantization_config={}), "`quantization_config` is not a field"),
        (lambda f: rewrite(f, auto_map={"AutoModel": "a/b--c.D"}), "`auto_map` does not name the classes"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json: adapters are not loaded"),
    ],
)
def test_damaged_exports_are_refused(harm, message: str, exported: Path, tmp_path: Path) -> None:
    harm(exported)
    with pytest.raises(ConversionError, match=message) as refused:
        import_(exported, tmp_path / "back")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("atention", "--mode-plan: mode plan `atention`: unknown form"),
        ("prompt:attention,new:recurent", "mode plan `recurent`: unknown form"),
        ("prompt:attention", "needs `,new:PLAN`"),
        ("runs:a0-8,r9-16", "run `r9-16` does not start at 8"),
        ("prefix:many", "`many` is not a whole number"),
    ],
)
def test_a_mode_plan_that_is_none_is_refused_at_once(plan: str, message: str, project: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=re.escape(message)) as refused:
        export(project.parent / "gdn tp2", tmp_path / "hf", mode_plan=plan)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_missing_shard_is_named(project: Path, tmp_path: Path) -> None:
    export(project.parent / "gdn tp2", tmp_path / "hf", shard_bytes=20_000)
    shard = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConversionError, match=f"shard {shard.name} is missing"):
        import_(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), CheckpointError, "no complete checkpoint"),
        (lambda f: (f / ".metadata").write_bytes(b"x"), CheckpointError, ".metadata is damaged or hostile"),
        (lambda f: next(f.glob("*.distcp")).unlink(), CheckpointError, "distcp is missing"),
        (lambda f: [p.write_bytes(b"") for p in f.glob("*.distcp")], CheckpointError, "cannot be read"),
    ],
)
def test_damaged_checkpoints_are_refused(harm, error, message: str, project: Path, tmp_path: Path) -> None:
    shutil.copytree(project.parent / "gdn tp2", tmp_path / "run")
    harm(tmp_path / "run" / "checkpoints" / "iteration_0000007")
    with pytest.raises(error, match=message) as refused:
        export(tmp_path / "run", tmp_path / "hf")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "hf").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_tensor_too_many_or_too_few_in_a_checkpoint(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project.parent / "gdn tp2", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "iteration_0000007" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("checksum")  # as of one that was written so
    for field, value, message in (
        ("output_gate", False, "nothing maps: decoder.layers.self_attention.in_proj.weight.output_gate"),
        ("tie_embeddings", False, "lacks output_layer.weight"),
        ("num_layers", 3, "has shape \\[4, "),
    ):
        model = manifest["config"]["model"] | {field: value}
        path.write_text(json.dumps(manifest | {"config": manifest["config"] | {"model": model}}))
        with pytest.raises(ConversionError, match=message):
            export(tmp_path / "run", tmp_path / "hf")


def test_existing_targets_and_foreign_tokenizers(exported: Path, project: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="exists already"):
        export(project.parent / "gdn tp2", exported)
    export(project.parent / "shared tp2", exported, overwrite=True)
    assert json.loads((exported / "config.json").read_text())["shared_query"]
    other = tiny_project(tmp_path / "other").parent / "tokenizer"
    model = other / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b"\x1a\x00")  # one more empty field: another file of equal meaning
    write_manifest(other, source="test")
    with pytest.raises(ConversionError, match="is not the tokenizer of the checkpoint"):
        export(project.parent / "gdn tp2", tmp_path / "hf", tokenizer=other)


def test_verify_sees_a_difference(exported: Path, project: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    name = "model.layers.2.mixer.decay_proj.weight"
    save_file(tensors | {name: tensors[name] + 0.5}, exported / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match="fp32 logits under plan recurrent differ by"):
        verify(project.parent / "gdn tp2", exported, plans=0)


@pytest.mark.parametrize("case", CASES)
def test_the_export_generates_what_the_checkpoint_does(case: str, project: Path, tmp_path: Path) -> None:
    export(project.parent / case, tmp_path / "hf")
    ways = [result.way for result in verify_generation(project.parent / case, tmp_path / "hf", new=8)]
    model = run_of(project, case).model
    each = ["greedy", "greedy with a static cache", "greedy in a batch", "greedy in a batch", "3 beams"]
    each += ["greedy with drafts"] if model.mtp_layers else []
    assert ways == each * (1 if model.single_mode else 2)


def test_generation_that_drops_the_cache_is_seen(exported: Path, project: Path, monkeypatch) -> None:
    """As under a version of transformers that calls it otherwise."""
    prepare = OryxForCausalLM.prepare_inputs_for_generation

    def dropping(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        return {name: value for name, value in inputs.items() if name in ("input_ids", "mode_plan")}

    monkeypatch.setattr(OryxForCausalLM, "prepare_inputs_for_generation", dropping)
    with pytest.raises(ConversionError, match=r"does not generate what .* does: greedy under plan prompt:"):
        verify_generation(project.parent / "gdn tp2", exported)


@pytest.mark.parametrize("case", ["mamba2 pp2", "gdn tp2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_other_formats_are_verified_against_their_own_weights(
    case: str, dtype: str, project: Path, tmp_path: Path
) -> None:
    export(project.parent / case, tmp_path / "hf", dtype=dtype)
    assert all(result.agrees for result in verify(project.parent / case, tmp_path / "hf", plans=1, length=40))
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] * 1.01}, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match="does not compute"):
        verify(project.parent / case, tmp_path / "hf", plans=1, length=40)


def test_a_failed_check_leaves_no_folder(exported: Path, project: Path, tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        assert (folder / "README.md").is_file() or (folder / "checkpoints").is_dir()
        raise ConversionError("no")

    for convert in (
        lambda: export(project.parent / "gdn tp2", tmp_path / "new", check=check),
        lambda: import_(exported, tmp_path / "new", check=check),
    ):
        with pytest.raises(ConversionError, match="no"):
            convert()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_another_run_starts_from_the_weights(exported: Path, project: Path, tmp_path: Path) -> None:
    run = load_run(project, ["train.iterations=99"])
    import_(exported, tmp_path / "start", run)
    manifest = read_manifest(find_checkpoint(tmp_path / "start"))
    assert (manifest.iteration, manifest.run().train.iterations, manifest.evaluations) == (0, 99, [])
    assert manifest.run().model == run_of(project, "gdn tp2").model
    assert to_dict(manifest.run()) == manifest.config


def test_tools_convert_and_complain_in_one_line(project: Path, tmp_path: Path) -> None:
    def tool(name: str, *arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=250)

    done = tool("convert_to_hf.py", project.parent / "mamba2 pp2", tmp_path / "hf", "--verify", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verified") == 10
    assert done.stdout.count("generated") == 12  # with drafts too
    # Overrides behind an option, as in the documentation.
    options = ("--run", project, "train.iterations=99")
    assert tool("convert_from_hf.py", tmp_path / "hf", tmp_path / "next", *options).returncode == 0
    assert read_manifest(find_checkpoint(tmp_path / "next")).run().train.iterations == 99
    refused = tool("convert_from_hf.py", tmp_path / "hf" / "nowhere", tmp_path / "back")
    assert refused.returncode == 2
    assert refused.stderr.strip().startswith("error: ")
    assert refused.stderr.count("\n") == 1


MEMORY = """
import json, resource, sys
from pathlib import Path
from oryx_megatron.config import load_run
from oryx_megatron.hf.convert import export, import_
folder, config = Path(sys.argv[1]), Path(sys.argv[2])
import torch
from oryx_megatron.hf.configuration_oryx import OryxConfig
from oryx_megatron.hf.folders import hf_shapes
from oryx_megatron.hf.tensors import write_safetensors
wide = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4}
shape = OryxConfig(num_hidden_layers=10, vocab_size=8192, **wide)
names = {name: (s, torch.float32) for name, s in hf_shapes(shape).items()}
source = folder / "hf"
source.mkdir()
write_safetensors(source, names, lambda name: torch.full(names[name][0], 0.5), 10**9)
shape.save_pretrained(source)
size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
peaks = [peak()]
import_(source, folder / "run", load_run(config, []))
peaks.append(peak())
export(folder / "run", folder / "again")
peaks.append(peak())
print(json.dumps([size, peaks]))
"""


def test_memory_stays_below_the_models_size(project: Path, tmp_path: Path) -> None:
    """What a conversion adds to the libraries' own memory is a fraction of the model."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    size, peaks = json.loads(done.stdout.splitlines()[-1])
    assert size > 140e6
    assert max(peaks) - peaks[0] < 0.6 * size
