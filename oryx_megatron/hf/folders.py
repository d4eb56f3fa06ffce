"""Hugging Face folders, read: what an export or another model's config.json says, checked before it is used."""

from __future__ import annotations

import dataclasses

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it defers imports that nothing here uses

# isort: split
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oryx_megatron.checkpoint import Manifest, read_manifest, store
from oryx_megatron.checkpoint.manifest import LARGEST
from oryx_megatron.config import check_model
from oryx_megatron.config.schema import ModelConfig
from oryx_megatron.errors import CheckpointError, ConfigError, ConversionError
from oryx_megatron.hf.configuration_oryx import OryxConfig
from oryx_megatron.hf.fields import from_hf_config, to_hf_config
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM
from oryx_megatron.hf.router_oryx import OryxRouter, shape_of
from oryx_megatron.hf.tables import check_names
from oryx_megatron.hf.tensors import SafetensorsReader, Shape
from oryx_megatron.reading import parse_json, read_text

MANIFEST = "oryx_manifest.json"
"""The checkpoint's manifest, kept in an export so that it can become a checkpoint again."""

ROUTER = "model.mode_router."
"""Start of the names of a router's tensors."""
_COMPUTES = ("config.json", "tokenizer.json", "tokenizer.model")
"""Files of an export, besides those of weights, that decide what it computes."""


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
    router: OryxRouter | None = None
    """What an export has beside the model's own weights."""


def open_export(source: str | Path) -> Weights:
    """An Oryx folder of Hugging Face's form. Raises ConversionError as `import_` does."""
    source = Path(source)
    config = _oryx_config(source)
    kept = kept_manifest(source)
    name = kept.config["model"]["name"] if kept is not None else source.resolve().name
    model = checked_model(source, lambda: _as_written(from_hf_config(config, name), kept))
    reader = SafetensorsReader(source)
    shapes = hf_shapes(config)
    found = {name: shape for name, shape in reader.shapes().items() if not is_tied(name, config)}
    check_names(shapes, found, f"{source}:")
    check_export(source)
    router = None
    if config.router is not None:
        router = OryxRouter(shape_of(config.router))
        router.load_state_dict({name: reader.read(ROUTER + name) for name in router.state_dict()})
    own = {name: shape for name, shape in shapes.items() if not name.startswith(ROUTER)}
    return Weights(source, model, own, reader.dtype, reader.read, kept, router)


def hf_model_type(source: str | Path) -> str | None:
    """`model_type` of a folder's config.json. Raises ConversionError when there is none to read."""
    return read_json(Path(source) / "config.json").get("model_type")


def recognised(source: str | Path) -> dict[str, Any]:
    """config.json of a folder that transformers may load here: it asks for nothing from elsewhere.

    transformers fetches kernels, quantisers and base models that such a file names. Raises ConversionError with the
    field: of an Oryx folder any that an export lacks, of another model's one that names code or a second model.
    """
    path = Path(source) / "config.json"
    fields = read_json(path)
    if (adapter := path.with_name("adapter_config.json")).exists():
        raise ConversionError(f"{adapter}: adapters are not loaded here; merge them (peft: merge_and_unload) and save")
    own = fields.get("model_type") == OryxConfig.model_type
    known = {*OryxConfig().to_dict(), "torch_dtype", "rotary_base"}
    for name in fields:
        if (own and name not in known) or re.search("attn_impl|experts_impl|kernel_|use_kernels|quantization", name):
            raise ConversionError(f"{path}: `{name}` is not a field that is loaded here; remove it")
    if own and fields.get("auto_map", OryxConfig().auto_map) != OryxConfig().auto_map:
        raise ConversionError(f"{path}: `auto_map` does not name the classes of an Oryx export")
    return fields


def _as_written(model: ModelConfig, kept: Manifest | None) -> ModelConfig:
    """The model with its pattern, its experts and its heads as the run wrote them, where that means the same layers."""
    if kept is None:
        return model
    written = kept.run().model
    if model.moe is not None and written.moe is not None and to_hf_config(written).moe == to_hf_config(model).moe:
        model = dataclasses.replace(model, moe=written.moe)
    if model.mtp is not None and written.mtp_layers == model.mtp_layers:
        model = dataclasses.replace(model, mtp=written.mtp)
    if not model.pattern:
        return model
    other = dataclasses.replace(model, pattern=tuple(map(str, kept.config["model"].get("pattern", ()))))
    return other if other.layer_modes == model.layer_modes else model


def check_export(folder: Path) -> None:
    """Compare what an export computes by (config, weights, tokenizer) with its manifest, where that lists them.

    Raises:
        ConversionError: a file is damaged, or was changed since.
    """
    kept = kept_manifest(folder)
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


def kept_manifest(source: Path) -> Manifest | None:
    if not (source / MANIFEST).exists():
        return None
    try:
        return read_manifest(source, MANIFEST)
    except CheckpointError as error:
        raise ConversionError(str(error)) from None


def _oryx_config(source: Path) -> OryxConfig:
    fields = recognised(source)
    if fields.get("model_type") != OryxConfig.model_type:
        raise ConversionError(f"{source}: model type {fields.get('model_type')!r}; known: oryx, llama")
    try:
        return OryxConfig.from_dict(fields)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ConversionError(f"{source / 'config.json'}: {' '.join(str(error).split())}") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_text(path, LARGEST))
    except OSError as error:
        hub = path.parent.as_posix()
        named = re.fullmatch(r"[\w.-]+/[\w.-]+", hub) and not path.parent.exists()
        more = f" One of a hub: hf download {hub} --local-dir FOLDER" if named else ""
        raise ConversionError(
            f"{path} cannot be read ({error.strerror}); is this a Hugging Face folder?{more}"
        ) from None
    except ValueError as error:
        raise ConversionError(f"{path} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return value


def checked_model(source: Path, make: Callable[[], ModelConfig]) -> ModelConfig:
    """The model of a config.json that may hold anything; ConversionError when it is none."""
    try:
        model = make()
        check_model(model)
    except ConfigError as error:
        raise ConversionError(f"{source / 'config.json'}: {str(error).removeprefix('config.json: ')}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ConversionError(f"{source / 'config.json'}: a field is of the wrong type ({error})") from None
    return model


def hf_shapes(config: OryxConfig) -> dict[str, Shape]:
    """Name → shape of every tensor of the Hugging Face model."""
    with torch.device("meta"):
        model = OryxForCausalLM(config)
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if not is_tied(name, config)}


def is_tied(name: str, config: OryxConfig) -> bool:
    """Whether a file repeats the embedding under the output layer's name."""
    return name == "lm_head.weight" and bool(config.tie_word_embeddings)


def named(name: str, layer: int | None) -> str:
    return name.format(i=layer)
