"""Between training checkpoints and Hugging Face folders, tensor by tensor, with every name accounted for."""

from __future__ import annotations

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it defers imports that nothing here uses

# isort: split
import dataclasses
import logging
import math
import shutil
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

from oryx_megatron.checkpoint import Manifest, find_checkpoint, read_manifest, store
from oryx_megatron.checkpoint.average import NO_AVERAGE, PREFIX, has_average
from oryx_megatron.checkpoint.manifest import file_digest, package_versions, write_manifest
from oryx_megatron.config import check_model, to_dict, to_yaml
from oryx_megatron.config.schema import ModelConfig, RunConfig, WeightsKind
from oryx_megatron.config.validate import check_license
from oryx_megatron.data.files import appearing
from oryx_megatron.data.tokenizer import Tokenizer, difference, load_tokenizer
from oryx_megatron.errors import ConversionError
from oryx_megatron.hf import modeling_oryx
from oryx_megatron.hf.card import model_card
from oryx_megatron.hf.fields import ROPE, to_hf_config
from oryx_megatron.hf.folders import MANIFEST, ROUTER, Weights, hf_model_type, hf_shapes, named, open_export
from oryx_megatron.hf.llama import open_llama
from oryx_megatron.hf.portable import portable, train_alike
from oryx_megatron.hf.router import NAME as ROUTER_FILE
from oryx_megatron.hf.router import load_router_of, router_of, save_router
from oryx_megatron.hf.router_oryx import OryxRouter
from oryx_megatron.hf.tables import (
    EXTRA_STATE,
    FP32,
    Rule,
    check_names,
    extra_states,
    weight_rules,
)
from oryx_megatron.hf.tensors import CheckpointReader, Shape, write_checkpoint, write_safetensors
from oryx_megatron.hf.tokenizer import export_tokenizer
from oryx_megatron.platform import git_commit

log = logging.getLogger(__name__)

Format = Literal["keep", "bf16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_NOT_WEIGHTS = ("optimizer.", PREFIX, "rng_state")
"""Starts of the names of what a checkpoint holds besides the model."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote."""

    source: Path
    """The checkpoint, or the Hugging Face folder."""
    target: Path
    """The folder that was made."""
    tensors: int
    """Their number."""
    bytes: int
    """Of all tensors together."""
    model: ModelConfig
    """The architecture."""


# ------------------------------------------------------------------------------------------------- to Hugging Face


def export(
    source: str | Path,
    target: str | Path,
    *,
    dtype: Format = "keep",
    weights: WeightsKind = "trained",
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
        weights: Those that were trained, or their average (train.ema), in the same format.
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
        ConversionError: a tensor is missing, left over or of a wrong shape; the target exists; no such mode plan,
            dtype or kind of weights.
    """
    for name, value, kind in (("dtype", dtype, Format), ("weights", weights, WeightsKind)):
        if value not in (known := typing.get_args(kind)):
            raise ConversionError(f"{name}: {value!r} is none of {', '.join(known)}")
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
    used_tokenizer = _tokenizer_of(run, manifest, tokenizer) if with_tokenizer else None
    router = _router_of(source, manifest)
    longest = _longest(run)
    config = to_hf_config(
        model,
        mode_plan=mode_plan,
        mode_chunk=run.modes.chunk,
        max_position_embeddings=longest,
        architectures=["OryxForCausalLM"],
        eos_token_id=manifest.tokenizer["eod"],
        router=None if router is None else router.shape.to_dict(),
    )
    try:
        modeling_oryx.check_default_plan(config)
    except ValueError as error:
        raise ConversionError(f"--mode-plan: {error}") from None
    tensors = _ExportedTensors(source, model, hf_shapes(config), router, dtype, weights)
    store.check_files(source, manifest)
    if weights == "ema":
        manifest = dataclasses.replace(manifest, evaluations=_of_average(manifest.evaluations))
    config.dtype = tensors.kinds["model.embed_tokens.weight"][1]
    inputs = [source] if used_tokenizer is None else [source, used_tokenizer.folder]
    with appearing(target, overwrite=overwrite, inputs=inputs, error=ConversionError) as folder:
        write_safetensors(folder, dict(sorted(tensors.kinds.items(), key=_by_layer)), tensors.read, shard_bytes)
        config.save_pretrained(folder)
        for path in model_files():
            shutil.copyfile(path, folder / path.name)
        end = manifest.tokenizer["eod"]
        pad = end if used_tokenizer is None else export_tokenizer(used_tokenizer, folder, longest)
        GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False).save_pretrained(folder)
        files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
        write_manifest(folder, dataclasses.replace(portable(manifest), files=files), MANIFEST)
        (folder / "README.md").write_text(model_card(manifest, target.name, weights), encoding="utf-8")
        if check is not None:
            check(folder)
    size = sum(kind.itemsize * math.prod(shape) for shape, kind in tensors.kinds.values())
    return Conversion(source, target, len(tensors.kinds), size, model)


class _ExportedTensors:
    """The tensors of an export, each made from a checkpoint when it is asked for.

    Args:
        source: The checkpoint.
        model: Its model.
        shapes: Of the export's weights, by name.
        router: Exported beside them; None: the model has none.
        dtype: See `export`.
        weights: See `export`.

    Raises:
        ConversionError: a tensor is missing, left over or of a wrong shape, or there is no average.
    """

    def __init__(
        self,
        source: Path,
        model: ModelConfig,
        shapes: dict[str, Shape],
        router: OryxRouter | None,
        dtype: Format,
        weights: WeightsKind,
    ) -> None:
        self._reader, self._shapes, self._weights = CheckpointReader(source), shapes, weights
        self._stored = self._reader.shapes()
        if weights == "ema" and not has_average(self._stored):
            raise ConversionError(f"{source} {NO_AVERAGE}; export its trained weights")
        rules = weight_rules(model)
        found = {name: shape for name, shape in self._stored.items() if not _beside_weights(name)}
        check_names(checkpoint_shapes(rules, shapes, model.num_layers), found, f"{source}:")
        self.kinds: dict[str, tuple[Shape, torch.dtype]] = {}
        """Shape and format of each tensor, by its name in the export."""
        self._places: dict[str, tuple[Rule, int | None]] = {}
        for rule, layer in _unrolled(rules, model.num_layers):
            for name in (named(hf, layer) for hf in rule.hf):
                own = self._reader.dtype(rule.checkpoint[0]) if dtype == "keep" else _DTYPES[dtype]
                self.kinds[name] = (shapes[name], torch.float32 if name.split(".")[-1] in FP32 else own)
                self._places[name] = rule, layer
        self._router = {} if router is None else {ROUTER + name: x for name, x in router.state_dict().items()}
        self.kinds |= {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._router.items()}

    def read(self, name: str) -> Tensor:
        """The tensor of this name, whole."""
        if name in self._router:
            return self._router[name]
        rule, layer = self._places[name]
        names = [named(hf, layer) for hf in rule.hf]
        start = sum(self._shapes[other][0] for other in names[: names.index(name)])
        averaged = self._weights == "ema"
        parts = [PREFIX + part if averaged and PREFIX + part in self._stored else part for part in rule.checkpoint]
        rows = torch.cat([self._reader.read(part, layer if rule.layered else None) for part in parts])
        return rows[start : start + self._shapes[name][0]].to(self.kinds[name][1])


def _of_average(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations of the averaged weights, in the form of those of trained ones."""
    found = []
    for result in evaluations:
        if (loss := result.get("ema_loss")) is not None:
            kept = {name: result[name] for name in ("iteration", "dataset", "plan", "tokens", "attention_share")}
            bits = result["bits_per_byte"] * loss / result["loss"] if result["loss"] else math.nan
            found.append(kept | {"loss": loss, "bits_per_byte": bits, "perplexity": math.exp(min(loss, 700.0))})
    return found


def _longest(run: RunConfig) -> int:
    """Tokens of a text that an export takes: of the run's samples, or more where YaRN extends the model to more."""
    scaling, trained = run.model.rope_scaling, run.data.sequence_length
    if scaling is None or scaling.rope_type != "yarn" or scaling.original_max_position_embeddings is None:
        return trained
    return max(trained, round(scaling.factor * scaling.original_max_position_embeddings))


def model_files() -> list[Path]:
    """Python files that an export ships: the model's, and what it imports beside it, as transformers finds them."""
    model = str(modeling_oryx.__file__)
    return sorted(map(Path, {model, *get_relative_import_files(model)}))


def _router_of(source: Path, manifest: Manifest) -> OryxRouter | None:
    """The router that was trained for a run, if one was."""
    if not (path := router_of(source)).is_file():
        return None
    router, about = load_router_of(source)
    if about.get("iteration") != manifest.iteration:
        log.warning("%s was trained at step %s, this is step %d", path, about.get("iteration"), manifest.iteration)
    return router


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
    own: Collection[str] = (),
    overwrite: bool = False,
    check: Callable[[Path], object] | None = None,
) -> Conversion:
    """Turn an Oryx folder of Hugging Face's form into a checkpoint that loads under any layout.

    Args:
        source: Folder with config.json and safetensors.
        target: Run folder to make; the checkpoint lies in its checkpoints/.
        run: Run config that the manifest shall hold (its model is replaced); default: the one in the folder's
            oryx_manifest.json, which names no folder of the machine it was trained on. Of the same run, the checkpoint
            keeps iteration and data position; of another one it is at step 0.
        own: Fields of `run.model` that hold in place of the folder's, of those that change no weights (fields.ROPE).
        overwrite: Replace a folder that an earlier call wrote, and nobody changed since.
        check: Called with the whole run folder before it appears under its name; what it raises leaves none.

    Raises:
        ConversionError: not an Oryx folder, damaged, or a tensor is missing, left over or of a wrong shape.
    """
    weights = _with(open_export(source), run, own)
    kept = weights.kept
    if run is None:
        if kept is None:
            raise ConversionError(
                f"{source} has no {MANIFEST} that says how it was trained; give a run config with --run"
            )
        run = kept.run()
    elif kept is None or not train_alike(run, kept.run()) or difference(kept.tokenizer, _described(run)) is not None:
        kept = None  # another run: it starts from these weights, at its own first step
    else:  # the same: it knows where its folders are
        run = dataclasses.replace(run, license=run.license or kept.run().license)
        kept = dataclasses.replace(kept, config=to_dict(run))
    return _convert(weights, Path(target), run, kept, overwrite, check)


def open_folder(source: str | Path, *, mixer: Literal["gdn", "mamba2"], seed: int) -> Weights:
    """A Hugging Face folder of either kind; `mixer` and `seed` are for a Llama.

    Raises:
        ConversionError: neither, damaged, or a tensor is missing, left over or of a wrong shape.
    """
    if hf_model_type(source) == "llama":
        return open_llama(source, mixer=mixer, seed=seed)
    return open_export(source)


def import_llama(
    source: str | Path,
    target: str | Path,
    run: RunConfig,
    *,
    mixer: Literal["gdn", "mamba2"] = "mamba2",
    seed: int = 0,
    own: Collection[str] = (),
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
        ConversionError: not a Llama folder, or one with biases, another activation or a rotary scaling that is not
            linear, yarn or llama3.
    """
    weights = _with(open_llama(source, mixer=mixer, seed=seed), run, own)
    return _convert(weights, Path(target), run, None, overwrite)


def _with(weights: Weights, run: RunConfig | None, own: Collection[str]) -> Weights:
    """With these fields of the run's model. Raises ConfigError when they do not fit the folder's."""
    assert set(own) <= set(ROPE)
    if run is None or not own:
        return weights
    model = dataclasses.replace(weights.model, **{name: getattr(run.model, name) for name in own})
    check_model(model)
    return dataclasses.replace(weights, model=model)


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
        if weights.router is not None:
            about = {"iteration": kept.iteration if kept else 0, "checkpoint": weights.source.name}
            save_router(weights.router, folder / ROUTER_FILE, about)
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
    dtypes = {part: weights.dtype(named(rule.hf[0], 0)) for part, (rule, _) in places.items()}

    def produce(part: str, layer: int | None) -> Tensor:
        rule, number = places[part]
        rows = torch.cat([read(named(hf, layer)) for hf in rule.hf])
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


def _described(run: RunConfig) -> dict[str, Any]:
    return dict(load_tokenizer(run.data.tokenizer).describe())


def checkpoint_shapes(rules: tuple[Rule, ...], hf: dict[str, Shape], layers: int) -> dict[str, Shape]:
    """Name → shape of every weight of a checkpoint, from the shapes of the other side."""
    shapes: dict[str, Shape] = {}
    for rule in rules:
        parts = [hf[named(name, 0)] for name in rule.hf]
        rows = rule.rows or (sum(part[0] for part in parts),)
        for name, count in zip(rule.checkpoint, rows):
            shape = (count, *parts[0][1:])
            shapes[name] = (layers, *shape) if rule.layered else shape
    return shapes


def _unrolled(rules: tuple[Rule, ...], layers: int) -> Iterator[tuple[Rule, int | None]]:
    for rule in rules:
        yield from ((rule, i) for i in range(layers)) if rule.layered else ((rule, None),)


def _by_layer(item: tuple[str, Any]) -> tuple[int, str]:
    """Sort key: embedding, then layer by layer, then the rest."""
    name = item[0].split(".")
    if name[:2] == ["model", "layers"]:
        return int(name[2]), item[0]
    return (-1 if name[1] == "embed_tokens" else 1 << 30), item[0]


def _beside_weights(name: str) -> bool:
    return name.startswith(_NOT_WEIGHTS) or EXTRA_STATE in name


__all__ = ["Conversion", "export", "import_", "import_llama", "open_folder", "write_weights"]
