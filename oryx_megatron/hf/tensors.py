"""Named tensors in files, one at a time: megatron-core's distributed checkpoints and sharded safetensors.

Nothing here holds more than a layer's worth of a model in memory, and none of it needs process groups.
"""

from __future__ import annotations

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it defers imports that nothing here uses

# isort: split
import io
import json
import math
import os
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from oryx_megatron.checkpoint.safe import SafeReader
from oryx_megatron.errors import CheckpointError, ConversionError, OryxError, first_line
from oryx_megatron.reading import parse_json, read_text, reason

Shape = tuple[int, ...]

NAMES: dict[torch.dtype, str] = {
    dtype: name
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for name, known in safetensors.torch._TYPES.items()
    if known == dtype
}
"""What safetensors calls the formats of weights; quantized ones (int8, FP8) need scales that are not read here."""
LARGEST = 1 << 28
"""Bytes of an index."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class CheckpointReader:
    """Tensors of a megatron-core distributed checkpoint, whatever the layout it was written under.

    Raises:
        CheckpointError: no such checkpoint, or files missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = SafeReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        for file in sorted({info.relative_path for info in metadata.storage_data.values()}):
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder}: {file} is missing")

    def shapes(self) -> dict[str, Shape]:
        """Name → shape of every tensor."""
        return {name: tuple(entry.size) for name, entry in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """A whole tensor, or one layer of a stacked one."""
        entry = self._tensors[name]
        start, sizes = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            start[0], sizes[0] = layer, 1
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(start), torch.Size(sizes))
        items = create_read_items_for_chunk_list(name, entry, [chunk])
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read ({first_line(error)})") from None
        return target if layer is None else target.squeeze(0)


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = self.target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            place = place.narrow(axis, start, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def write_checkpoint(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    stacked: set[str],
    produce: Callable[[str, int | None], Tensor],
    objects: Iterable[str] = (),
) -> None:
    """Write a distributed checkpoint that loads under any layout, asking for each tensor when its turn comes.

    Args:
        folder: Existing empty folder.
        shapes: Name → shape.
        dtypes: Name → format.
        stacked: Names whose first axis is the layer; they are asked for layer by layer.
        produce: (name, layer or None) → contiguous CPU tensor.
        objects: Names of empty extra states.

    Raises:
        ConversionError: the disk is full or the folder not writable.
    """
    items = []
    for name, shape in shapes.items():
        properties = TensorProperties(dtype=dtypes[name])
        for layer in range(shape[0]) if name in stacked else [None]:
            start = torch.Size([0 if layer is None else layer, *[0] * (len(shape) - 1)])
            sizes = torch.Size([shape[0] if layer is None else 1, *shape[1:]])
            data = TensorWriteData(ChunkStorageMetadata(start, sizes), properties, torch.Size(shape))
            items.append(WriteItem(MetadataIndex(name, start), WriteItemType.SHARD, tensor_data=data))
    items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]
    try:
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
        dcp.save({}, storage_writer=writer, planner=_Streaming(items, produce, stacked), no_dist=True)
        torch.save({}, folder / "common.pt")
        save_config(CheckpointingConfig("torch_dist"), str(folder))
    except CheckpointException as error:  # no subclass of Exception
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OryxError):  # of what was to be written
            raise cause from None
        raise ConversionError(f"cannot write {folder}: {reason(cause)}") from error  # type: ignore[arg-type]
    except (OSError, RuntimeError) as error:  # torch.save's on a full disk is a RuntimeError
        raise ConversionError(f"cannot write {folder}: {reason(error)}") from error


class _Streaming(DefaultSavePlanner):
    def __init__(self, items: list[WriteItem], produce: Callable[[str, int | None], Tensor], stacked: set[str]) -> None:
        super().__init__(flatten_state_dict=False)
        self.items, self.produce, self.stacked = items, produce, stacked

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self.items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        name = write_item.index.fqn
        if write_item.type is WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)
            empty.seek(0)
            return empty
        if name not in self.stacked:
            return self.produce(name, None)
        assert write_item.index.offset is not None
        return self.produce(name, write_item.index.offset[0]).unsqueeze(0)


class SafetensorsReader:
    """Tensors of a folder with model.safetensors, or with shards and their index.

    Reads the format (8 bytes of length, JSON header, data) itself: the library maps files whole, and what was touched
    of a mapped file counts as this process's memory.

    Raises:
        ConversionError: no weights, shards missing or damaged, or two places for one tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).is_file() and (folder / SINGLE).is_file():
            raise ConversionError(f"{folder} holds {SINGLE} and {INDEX}, two sets of weights; remove one of them")
        if (folder / INDEX).is_file():
            try:
                files = sorted(set(parse_json(read_text(folder / INDEX, LARGEST))["weight_map"].values()))
                if strange := [file for file in files if file != Path(file).name]:
                    raise ValueError(f"it names {strange[0]}")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConversionError(f"{folder / INDEX} is damaged ({first_line(error)})") from None
            missing = [file for file in files if not (folder / file).is_file()]
            if missing:
                raise ConversionError(f"{folder}: shard {missing[0]} is missing ({len(missing)} in all)")
        elif (folder / SINGLE).is_file():
            files = [SINGLE]
        else:
            raise ConversionError(f"{folder} holds no {SINGLE} and no {INDEX}")
        self._entries: dict[str, tuple[Path, torch.dtype, Shape, int]] = {}
        for file in files:
            entries = self._header(folder / file)
            if twice := sorted(entries.keys() & self._entries.keys()):
                other = self._entries[twice[0]][0].name
                raise ConversionError(f"{folder}: {twice[0]} stands in {other} and in {file}; remove one of them")
            self._entries |= entries

    def _header(self, path: Path) -> dict[str, tuple[Path, torch.dtype, Shape, int]]:
        known: dict[str, torch.dtype] = {text: dtype for dtype, text in NAMES.items()}
        entries = {}
        try:
            with path.open("rb") as file:
                length = struct.unpack("<Q", file.read(8))[0]
                if length > path.stat().st_size:
                    raise ValueError("the header is longer than the file")
                header = parse_json(file.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                dtype, shape = known[entry["dtype"]], tuple(entry["shape"])
                if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
                    raise ValueError(f"{name} has no sizes")
                if end - start != dtype.itemsize * math.prod(shape) or 8 + length + end > path.stat().st_size:
                    raise ValueError(f"{name} reaches beyond the file")
                entries[name] = path, dtype, shape, 8 + length + start
        except (OSError, ValueError, struct.error, TypeError, AttributeError) as error:
            raise ConversionError(f"{path} is damaged ({first_line(error)})") from None
        except KeyError as error:
            raise ConversionError(
                f"{path}: unknown format or missing field {error}; known: {', '.join(known)}"
            ) from None
        return entries

    def shapes(self) -> dict[str, Shape]:
        """Name → shape of every tensor."""
        return {name: shape for name, (_, _, shape, _) in self._entries.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name][1]

    def read(self, name: str) -> Tensor:
        """One tensor. Raises ConversionError when its file cannot be read to its end, or holds what is no number."""
        path, dtype, shape, offset = self._entries[name]
        tensor = torch.empty(shape, dtype=dtype)
        data = memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                while len(data):  # Linux reads at most 2 GiB at once, other file systems less
                    if not (read := file.readinto(data)):
                        raise EOFError("it ends too early")
                    data = data[read:]
        except (OSError, EOFError) as error:
            raise ConversionError(f"{path} is damaged ({name}: {first_line(error)})") from None
        if not bool(tensor.isfinite().all()):
            raise ConversionError(f"{path}: {name} holds values that are not finite")
        return tensor


def write_safetensors(
    folder: Path, tensors: Mapping[str, tuple[Shape, torch.dtype]], produce: Callable[[str], Tensor], shard_bytes: int
) -> list[str]:
    """Write sharded safetensors, asking for each tensor when its turn comes; returns the names of the files.

    The library's own writer wants a whole shard in memory; the format (8 bytes of length, JSON header, data in the
    header's order) lets it be written tensor by tensor.

    Raises:
        ConversionError: the disk is full or the folder not writable.
    """
    shards: list[list[str]] = []
    sizes: list[int] = []
    for name, (shape, dtype) in tensors.items():
        size = dtype.itemsize * math.prod(shape)
        if not shards or sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    files = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    try:
        for file, names in zip(files, shards):
            _write_shard(folder / file, {name: tensors[name] for name in names}, produce)
        if len(files) > 1:
            places = {name: file for file, names in zip(files, shards) for name in names}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(places.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    except OSError as error:
        raise ConversionError(f"cannot write {folder}: {error.strerror or error}") from error
    return files


def _write_shard(
    path: Path, tensors: Mapping[str, tuple[Shape, torch.dtype]], produce: Callable[[str], Tensor]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8, as the library writes it
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (shape, dtype) in tensors.items():
            tensor = produce(name)
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise ConversionError(f"{name} came as {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
            file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
