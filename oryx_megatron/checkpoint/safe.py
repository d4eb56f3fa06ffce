"""Reading checkpoint files without running code from them.

Three places of a distributed checkpoint are pickled: `.metadata` (torch reads it with pickle), small objects inside
*.distcp (torch.load with weights_only=False) and common.pt, which is such an object since megatron-core 0.19. `install`
makes megatron-core read all three by rules that build only the classes named here; anything else is a CheckpointError.
Tensors are read with weights_only by torch.

The extra state of a TransformerEngine layer (FP8 scales) is a pickle inside such an object, which TransformerEngine
opens itself: it is checked before it is handed on.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from oryx_megatron import compat
from oryx_megatron.errors import CheckpointError, first_line

METADATA = ".metadata"
COMMON = "common.pt"
"""Since megatron-core 0.19 the common state is an object in *.distcp instead."""
COMMON_OBJECT = "common_state/shard_0_1"
_DAMAGE = (AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError)
"""What unpickling raises on damaged bytes, besides its own errors."""

_DCP = "torch.distributed.checkpoint"
METADATA_CLASSES = {
    (f"{_DCP}.metadata", name)
    for name in (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    )
} | {
    (f"{_DCP}.planner", "SavePlan"),
    (f"{_DCP}.planner", "WriteItem"),
    (f"{_DCP}.planner", "WriteItemType"),
    (f"{_DCP}.planner", "TensorWriteData"),
    (f"{_DCP}.planner", "BytesIOWriteData"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    (f"{_DCP}.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}
"""What torch's and megatron-core's `.metadata` is made of; data types such as torch.float32 come on top."""

STORAGES = {("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes")}
"""By which a pickle in a pickle names the reading of a tensor; megatron-core 0.19 puts its own in place of torch's."""

EXTRA_STATE_CLASSES = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    *STORAGES,
    *(("transformer_engine.common.recipe", name) for name in (
        "Format", "_FormatHelper", "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling",
        "MXFP8BlockScaling", "NVFP4BlockScaling", "QParams", "MMParams", "Recipe",
    )),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
}  # fmt: skip


class _Restricted(pickle.Unpickler):
    """Builds only the classes it was given."""

    def __init__(self, file: Any, allowed: set[tuple[str, str]]) -> None:
        super().__init__(file)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        if (module, name) in STORAGES:
            return _storage
        if module.split(".")[0] in ("transformer_engine", "megatron"):
            return _Recipe  # checked only, and also where TransformerEngine is not installed
        return super().find_class(module, name)


class _Recipe:
    """In place of what TransformerEngine's scales bring along."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> _Recipe:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass


def read_metadata(folder: str | os.PathLike[str], sizes: Mapping[str, int] | None = None) -> Metadata:
    """`.metadata` of a checkpoint.

    Args:
        folder: Of the checkpoint.
        sizes: Bytes of its files, by name; None: those of the files in the folder.

    Raises:
        CheckpointError: missing, damaged, or holding anything but the description of tensors.
    """
    path = Path(folder) / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Restricted(file, METADATA_CLASSES).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; use another checkpoint") from None
    except (OSError, pickle.UnpicklingError, EOFError, *_DAMAGE) as error:
        raise CheckpointError(f"{path} is damaged or hostile ({_line(error)}); use another checkpoint") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} is damaged or hostile (it holds no metadata); use another checkpoint")
    _check_sizes(metadata, path, sizes)
    return metadata


def _check_sizes(metadata: Metadata, path: Path, known: Mapping[str, int] | None) -> None:
    """Raise CheckpointError for tensors that are larger than the files they should be in: memory is taken by these."""
    try:
        sizes = [
            math.prod(entry.size) * entry.properties.dtype.itemsize
            for entry in metadata.state_dict_metadata.values()
            if isinstance(entry, TensorStorageMetadata)
        ]
        names = sorted({place.relative_path for place in (metadata.storage_data or {}).values()})
        there = sum((path.parent / name).stat().st_size if known is None else known[name] for name in names)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing; use another checkpoint") from None
    except (OSError, *_DAMAGE) as error:
        raise CheckpointError(f"{path} is damaged or hostile ({_line(error)}); use another checkpoint") from None
    if min(sizes, default=0) < 0 or sum(sizes) > there:
        found = f"tensors of {sum(sizes)} bytes in the {there} bytes of {', '.join(names[:3])}"
        raise CheckpointError(f"{path} is damaged or hostile: {found} cannot be read; use another checkpoint")


class SafeReader(FileSystemReader):
    """torch's reader of a distributed checkpoint, with `read_metadata` as above, read once."""

    _metadata: Metadata | None = None

    def read_metadata(self, *arguments: Any, **keywords: Any) -> Metadata:
        """See the function of this name."""
        if self._metadata is None:
            self._metadata = metadata = read_metadata(self.path)
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
        return self._metadata


class _ObjectPlanner(DefaultLoadPlanner):
    """torch's planner for objects, each read by `load_object`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """See torch."""
        _load_bytes(self, read_item, value)


def read_common(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors and objects of layers: settings and steps of the optimizer.

    Raises:
        CheckpointError: missing, damaged or hostile.
        CheckpointingException: the same, of an object in *.distcp.
    """
    path = Path(folder) / COMMON
    if not path.exists() and COMMON_OBJECT in read_metadata(folder).state_dict_metadata:
        state: dict[str, Any] = {COMMON_OBJECT: io.BytesIO()}
        torch.distributed.checkpoint.load(
            state, storage_reader=SafeReader(folder), planner=_ObjectPlanner(), no_dist=True
        )
        return state[COMMON_OBJECT][0]
    try:
        with _only():
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, EOFError, RuntimeError, *_DAMAGE) as error:
        raise CheckpointError(f"{path} is damaged or hostile ({_line(error)}); use another checkpoint") from None


@contextlib.contextmanager
def _only(*classes: type) -> Iterator[None]:
    """Let torch's weights_only build these classes beside tensors; none of those that other packages have allowed."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(classes))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def install() -> None:
    """Let megatron-core read checkpoints by the rules above, process-wide."""
    compat.megatron.read_checkpoints_by(SafeReader, _load_bytes, read_common)


def load_object(data: io.BytesIO, name: str) -> Any:
    """A small object of a checkpoint: tensors, numbers, containers, and bytes that pass `check_extra_state`.

    Raises:
        CheckpointingException: it holds anything else.
    """
    try:
        with _only(bytes, io.BytesIO):  # b"" is pickled as a call of it
            value = torch.load(data, map_location="cpu", weights_only=True)
        for part in value if isinstance(value, (list, tuple)) else [value]:
            check_extra_state(part)
    except (pickle.UnpicklingError, EOFError, RuntimeError, *_DAMAGE) as error:
        raise CheckpointingException(f"its object {name} is damaged or hostile ({_line(error)})") from None
    return value


def load_file(path: str | os.PathLike[str], map_location: Any, classes: list[type]) -> Any:
    """A file of torch.save that holds tensors, numbers, containers and objects of `classes`.

    Raises:
        CheckpointError: damaged, or holding anything else, also inside of a layer's extra state.
    """
    try:
        with _only(bytes, io.BytesIO, *classes):
            content = torch.load(path, map_location=map_location, weights_only=True)
        module = content.get("module") if isinstance(content, dict) else None
        for name, value in module.items() if isinstance(module, dict) else ():
            if name.endswith("_extra_state"):
                check_extra_state(value)
    except (OSError, pickle.UnpicklingError, EOFError, RuntimeError, *_DAMAGE) as error:
        text = f"{path} is damaged or hostile ({_line(error)}); use another checkpoint"
        raise CheckpointError.of_one_rank(text) from None  # each rank reads files of its own
    return content


def check_extra_state(value: Any) -> None:
    """Raise UnpicklingError when the pickle inside a layer's extra state would build anything unknown."""
    if isinstance(value, io.BytesIO):
        content = value.getvalue()
    elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.dim() == 1:
        content = value.numpy().tobytes()
    else:
        return
    if content.startswith(b"PK"):  # torch.save's
        with _only():
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    elif content:
        _Restricted(io.BytesIO(content), EXTRA_STATE_CLASSES).load()


def _load_bytes(planner: Any, item: ReadItem, data: io.BytesIO) -> None:
    name = item.dest_index.fqn
    value = load_object(data, name)
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], value)
    else:
        planner.state_dict[name] = value


def _storage(data: bytes) -> Any:
    """In place of torch.storage._load_from_bytes, which would run what the inner pickle asks for."""
    with _only():
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _line(error: BaseException) -> str:
    """The first line of a message; of torch's long one about weights_only, the class it did not like."""
    text = str(error).strip()
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it names {found[1]}, which no checkpoint needs"
    return first_line(error)
