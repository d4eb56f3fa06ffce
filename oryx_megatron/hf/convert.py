"""Between training checkpoints and Hugging Face folders, tensor by tensor, with every name accounted for."""

from __future__ import annotations

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it puts off what that loads in vain

# isort: split
import dataclasses
import hashlib
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

from oryx_megatron.checkpoint import Manifest, find_checkpoint, read_manifest, store
from oryx_megatron.checkpoint.manifest import LARGEST, file_digest, package_versions, write_manifest
from oryx_megatron.config import check_model, from_dict, to_dict, to_yaml
from oryx_megatron.config.schema import ModelConfig, RunConfig
from oryx_megatron.config.validate import check_license
from oryx_megatron.data.files import appearing
from oryx_megatron.data.tokenizer import Tokenizer, difference, load_tokenizer
from oryx_megatron.errors import CheckpointError, ConfigError, ConversionError
from oryx_megatron.hf import modeling_oryx
from oryx_megatron.hf.card import model_card
from oryx_megatron.hf.configuration_oryx import OryxConfig
from oryx_megatron.hf.fields import from_hf_config, to_hf_config
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM
from oryx_megatron.hf.tables import (
    EXTRA_STATE,
    FP32,
    Rule,
    check_names,
    extra_states,
    weight_rules,
)
from oryx_megatron.hf.tensors import CheckpointReader, SafetensorsReader, Shape, write_checkpoint, write_safetensors
from oryx_megatron.hf.tokenizer import export_tokenizer
from oryx_megatron.platform import git_commit
from oryx_megatron.reading import parse_json, read_text

log = logging.getLogger(__name__)

MANIFEST = "oryx_manifest.json"
"""The checkpoint's manifest, kept in an export so that it can become a checkpoint again."""

Format = Literal["keep", "bf16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_NOT_WEIGHTS = ("optimizer.", "rng_state")
"""Starts of the names of what a checkpoint holds besides the model."""


@dataclass(frozen=True)
class Weights:
    """A Hugging Face folder as the weights of an Oryx model; its tensors are read as they are asked for."""

    source: Path
    model: ModelConfig
    shapes: dict[str, Shape]
    """Name → shape of every tensor, under the names of an export."""
    dtype: Callable[[str], torch.dtype]
    read: Callable[[str], Tensor]
    kept: Manifest | None = None
    """The manifest of the checkpoint that an export was made of."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote."""

    source: Path
    target: Path
    tensors: int
    bytes: int
    model: ModelConfig


# ------------------------------------------------------------------------------------------------- to Hugging Face


def export(
    source: str | Path,
    target: str | Path,
    *,
    dtype: Format = "keep",
    shard_bytes: int = 5_000_000_000,
    mode_plan: str | None = None,
    tokenizer: str | Path | None = None,
    with_tokenizer: bool = True,
    license: str | None = None,
    overwrite: bool = False,
    check: Callable[[Path], object] | None = None,
) -> Conversion:
    """Write a checkpoint, of any layout, as a folder that transformers loads without this package.

    Args:
        source: Checkpoint, or run folder (its newest checkpoint).
        target: Folder to make; it appears when it is whole.
        dtype: Format of the weights; gates' small parameters stay fp32 in any case.
        shard_bytes: Largest size of one safetensors file.
        mode_plan: Default plan of the exported model.
        tokenizer: Tokenizer folder; default the run's.
        with_tokenizer: False leaves the tokenizer out.
        license: Of the weights, as the Hub writes it; default the run's. Without one the model card names none.
        overwrite: Replace a folder that an earlier call wrote, and nobody changed since.
        check: Called with the whole folder before it appears under its name; what it raises leaves none.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
        DataError: the tokenizer is missing or not the run's.
        ConversionError: a tensor is missing, left over or of a wrong shape; the target exists; no such mode plan.
    """
    source, target = find_checkpoint(source), Path(target)
    manifest = read_manifest(source)
    run = manifest.run()
    if license is not None:
        run = dataclasses.replace(run, license=license)
        manifest = dataclasses.replace(manifest, config=to_dict(run))
    check_license(run.license)
    if run.license is None:
        log.warning("no license is set: the model card names none; set `license` in the run config, or use --license")
    model = run.model
    spoken = _tokenizer_of(run, manifest, tokenizer) if with_tokenizer else None
    config = to_hf_config(
        model,
        mode_plan=mode_plan,
        mode_chunk=run.modes.chunk,
        max_position_embeddings=run.data.sequence_length,
        architectures=["OryxForCausalLM"],
        eos_token_id=manifest.tokenizer["eod"],
    )
    try:
        modeling_oryx.check_default_plan(config)
    except ValueError as error:
        raise ConversionError(f"--mode-plan: {error}") from None
    reader = CheckpointReader(source)
    rules = weight_rules(model)
    wanted = hf_shapes(config)
    found = {name: shape for name, shape in reader.shapes().items() if not _beside_weights(name)}
    check_names(checkpoint_shapes(rules, wanted, model.num_layers), found, f"{source}:")
    store.check_files(source, manifest)
    tensors: dict[str, tuple[Shape, torch.dtype]] = {}
    places: dict[str, tuple[Rule, int | None]] = {}
    for rule, layer in _unrolled(rules, model.num_layers):
        for name in (_named(hf, layer) for hf in rule.hf):
            own = reader.dtype(rule.checkpoint[0]) if dtype == "keep" else _DTYPES[dtype]
            tensors[name] = (wanted[name], torch.float32 if name.split(".")[-1] in FP32 else own)
            places[name] = rule, layer
    config.dtype = tensors["model.embed_tokens.weight"][1]

    def produce(name: str) -> Tensor:
        rule, layer = places[name]
        names = [_named(hf, layer) for hf in rule.hf]
        start = sum(wanted[other][0] for other in names[: names.index(name)])
        rows = torch.cat([reader.read(part, layer if rule.layered else None) for part in rule.checkpoint])
        return rows[start : start + wanted[name][0]].to(tensors[name][1])

    inputs = [source] if spoken is None else [source, spoken.folder]
    with appearing(target, overwrite=overwrite, inputs=inputs, error=ConversionError) as folder:
        write_safetensors(folder, dict(sorted(tensors.items(), key=_by_layer)), produce, shard_bytes)
        config.save_pretrained(folder)
        for path in model_files():
            shutil.copyfile(path, folder / path.name)
        end = manifest.tokenizer["eod"]
        pad = end if spoken is None else export_tokenizer(spoken, folder, run.data.sequence_length)
        GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False).save_pretrained(folder)
        files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
        write_manifest(folder, dataclasses.replace(manifest, files=files), MANIFEST)
        (folder / "README.md").write_text(model_card(manifest, target.name), encoding="utf-8")
        if check is not None:
            check(folder)
    size = sum(kind.itemsize * math.prod(shape) for shape, kind in tensors.values())
    return Conversion(source, target, len(tensors), size, model)


def model_files() -> list[Path]:
    """Python files that an export ships: the model's, and what it imports beside it, as transformers finds them."""
    model = str(modeling_oryx.__file__)
    return sorted(map(Path, {model, *get_relative_import_files(model)}))


def _tokenizer_of(run: RunConfig, manifest: Manifest, folder: str | Path | None) -> Tokenizer:
    tokenizer = load_tokenizer(folder or run.data.tokenizer)
    if (why := difference(manifest.tokenizer, tokenizer.describe())) is not None:
        raise ConversionError(
            f"{tokenizer.folder} is not the tokenizer of the checkpoint, which has {why}; give the right one with "
            "--tokenizer"
        )
    return tokenizer


# ----------------------------------------------------------------------------------------------- from Hugging Face


def import_(
    source: str | Path,
    target: str | Path,
    run: RunConfig | None = None,
    *,
    overwrite: bool = False,
    check: Callable[[Path], object] | None = None,
) -> Conversion:
    """Turn an Oryx folder of Hugging Face's form into a checkpoint that loads under any layout.

    Args:
        source: Folder with config.json and safetensors.
        target: Run folder to make; the checkpoint lies in its checkpoints/.
        run: Run config that the manifest shall hold (its model is replaced); default: the one in the folder's
            oryx_manifest.json.
        overwrite: Replace a folder that an earlier call wrote, and nobody changed since.
        check: Called with the whole run folder before it appears under its name; what it raises leaves none.

    Raises:
        ConversionError: not an Oryx folder, damaged, or a tensor is missing, left over or of a wrong shape.
    """
    weights = open_export(source)
    kept = weights.kept
    if run is None:
        if kept is None:
            raise ConversionError(
                f"{source} has no {MANIFEST} that says how it was trained; give a run config with --run"
            )
        run = kept.run()
    elif kept is None or not _same(run, kept.run()):
        kept = None  # another run: it starts from these weights, at its own first step
    return _convert(weights, Path(target), run, kept, overwrite, check)


def open_export(source: str | Path) -> Weights:
    """An Oryx folder of Hugging Face's form. Raises ConversionError as `import_` does."""
    source = Path(source)
    config = _oryx_config(source)
    kept = _kept_manifest(source)
    name = kept.config["model"]["name"] if kept is not None else source.resolve().name
    model = _checked(source, lambda: from_hf_config(config, name))
    reader = SafetensorsReader(source)
    shapes = hf_shapes(config)
    found = {name: shape for name, shape in reader.shapes().items() if not _tied(name, config)}
    check_names(shapes, found, f"{source}:")
    check_export(source)
    return Weights(source, model, shapes, reader.dtype, reader.read, kept)


def import_llama(
    source: str | Path,
    target: str | Path,
    run: RunConfig,
    *,
    mixer: Literal["gdn", "mamba2"] = "mamba2",
    seed: int = 0,
    overwrite: bool = False,
) -> Conversion:
    """Start an Oryx model from a Transformer in Llama's layout. This is our own extension, not the paper's.

    Copied: embedding, norms, SwiGLU, key, value, query and output projections, rotary base. The recurrent query starts
    as a copy of the attention query (keys and values are shared anyway); gates and their biases start as in a new
    model; a Mamba-2 start gets convolutions that pass their input through, a Gated DeltaNet start gets none, because
    its activation would change keys and values; there is no output gate and no qk_norm. What attention reads is then
    exactly Llama's; only the RMSNorm behind the mixer, which Llama lacks, has to be learned.

    Args as in `import_`; `seed` of the new gates.

    Raises:
        ConversionError: not a Llama folder, or one with biases, another activation or scaled rotary embedding.
    """
    return _convert(open_llama(source, mixer=mixer, seed=seed), Path(target), run, None, overwrite)


def open_llama(source: str | Path, *, mixer: Literal["gdn", "mamba2"], seed: int) -> Weights:
    """A Transformer in Llama's layout as an Oryx model. Raises ConversionError as `import_llama` does."""
    source = Path(source)
    theirs = _json(source / "config.json")
    model = _checked(source, lambda: _llama_model(source, theirs, mixer))
    config = to_hf_config(model)
    reader = SafetensorsReader(source)
    shapes = hf_shapes(config)
    copied = {_named(ours, i): _named(llama, i) for i in range(model.num_layers) for ours, llama in LLAMA.items()}
    copied = {ours: llama for ours, llama in copied.items() if ours in shapes}
    found = {name: shape for name, shape in reader.shapes().items() if not _tied(name, config)}
    check_names({llama: shapes[ours] for ours, llama in copied.items()}, found, f"{source}:")
    dtype = reader.dtype("model.embed_tokens.weight")

    def produce(name: str) -> Tensor:
        if name in copied:
            return reader.read(copied[name])
        return _new_tensor(name, shapes[name], model, seed).to(dtype_of(name))

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if name.split(".")[-1] in FP32 else dtype

    return Weights(source, model, shapes, dtype_of, produce)


def open_folder(source: str | Path, *, mixer: Literal["gdn", "mamba2"], seed: int) -> Weights:
    """A Hugging Face folder of either kind; `mixer` and `seed` are for a Llama.

    Raises:
        ConversionError: neither, damaged, or a tensor is missing, left over or of a wrong shape.
    """
    if hf_model_type(source) == "llama":
        return open_llama(source, mixer=mixer, seed=seed)
    return open_export(source)


LLAMA = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "model.layers.{i}.input_layernorm.weight": "model.layers.{i}.input_layernorm.weight",
    "model.layers.{i}.pre_mlp_layernorm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "model.layers.{i}.mixer.k_proj.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "model.layers.{i}.mixer.v_proj.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "model.layers.{i}.mixer.q_attention_proj.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "model.layers.{i}.mixer.q_recurrent_proj.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "model.layers.{i}.mixer.out_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "model.layers.{i}.mlp.up_proj.weight": "model.layers.{i}.mlp.up_proj.weight",
    "model.layers.{i}.mlp.down_proj.weight": "model.layers.{i}.mlp.down_proj.weight",
}
"""Oryx name → the Llama tensor it is copied from."""


def _llama_model(source: Path, theirs: dict[str, Any], mixer: Literal["gdn", "mamba2"]) -> ModelConfig:
    if theirs.get("model_type") != "llama":
        raise ConversionError(f"{source}: model type {theirs.get('model_type')!r}; known: oryx, llama")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    for field, value, wanted in (
        ("hidden_act", theirs.get("hidden_act", "silu"), "silu"),
        ("attention_bias", theirs.get("attention_bias", False), False),
        ("mlp_bias", theirs.get("mlp_bias", False), False),
        ("rope type", rope.get("rope_type", rope.get("type", "default")), "default"),
    ):
        if value != wanted:
            raise ConversionError(f"{source}: {field} is {value!r}; only {wanted!r} can become an Oryx model")
    try:
        heads = theirs["num_attention_heads"]
        width = theirs.get("head_dim") or theirs["hidden_size"] // heads
        fields = {
            "name": f"{source.resolve().name}-{mixer}",
            "mixer": mixer,
            "num_layers": theirs["num_hidden_layers"],
            "hidden_size": theirs["hidden_size"],
            "ffn_hidden_size": theirs["intermediate_size"],
            "num_heads": heads,
            "num_kv_heads": theirs.get("num_key_value_heads") or heads,
            "qk_head_dim": width,
            "v_head_dim": width,
            "vocab_size": theirs["vocab_size"],
            "conv_width": 4 if mixer == "mamba2" else 0,
            "output_gate": False,
            "qk_norm": False,
            "rope_theta": float(rope.get("rope_theta") or theirs.get("rope_theta") or 10000.0),
            "tie_embeddings": theirs.get("tie_word_embeddings") or False,
            "norm_epsilon": theirs.get("rms_norm_eps", 1e-6),
            "init_std": theirs.get("initializer_range", 0.02),
        }
        return from_dict(ModelConfig, fields, source="config.json")
    except KeyError as error:
        raise ConversionError(f"{source / 'config.json'} lacks {error}") from None


def _new_tensor(name: str, shape: Shape, model: ModelConfig, seed: int) -> Tensor:
    """First value of a tensor that Llama lacks."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    kind = name.removesuffix(".weight").split(".")[-1]
    if kind in ("out_norm", "d_skip"):
        return torch.ones(shape)
    if kind == "conv":
        taps = torch.zeros(shape)
        taps[:, -1] = 1.0
        return taps
    if kind == "a_log":
        return torch.empty(shape).uniform_(*model.decay_init, generator=generator).log()
    if kind == "dt_bias":
        low, high = (math.log(bound) for bound in model.dt_init)
        dt = torch.empty(shape).uniform_(low, high, generator=generator).exp()
        return dt + torch.log(-torch.expm1(-dt))
    if kind == "decay_proj":
        return torch.empty(shape).normal_(0, model.init_std, generator=generator)
    raise ConversionError(f"no first value is known for {name}")


def _convert(
    weights: Weights,
    target: Path,
    run: RunConfig,
    kept: Manifest | None,
    overwrite: bool,
    check: Callable[[Path], object] | None = None,
) -> Conversion:
    """Write the run folder `target` with one checkpoint and the config that resumes from it."""
    inputs: list[str | Path] = [weights.source, run.data.tokenizer]
    with appearing(target, overwrite=overwrite, inputs=inputs, error=ConversionError) as folder:
        writing = store.begin(folder / "checkpoints", kept.iteration if kept else 0)
        tensors, size = write_weights(weights, writing, run, kept)
        store.commit(writing)
        own = dataclasses.replace(run, model=weights.model, output_dir=str(target), init_from=None)
        (folder / "config.yaml").write_text(to_yaml(own), encoding="utf-8")
        if check is not None:
            check(folder)
    return Conversion(weights.source, target, tensors, size, weights.model)


def write_weights(weights: Weights, folder: Path, run: RunConfig, kept: Manifest | None = None) -> tuple[int, int]:
    """Write them into an empty folder as a checkpoint of `run`, its model replaced; number and bytes of its tensors.

    Args:
        weights: What to write.
        folder: Existing and empty.
        run: Config for the manifest.
        kept: The manifest instead.

    Raises:
        ConversionError: the disk is full or the folder not writable.
    """
    model, read = weights.model, weights.read
    rules = weight_rules(model)
    run = dataclasses.replace(run, model=model)
    wanted = checkpoint_shapes(rules, weights.shapes, model.num_layers)
    places = {part: (rule, number) for rule in rules for number, part in enumerate(rule.checkpoint)}
    stacked = {part for part, (rule, _) in places.items() if rule.layered}
    dtypes = {part: weights.dtype(_named(rule.hf[0], 0)) for part, (rule, _) in places.items()}

    def produce(part: str, layer: int | None) -> Tensor:
        rule, number = places[part]
        rows = torch.cat([read(_named(hf, layer)) for hf in rule.hf])
        start = sum(rule.rows[:number])
        return rows[start : start + rule.rows[number]].clone() if rule.rows else rows

    write_checkpoint(folder, wanted, dtypes, stacked, produce, extra_states(model))
    files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    if kept is not None:
        manifest = dataclasses.replace(kept, files=files)
    else:
        manifest = Manifest(
            iteration=0,
            consumed_samples=0,
            config=to_dict(run),
            layout={"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1},
            rng={"seed": run.seed},
            data={"train": None, "tokenizer": _described(run)},
            evaluations=[],
            versions=package_versions(),
            commit=git_commit(),
            files=files,
        )
    write_manifest(folder, manifest)
    return len(wanted), sum(dtypes[name].itemsize * math.prod(shape) for name, shape in wanted.items())


def _same(run: RunConfig, other: RunConfig) -> bool:
    """Whether they train alike: a license may be given at the export."""
    return to_dict(dataclasses.replace(run, license=None)) == to_dict(dataclasses.replace(other, license=None))


def _described(run: RunConfig) -> dict[str, Any]:
    return dict(load_tokenizer(run.data.tokenizer).describe())


def _kept_manifest(source: Path) -> Manifest | None:
    if not (source / MANIFEST).exists():
        return None
    try:
        return read_manifest(source, MANIFEST)
    except CheckpointError as error:
        raise ConversionError(str(error)) from None


def check_export(folder: Path) -> None:
    """Compare what an export computes by (config, weights, tokenizer) with its manifest, where that lists them.

    Raises:
        ConversionError: a file is damaged, or was changed since.
    """
    kept = _kept_manifest(folder)
    if kept is None or "config.json" not in kept.files:  # the first version listed the checkpoint's files
        return
    names = {name for name in kept.files if name in _COMPUTES or ".safetensors" in name}
    try:
        store.check_files(folder, kept, names)
    except CheckpointError as error:
        why = str(error).removesuffix("; use another checkpoint")
        raise ConversionError(
            f"{why}; export it again, or, if it was changed on purpose, remove its {MANIFEST} (import then needs --run)"
        ) from None


_COMPUTES = ("config.json", "tokenizer.json", "tokenizer.model")
"""Files of an export, besides those of weights, that decide what it computes."""


def _oryx_config(source: Path) -> OryxConfig:
    fields = recognised(source)
    if fields.get("model_type") != OryxConfig.model_type:
        raise ConversionError(f"{source}: model type {fields.get('model_type')!r}; known: oryx, llama")
    try:
        return OryxConfig.from_dict(fields)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ConversionError(f"{source / 'config.json'}: {' '.join(str(error).split())}") from None


def recognised(source: str | Path) -> dict[str, Any]:
    """config.json of a folder that transformers may load here: it asks for nothing from elsewhere.

    transformers fetches kernels, quantisers and base models that such a file names. Raises ConversionError with the
    field: of an Oryx folder any that an export lacks, of another model's one that names code or a second model.
    """
    path = Path(source) / "config.json"
    fields = _json(path)
    if (adapter := path.with_name("adapter_config.json")).exists():
        raise ConversionError(f"{adapter}: adapters are not loaded here; merge them (peft: merge_and_unload) and save")
    own = fields.get("model_type") == OryxConfig.model_type
    known = {*OryxConfig().to_dict(), "torch_dtype"}
    for name in fields:
        if (own and name not in known) or re.search("attn_impl|experts_impl|kernel_|use_kernels|quantization", name):
            raise ConversionError(f"{path}: `{name}` is not a field that is loaded here; remove it")
    if own and fields.get("auto_map", OryxConfig().auto_map) != OryxConfig().auto_map:
        raise ConversionError(f"{path}: `auto_map` does not name the classes of an Oryx export")
    return fields


def hf_model_type(source: str | Path) -> str | None:
    """`model_type` of a folder's config.json. Raises ConversionError when there is none to read."""
    return _json(Path(source) / "config.json").get("model_type")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_text(path, LARGEST))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}); is this a Hugging Face folder?") from None
    except ValueError as error:
        raise ConversionError(f"{path} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return value


def _checked(source: Path, make: Callable[[], ModelConfig]) -> ModelConfig:
    """The model of a config.json that may hold anything; ConversionError when it is none."""
    try:
        model = make()
        check_model(model)
    except ConfigError as error:
        raise ConversionError(f"{source / 'config.json'}: {str(error).removeprefix('config.json: ')}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ConversionError(f"{source / 'config.json'}: a field is of the wrong type ({error})") from None
    return model


def _tied(name: str, config: OryxConfig) -> bool:
    """Whether a file repeats the embedding under the output layer's name."""
    return name == "lm_head.weight" and bool(config.tie_word_embeddings)


# ---------------------------------------------------------------------------------------------------------- common


def hf_shapes(config: OryxConfig) -> dict[str, Shape]:
    """Name → shape of every tensor of the Hugging Face model."""
    with torch.device("meta"):
        model = OryxForCausalLM(config)
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if not _tied(name, config)}


def checkpoint_shapes(rules: tuple[Rule, ...], hf: dict[str, Shape], layers: int) -> dict[str, Shape]:
    """Name → shape of every weight of a checkpoint, from the shapes of the other side."""
    shapes: dict[str, Shape] = {}
    for rule in rules:
        parts = [hf[_named(name, 0)] for name in rule.hf]
        rows = rule.rows or (sum(part[0] for part in parts),)
        for name, count in zip(rule.checkpoint, rows):
            shape = (count, *parts[0][1:])
            shapes[name] = (layers, *shape) if rule.layered else shape
    return shapes


def _unrolled(rules: tuple[Rule, ...], layers: int) -> Iterator[tuple[Rule, int | None]]:
    for rule in rules:
        yield from ((rule, i) for i in range(layers)) if rule.layered else ((rule, None),)


def _named(name: str, layer: int | None) -> str:
    return name.format(i=layer)


def _by_layer(item: tuple[str, Any]) -> tuple[int, str]:
    """Sort key: embedding, then layer by layer, then the rest."""
    name = item[0].split(".")
    if name[:2] == ["model", "layers"]:
        return int(name[2]), item[0]
    return (-1 if name[1] == "embed_tokens" else 1 << 30), item[0]


def _beside_weights(name: str) -> bool:
    return name.startswith(_NOT_WEIGHTS) or EXTRA_STATE in name


__all__ = ["CheckpointError", "Conversion", "export", "hf_model_type", "import_", "import_llama", "recognised"]
