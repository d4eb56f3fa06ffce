"""A trained router as a file beside a run's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from oryx_megatron.checkpoint import Manifest, read_manifest
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import CheckpointError, first_line
from oryx_megatron.hf.router_oryx import OryxRouter, shape_of

NAME = "router.safetensors"
"""In a run folder, or in a checkpoint that lies alone."""
FORMAT = "oryx-router"


def save_router(router: OryxRouter, path: Path, about: Mapping[str, Any]) -> None:
    """Write a router atomically; `about` says what it was trained for, and must be JSON."""
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in router.state_dict().items()}
    metadata = {"format": FORMAT, "shape": json.dumps(router.shape.to_dict()), "about": json.dumps(dict(about))}
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata=metadata))  # save_file hides it from other users


def is_router(path: Path) -> bool:
    """Whether a file is one that `save_router` wrote."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def load_router(path: Path) -> tuple[OryxRouter, dict[str, Any]]:
    """A router in eval mode and what `save_router` was told about it. CheckpointError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path} is no router; train one: oryx router RUN")
            router = OryxRouter(shape_of(json.loads(metadata["shape"])), len(file.get_slice("quantiles")[:]))
            router.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
            return router.eval(), json.loads(metadata["about"])
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged router ({first_line(error)}); train it again") from error


def facts_of(manifest: Manifest) -> dict[str, Any]:
    """What a router's `about` holds of the model that it is for."""
    model = manifest.run().model
    known = {name: getattr(model, name) for name in ("mixer", "num_layers", "hidden_size")}
    return {"model": known, "tokenizer": manifest.tokenizer["fingerprint"]}


def load_router_of(checkpoint: Path) -> tuple[OryxRouter, dict[str, Any]]:
    """The router of a checkpoint, as `load_router`. CheckpointError for that of another model too."""
    path, manifest = router_of(checkpoint), read_manifest(checkpoint)
    router, about = load_router(path)
    facts, model = facts_of(manifest), manifest.run().model
    apart = [
        f"{name} {about['model'].get(name)}, not {value}"
        for name, value in facts["model"].items()
        if "model" in about and about["model"].get(name) != value
    ]
    if about.get("tokenizer", facts["tokenizer"]) != facts["tokenizer"]:
        apart.append("another tokenizer")
    if router.shape.vocab_size != model.vocab_size:
        apart.append(f"vocab_size {router.shape.vocab_size}, not {model.vocab_size}")
    if apart:
        again = f"train this one's: oryx router {path.parent} --overwrite"
        raise CheckpointError(f"{path} is the router of another model ({'; '.join(apart)}); {again}")
    return router, about


def router_of(checkpoint: Path) -> Path:
    """Where the router of a checkpoint lies: in the run folder, or in a checkpoint that lies outside of one."""
    return (checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint) / NAME
